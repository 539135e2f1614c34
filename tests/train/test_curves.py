import json
import logging
import math
import sys
from types import SimpleNamespace

import pytest

from fastkd.cli.main import main
from fastkd.train import curves
from fastkd.train.curves import draw_stage, plot_bars, plot_curves

SERIES = {
    "KL divergence": [(step, 3.0 * 0.99**step) for step in range(200)],
    "cross-entropy": [(step, 2.0 * 0.98**step) for step in range(0, 200, 20)],
}
LABELS = {"title": "Loss", "xlabel": "step", "ylabel": "nats per token"}


@pytest.mark.parametrize("log_y", [False, True])
def test_png_holds_the_curves(tmp_path, log_y):
    image_of = pytest.importorskip("matplotlib.image").imread
    path = plot_curves(SERIES, tmp_path / "loss.png", **LABELS, log_y=log_y)
    assert path == tmp_path / "loss.png"
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    image = image_of(path)
    assert image.shape[:2] == (600, 960)  # 6.4 x 4 inches at 150 dots per inch
    blue, vermilion = (0, 114, 178), (213, 94, 0)
    for colour in (blue, vermilion):
        distance = abs(image[..., :3] * 255 - colour).max(axis=-1)
        assert (distance < 2).sum() > 100, colour


def test_gaps_empty_and_many_series_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    many = {f"run {index}": [(0, index), (1, math.nan), (2, index)] for index in range(10)} | {"empty": []}
    assert plot_curves(many, tmp_path / "many.png", **LABELS).stat().st_size > 1000


def test_without_matplotlib_one_line_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        assert plot_curves(SERIES, tmp_path / "loss.png", **LABELS) is None
    assert len(caplog.records) == 1 and "fastkd[plots]" in caplog.text
    assert list(tmp_path.iterdir()) == []


def broken_import(monkeypatch, folder):
    """A matplotlib that was built for another numpy."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    (folder / "matplotlib").mkdir()
    (folder / "matplotlib" / "__init__.py").write_text("raise RuntimeError('numpy ABI')")
    monkeypatch.syspath_prepend(folder)


def broken_figure(monkeypatch, folder):
    figure = pytest.importorskip("matplotlib.figure").Figure

    def savefig(*_, **__):
        raise ValueError("numpy ABI")

    monkeypatch.setattr(figure, "savefig", savefig)


def broken_module(monkeypatch, folder):
    """Without what it should have."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(__name__="numpy ABI"))


BROKEN = [broken_import, broken_figure, broken_module]


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "distill"
    folder.mkdir()
    lines = [{"step": step, "loss": 1 / step, "eval_perplexity": 9.0, "eval_accuracy": 0.5} for step in (1, 2, 3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_finished_stage_is_drawn_beside_its_log(stage, caplog):
    pytest.importorskip("matplotlib")
    draw_stage(stage)
    assert sorted(path.name for path in stage.glob("*.png")) == ["accuracy.png", "loss.png", "perplexity.png"]
    assert not caplog.records


@pytest.mark.parametrize("broken", BROKEN)
def test_whatever_keeps_a_stage_from_being_drawn_is_one_warning(stage, tmp_path, monkeypatch, caplog, broken):
    broken(monkeypatch, tmp_path)
    draw_stage(stage)
    assert len(caplog.records) == 1 and str(stage) in caplog.text
    assert "numpy ABI" in caplog.text or "ImportError: cannot import name 'Figure'" in caplog.text
    assert not list(stage.glob("*.png"))


@pytest.mark.parametrize("broken", BROKEN)
def test_evaluations_and_quickstarts_go_on_without_their_plots(tmp_path, monkeypatch, caplog, broken):
    broken(monkeypatch, tmp_path)
    assert plot_curves(SERIES, tmp_path / "curves.png", **LABELS) is None
    assert plot_bars({"accuracy": {"student": 0.5}}, tmp_path / "bars.png", title="t") is None
    assert [record.getMessage().partition(" is not drawn: ")[0] for record in caplog.records] == [
        str(tmp_path / "curves.png"),
        str(tmp_path / "bars.png"),
    ]


def test_a_folder_that_cannot_be_written_is_told(stage, monkeypatch, caplog):
    pytest.importorskip("matplotlib")
    (stage / "loss.png").mkdir()
    draw_stage(stage)
    assert len(caplog.records) == 1 and "loss.png" in caplog.text


def test_no_log_is_told(tmp_path, caplog):
    draw_stage(tmp_path)
    assert len(caplog.records) == 1 and "log.jsonl" in caplog.text


GARBAGE = [b"nonsense", b"\0\0\0\0", b"[1, 2]", b"[" * 100_000, b"\xff\xfe", b"half\ra line", b'{"step": null, "loss": []}', b""]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_the_log_is_passed_over(stage, monkeypatch, caplog, garbage):
    log = stage / "log.jsonl"
    first, *rest = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + garbage + b"\n" + b"".join(rest))
    drawn = {}
    monkeypatch.setattr("fastkd.train.curves._draw_curves", lambda series, *_, **__: drawn.update(series))
    draw_stage(stage)
    assert drawn["loss"] == [(step, 1 / step) for step in (1, 2, 3)] and not caplog.records


def test_the_plot_command_says_why_and_fails(stage, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        broken_figure(patch, tmp_path)
        assert main(["plot", str(stage)]) == 2
    assert "loss.png is not drawn: ValueError: numpy ABI." in caplog.text
    with (stage / "log.jsonl").open("a") as log:
        log.write("nonsense\n")
    assert main(["plot", str(stage)]) == 2
    assert "line 4 is no JSON object: b'nonsense'" in capsys.readouterr().err


def test_legends_hide_no_curve_and_a_name_keeps_its_colour(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(curves, "_write", lambda figure, path: figures.append(figure))
    full = {f"run {index} of a long name": [(step, index) for step in range(50)] for index in range(6)}
    curves._draw_curves(full, tmp_path / "full.png", **LABELS)
    last = dict(list(full.items())[-1:] + list(full.items())[:1])
    curves._draw_curves(last, tmp_path / "last.png", **LABELS, places={name: place for place, name in enumerate(full)})
    for figure, names in zip(figures, (full, last), strict=True):
        (axes,), (legend,) = figure.axes, figure.legends
        figure.draw_without_rendering()
        assert axes.get_legend() is None and not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert [text.get_text() for text in legend.get_texts()] == list(names)
    colours = [{line.get_label(): line.get_color() for line in figure.axes[0].lines} for figure in figures]
    assert len({*colours[0].values()}) == 6 and colours[1] == {name: colours[0][name] for name in last}


def test_a_stage_says_what_its_perplexity_is_over(stage, monkeypatch):
    lines = [{"step": step, "eval_perplexity": 9.0, "eval_events": "352 slots of 700 ids"} for step in (1, 2)]
    (stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = []
    monkeypatch.setattr(curves, "_draw_curves", lambda series, path, **options: drawn.append((path.name, options["ylabel"])))
    draw_stage(stage)
    assert drawn == [("perplexity.png", "perplexity over 352 slots of 700 ids")]
