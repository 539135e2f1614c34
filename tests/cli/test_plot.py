"""`fastkd plot`: which curves, under which names, and what is said instead."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from fastkd.cli.main import main
from fastkd.train import curves
from fastkd.train.log import RunLog


@pytest.fixture
def drawn(monkeypatch) -> list[dict]:
    """The arguments of every plot, which is not made."""
    calls: list[dict] = []

    def plot_curves(series, path, **options):
        calls.append({"series": series, "path": path, **options})
        return path

    monkeypatch.setattr(curves, "plot_curves", plot_curves)
    return calls


def write_run(folder: Path, **stages: list[dict]) -> str:
    for stage, lines in stages.items():
        (folder / stage).mkdir(parents=True)
        with RunLog(folder / stage, stage=stage) as log:
            for line in lines:
                log.write(line)
    return str(folder)


def steps(*losses: float, **more: float) -> list[dict]:
    return [{"step": step, "loss": loss, "seconds": 0.1, **more} for step, loss in enumerate(losses, start=1)]


def test_runs_stages_and_logs_are_overlaid(tmp_path, drawn, capsys):
    one = write_run(tmp_path / "one", pretrain=steps(3.0, math.nan, 2.0), task=[*steps(1.0), {"step": 1, "eval_accuracy": 0.5}])
    two = write_run(tmp_path / "two", pretrain=steps(4.0))
    log = f"{two}/pretrain/log.jsonl"
    assert main(["plot", one, two, f"{one}/task", log]) == 0
    series = drawn[0]["series"]
    assert list(series) == [f"{one}: pretrain", f"{one}: task", two, f"{one}/task", log]
    assert series[two] == series[log] == [(1, 4.0)] and series[f"{one}: task"] == [(1, 1.0)]
    (first, gap, last) = series[f"{one}: pretrain"]
    assert (first, last) == ((1, 3.0), (3, 2.0)) and gap[0] == 2 and math.isnan(gap[1])
    assert drawn[0]["path"] == Path("loss.png") and drawn[0]["xlabel"] == "step" and not drawn[0]["log_y"]
    assert capsys.readouterr().out == "loss.png\n"


def test_a_key_that_one_stage_has_is_named_by_its_run(tmp_path, drawn):
    run = write_run(tmp_path / "run", pretrain=[{"step": 5, "eval_perplexity": 9.0}], task=steps(1.0))
    assert main(["plot", run, "--key", "eval_perplexity", "--output", str(tmp_path / "p.png")]) == 0
    assert drawn == [
        {
            "series": {run: [(5, 9.0)]},
            "path": tmp_path / "p.png",
            "title": "perplexity",
            "xlabel": "step",
            "ylabel": "perplexity",
            "log_y": True,
            "places": {run: 0},
        }
    ]


def test_the_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", pretrain=steps(3.0, 2.0, 1.0))
    assert main(["plot", run, "--output", str(tmp_path / "loss.png")]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_key_is_told_the_others(tmp_path, capsys):
    run = write_run(tmp_path / "run", pretrain=[*steps(3.0, grad_norm=1.0), {"step": 1, "loss": "nan", "rows": [1, 2], "note": "text"}])
    assert main(["plot", run, "--key", "los"]) == 2
    assert "None of the logs has the key 'los'; they have grad_norm, loss, seconds." in capsys.readouterr().err


def test_a_folder_without_logs(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no log.jsonl" in capsys.readouterr().err


def test_without_matplotlib_one_sentence_and_code_2(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = write_run(tmp_path / "run", pretrain=steps(3.0))
    assert main(["plot", run, "--output", str(tmp_path / "loss.png")]) == 2
    assert len(caplog.records) == 1 and "matplotlib is not installed (pip install 'fastkd[plots]')" in caplog.text
    assert capsys.readouterr().out == "" and not (tmp_path / "loss.png").exists()


def test_perplexities_say_what_they_are_over(tmp_path, drawn):
    lines = {"mapped": "352 slots of 700 ids", "other": "352 slots of 700 ids", "whole": "all 700 ids"}
    runs = {
        name: write_run(tmp_path / name, pretrain=[{"step": 1, "eval_perplexity": 9.0, "eval_events": over}])
        for name, over in lines.items()
    }
    assert main(["plot", runs["mapped"], runs["other"], "--key", "eval_perplexity"]) == 0
    assert drawn[0]["ylabel"] == "perplexity over 352 slots of 700 ids" and list(drawn[0]["series"]) == [runs["mapped"], runs["other"]]
    assert main(["plot", runs["mapped"], runs["whole"], "--key", "eval_perplexity"]) == 0
    assert drawn[1]["ylabel"] == "perplexity"
    assert list(drawn[1]["series"]) == [
        f"{runs['mapped']}, perplexity over 352 slots of 700 ids",
        f"{runs['whole']}, perplexity over all 700 ids",
    ]


def test_a_run_has_one_colour_whatever_the_key(tmp_path, drawn):
    judged = write_run(tmp_path / "judged", pretrain=[*steps(3.0), {"step": 1, "eval_accuracy": 0.5}])
    other = write_run(tmp_path / "other", pretrain=steps(4.0))
    assert main(["plot", other, judged]) == 0 and main(["plot", other, judged, "--key", "eval_accuracy"]) == 0
    assert drawn[0]["places"] == {other: 0, judged: 1} and drawn[1]["places"] == {judged: 1}
