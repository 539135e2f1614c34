"""Floor 5, train: curves of a run as a PNG; needs matplotlib, which is an extra."""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastkd.files import write_bytes_atomic

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
) -> Path | None:
    """Draw each named sequence of (x, y) points as a curve into the PNG `path`, and return the path.

    Points that are not finite leave a gap. One curve is described by the title alone, several get a legend. Without
    matplotlib, one line is logged and None returned.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        logger.warning("%s is not drawn: matplotlib is not installed (pip install 'fastkd[plots]').", path)
        return None
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (label, points) in enumerate(series.items()):
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
        axes.legend(frameon=False, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png")  # a bare Figure draws with Agg: no display, no global state
    write_bytes_atomic(path, png.getvalue())
    return Path(path)
