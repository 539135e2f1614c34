import logging
import math
import sys

import pytest

from fastkd.train.curves import plot_curves

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
