"""Curves of runs, and scores side by side, as a PNG; needs matplotlib, which is an extra."""

import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastkd.store import write_bytes_atomic
from fastkd.train.log import LOG_FILE, read_log

logger = logging.getLogger(__name__)

# Okabe and Ito's colours, distinct in every common form of colour blindness; black and yellow last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def plot_curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_y: bool = False,
    places: Mapping[str, int] | None = None,
) -> Path | None:
    """Draw each named sequence of (x, y) points as a curve into the PNG `path`, and return the path.

    places: of every name's colour among `COLOURS`, so that a model has the same one in all pictures; None: in the order of `series`.

    Points that are not finite leave a gap. One curve is described by the title alone, several get a legend below the axes. Where it
    cannot be drawn, for want of matplotlib or for any other reason, one warning is logged and None returned.
    """
    with _warning_instead(path):
        return _draw_curves(series, path, title=title, xlabel=xlabel, ylabel=ylabel, log_y=log_y, places=places)
    return None


def perplexity_over(lines: Iterable[Mapping[str, Any]]) -> str:
    """Name what the perplexities in the lines of a log are over, as far as these say it."""
    events = next((line["eval_events"] for line in lines if "eval_events" in line), None)
    return "perplexity" if events is None else f"perplexity over {events}"


def draw_stage(folder: str | Path) -> None:
    """Draw the curves of a finished stage from its log, beside it. They are no result: what fails is one warning."""
    folder = Path(folder)
    with _warning_instead(f"{folder}: a curve of the log"):
        lines = read_log(folder / LOG_FILE, strict=False)
        for key, name in (("loss", "loss"), ("eval_perplexity", "perplexity"), ("eval_accuracy", "accuracy")):
            points = _points(lines, key)
            if len(points) > 1:
                ylabel = perplexity_over(lines) if name == "perplexity" else name
                _draw_curves({name: points}, folder / f"{name}.png", title=folder.name, xlabel="step", ylabel=ylabel)


@contextmanager
def _warning_instead(what: str | Path) -> Iterator[None]:
    """Log whatever keeps `what` from being drawn, and go on."""
    try:
        yield
    except Exception as error:
        is_missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "matplotlib"
        cause = "matplotlib is not installed (pip install 'fastkd[plots]')" if is_missing else f"{type(error).__name__}: {error}"
        logger.warning("%s is not drawn: %s.", what, cause)


def _draw_curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_y: bool = False,
    places: Mapping[str, int] | None = None,
) -> Path:
    columns = 2 if max(map(len, series), default=0) <= 40 else 1
    rows = -(-len(series) // columns) if len(series) > 1 else 1
    figure = _figure(6.4, 3.8 + 0.2 * rows)
    from matplotlib.ticker import FuncFormatter

    axes = figure.subplots()
    for order, (label, points) in enumerate(series.items()):
        index = order if places is None else places[label]
        style = "-" if index < len(COLOURS) else "--"
        x, y = [point[0] for point in points], [point[1] for point in points]
        marker = "o" if len(points) < 20 else None
        axes.plot(x, y, style, label=label, color=COLOURS[index % len(COLOURS)], linewidth=1.6, marker=marker, markersize=3)
    if log_y:
        axes.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)  # inside, it may hide curves
    return _write(figure, path)


def plot_logs(runs: Sequence[str], key: str, path: str | Path) -> Path | None:
    """`plot_curves` of what the logs of several runs say of `key`, over steps.

    A run is its output_dir, the folder of one stage, or a log; curves bear its name, and the stage's where several of them have `key`.
    The same runs have the same colours whatever the key. Perplexities say what they are over: each its own where that differs.

    Raises `ValueError` for a run without a log, and for a key that no log has, naming those that there are.
    """
    curves: list[_Curve] = []
    keys: set[str] = set()
    seen = 0
    for run in runs:
        logs = {log.parent.name: read_log(log) for log in _logs(run)}
        keys.update(name for lines in logs.values() for line in lines for name in line if _number(line, name) is not None)
        found = {stage: points for stage, lines in logs.items() if (points := _points(lines, key))}
        for place, (stage, lines) in enumerate(logs.items(), start=seen):
            if stage in found:
                measured = perplexity_over(lines) if key == "eval_perplexity" else key.removeprefix("eval_").replace("_", " ")
                curves.append(_Curve(run if len(found) == 1 else f"{run}: {stage}", found[stage], place, measured))
        seen += len(logs)
    if not curves:
        raise ValueError(f"None of the logs has the key {key!r}; they have {', '.join(sorted(keys - {'step'}))}.")
    is_one = len({curve.measured for curve in curves}) == 1
    named = {curve.label if is_one else f"{curve.label}, {curve.measured}": curve for curve in curves}
    return plot_curves(
        {name: curve.points for name, curve in named.items()},
        path,
        title=key.removeprefix("eval_").replace("_", " "),
        xlabel="step",
        ylabel=curves[0].measured if is_one else "perplexity",
        log_y="perplexity" in key,
        places={name: curve.place for name, curve in named.items()},
    )


class _Curve(NamedTuple):
    """What a log says of a key: (step, value) points, the place of their colour, and what the values measure."""

    label: str
    points: list[tuple[float, float]]
    place: int
    measured: str


def plot_bars(panels: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str) -> Path | None:
    """Draw one panel a score into the PNG `path`, with a bar and its value for each name; a name has the same colour in all.

    Returns the path; where it cannot be drawn, for whatever reason, one warning is logged and None returned.
    """
    with _warning_instead(path):
        return _draw_bars(panels, path, title=title)
    return None


def _draw_bars(panels: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str) -> Path:
    names = list(dict.fromkeys(name for bars in panels.values() for name in bars))
    figure = _figure(1.0 + 2.4 * len(panels), 1.4 + 0.35 * len(names))
    for index, (axes, (score, bars)) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True)):
        rows = [names.index(name) for name in bars]
        drawn = axes.barh(rows, list(bars.values()), color=[COLOURS[row % len(COLOURS)] for row in rows], height=0.7)
        axes.bar_label(drawn, [f"{value:.4g}" for value in bars.values()], padding=3, fontsize=9)
        axes.set_title(score, loc="left", fontsize=10)
        axes.set_yticks(range(len(names)), names if index == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first name on top
        axes.margins(x=0.25)
        axes.tick_params(left=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return _write(figure, path)


def _logs(run: str) -> list[Path]:
    """The logs of a run's stages by name, or the one that is meant."""
    place = Path(run)
    logs = [place] if place.is_file() else [place / LOG_FILE] if (place / LOG_FILE).is_file() else sorted(place.glob(f"*/{LOG_FILE}"))
    if not logs:
        raise ValueError(
            f"{run} holds no {LOG_FILE}, nor does a folder in it; give the output_dir of a run, a stage's folder, or a log."
        )
    return logs


def _points(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Collect (step, value) of every line that has a number for `key`."""
    pairs = ((_number(line, "step"), _number(line, key)) for line in lines)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _number(line: Mapping[str, Any], key: str) -> float | None:
    """What a line of a log says of `key`, if that is a number; those that JSON has none for stand there as text."""
    value = line.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _figure(width: float, height: float) -> Any:
    """Make an empty figure of that many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _write(figure: Any, path: str | Path) -> Path:
    png = io.BytesIO()
    figure.savefig(png, format="png")  # a bare Figure draws with Agg: no display, no global state
    write_bytes_atomic(path, png.getvalue())
    return Path(path)
