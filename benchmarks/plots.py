"""One PNG a record, as bytes; needs matplotlib, which the [bench] and [plots] extras bring."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastkd.train.curves import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Points = Sequence[tuple[float, float]]


def linear_kl(record: Record) -> bytes:
    """Time over the floor's, and peak memory: a bar for every implementation and dtype."""
    results = record["results"]
    names = list(dict.fromkeys(row["implementation"] for row in results))
    dtypes = list(dict.fromkeys(row["dtype"] for row in results))
    figure, (time, memory) = _figure(1, 2, height=1.2 + 0.42 * len(names))
    for index, dtype in enumerate(dtypes):
        rows = {row["implementation"]: row for row in results if row["dtype"] == dtype}
        at = [place + 0.8 * (index + 0.5) / len(dtypes) - 0.4 for place in range(len(names))]
        style: dict[str, Any] = {"height": 0.8 / len(dtypes), "color": COLOURS[index], "label": dtype}
        time.barh(at, [rows[name]["ratio_to_gemms"] if name in rows else 0 for name in names], **style)
        memory.barh(at, [(rows.get(name, {}).get("peak_bytes") or 0) / 1e6 for name in names], **style)
    for axes, title in ((time, "time, x GEMMs alone"), (memory, "peak above inputs and gradients, MB")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yticks(range(len(names)), names if axes is time else [""] * len(names), fontsize=8)
        axes.invert_yaxis()
    time.axvline(1.0, color="#000000", linewidth=0.8)
    time.legend(frameon=False, fontsize=8)
    return _png(figure)


def scaling(record: Record) -> bytes:
    """Cost of a token and peak of memory over the number of tokens."""
    figure, (time, memory) = _figure(1, 2, height=3.2)
    results = record["results"]
    _curve(time, [(x["tokens"], x["microseconds_per_token"]) for x in results], 0, "")
    _curve(memory, [(x["tokens"], x["peak_bytes"] / 1e6) for x in results if x["peak_bytes"] is not None], 1, "")
    for axes, title in ((time, "microseconds a token"), (memory, "peak above inputs and gradients, MB")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_ylim(bottom=0)
    return _png(figure)


def accuracy(record: Record) -> bytes:
    """The hidden states' gradient's error over the divergence, for every dtype."""
    results = record["results"]
    dtypes = list(dict.fromkeys(x["dtype"] for x in results))
    names = list(dict.fromkeys(x["implementation"] for x in results))
    figure, panels = _figure(1, len(dtypes), height=4.0, sharey=True)
    for axes, dtype in zip(panels, dtypes, strict=True):
        for index, name in enumerate(names):
            points = [(x["kl"], x["student"]) for x in results if x["dtype"] == dtype and x["implementation"] == name]
            _curve(axes, points, index, name)
        axes.set_title(dtype, loc="left", fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("KL(teacher || student), nats")
    panels[0].set_ylabel("relative L2 error of the gradient")
    panels[-1].legend(frameon=False, fontsize=8)
    return _png(figure)


def grad_filter(record: Record) -> bytes:
    """Time over the dense floor's, and the gradients' errors, over the share of columns kept."""
    figure, (time, error) = _figure(1, 2, height=3.2)
    results = record["results"]
    _curve(time, [(x["columns_kept"], x["ratio_to_gemms"]) for x in results], 0, "fastkd, grad_filter")
    time.axhline(1.0, color="#000000", linewidth=0.8, label="GEMMs alone")
    time.axhline(record["unfiltered"]["ratio_to_gemms"], color=COLOURS[1], linewidth=1.2, linestyle="--", label="fastkd, unfiltered")
    time.set_ylim(bottom=0)
    for index, name in enumerate(("student", "head")):
        label = "hidden states" if name == "student" else "head"
        _curve(error, [(x["columns_kept"], x[f"{name}_error"]) for x in results], index, label)
    error.set_yscale("log")
    for axes, title in ((time, "time, x GEMMs alone"), (error, "relative L2 error of the gradient")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("share of columns kept")
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


PLOTS: dict[str, Callable[[Record], bytes]] = {
    "linear_kl": linear_kl,
    "scaling": scaling,
    "accuracy": accuracy,
    "grad_filter": grad_filter,
}


def _figure(rows: int, columns: int, *, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("The plots need matplotlib: pip install 'fastkd[bench]'.") from error
    figure = Figure(figsize=(9.6, height), dpi=150, layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _curve(axes: Axes, points: Points, index: int, label: str) -> None:
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.plot(x, y, color=COLOURS[index % len(COLOURS)], linewidth=1.6, marker="o", markersize=3, label=label)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")  # a bare Figure draws with Agg: no display, no global state
    return png.getvalue()
