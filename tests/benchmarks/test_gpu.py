"""The GPU proof: its stages run by themselves, here on the CPU; one that hangs, crashes or is wrong costs its own rows alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastkd.benchmarks import gpu
from fastkd.benchmarks.gpu import Stage, run_all

RIGHT = """
import json, sys
rows = open(sys.argv[1], "a")
print(json.dumps({"check": "one", "passed": True}), file=rows)
"""
PROGRAMS = {
    "checks right": RIGHT,
    "checks wrong": RIGHT.replace("True", "False"),
    "checks hangs": RIGHT + 'rows.write(\'{"check": "tw\'); rows.flush()\nimport time; time.sleep(600)',
    "checks crashes": RIGHT + "rows.flush()\nimport os; os.abort()",
    "claim": RIGHT + "print('without', sys.argv[2:])",
}


def run(folder: Path, *names: str, limit: float = 60.0, deadline: float = 60.0) -> tuple[bool, dict[str, dict]]:
    def command(stage: Stage, rows: Path, wrong: list[str]) -> list[str] | str:
        known = PROGRAMS.get(stage.name)
        return "there is no such tool" if known is None else [sys.executable, "-c", known, str(rows), *wrong]

    passed = run_all([Stage(name, limit) for name in names], command, folder / "gpu.json", deadline)
    report = json.loads((folder / "gpu.json").read_text())
    return passed, {row["stage"]: row for row in report["stages"]}


def test_stages_that_are_right_pass_and_their_rows_are_kept(tmp_path):
    passed, rows = run(tmp_path, "checks right", "claim")
    assert passed and rows["checks right"]["passed"] and rows["claim"]["rows"] == [{"check": "one", "passed": True}]
    assert rows["claim"]["output"] == "without []\n"


@pytest.mark.parametrize(("name", "ended"), [("wrong", "0"), ("crashes", "-6"), ("hangs", "killed after 2 s")])
def test_a_backend_that_fails_keeps_its_rows_and_is_timed_by_nobody(tmp_path, name, ended):
    passed, rows = run(tmp_path, f"checks {name}", "claim", limit=2.0)
    assert not passed and not rows[f"checks {name}"]["passed"]
    assert rows[f"checks {name}"]["ended"] == ended and [row["check"] for row in rows[f"checks {name}"]["rows"]] == ["one"]
    assert rows["claim"]["ended"] == "0" and rows["claim"]["output"] == f"without ['{name}']\n"


def test_what_cannot_be_run_or_has_no_time_left_is_named_and_no_failure(tmp_path):
    passed, rows = run(tmp_path, "claim", "tool", deadline=0.0)
    assert passed
    assert rows["claim"]["ended"] == "not measured: the time is up"
    assert rows["tool"]["ended"] == "not measured: there is no such tool"


def test_the_report_is_whole_after_every_stage(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("builtins.print", lambda *_, **__: seen.append(len(read())) if (tmp_path / "gpu.json").is_file() else None)

    def read() -> list[dict]:
        return json.loads((tmp_path / "gpu.json").read_text())["stages"]

    run(tmp_path, "claim", "checks right", "claim")
    assert seen == [1, 2] and len(read()) == 3


def test_the_whole_proof_on_tiny_shapes(tmp_path, capfd):
    """Every stage's own process, from the checkout, on the CPU: all claims and both backends' checks."""
    assert gpu.main(["--smoke", "--device", "cpu", "--output", str(tmp_path)]) == 0, capfd.readouterr().out
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["stage"] for row in report["stages"]] == ["checks torch", "checks cpp", *gpu.CLAIMS]
    assert report["wrong_backends"] == [] and all(row["ended"] == "0" and row["rows"] for row in report["stages"])
    claims = {row["stage"]: row["rows"][0] for row in report["stages"] if not row["stage"].startswith("checks")}
    assert all(record["environment"]["versions"]["torch"] for record in claims.values())
