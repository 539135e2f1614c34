"""The GPU proof: a stage that hangs or crashes costs its own rows alone, the file is whole after every row, time has an end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from fastkd.benchmarks import claim, gpu, gpu_stages, stages
from fastkd.benchmarks.stages import TIME_IS_UP, Stage, run_stages

ROOT = Path(__file__).parent.parent.parent
FAR = 1e9
"""Seconds: no deadline."""


def stage(name, script, limit=30.0, **options):
    """A stage whose process runs `script`, in which `row(...)` writes a row."""
    start = "import json, os, sys, time\ndef row(**x): print(json.dumps(x), file=file, flush=True)\nfile = open(sys.argv[1], 'a')\n"
    return Stage(name, [sys.executable, "-S", "-c", start + script], limit, **options)


@pytest.fixture
def run(tmp_path):
    """Run stages; return whether no check failed, and the record."""
    path = tmp_path / "gpu.json"

    def run_and_read(*given, seconds=FAR):
        passed = run_stages(given, path, {"claim": "gpu"}, time.monotonic() + seconds)
        return passed, json.loads(path.read_text())

    return run_and_read


GOOD = stage("good", "row(a=1); row(a=2)")


def test_rows_follow_one_another(run):
    passed, record = run(GOOD)
    assert passed and record["claim"] == "gpu" and record["not_measured"] == {}
    assert record["stages"]["good"]["rows"] == [{"a": 1}, {"a": 2}] and record["stages"]["good"]["ended"] is None


def test_a_stage_that_hangs_is_killed_at_its_limit_with_what_it_has_started(run, tmp_path):
    child = tmp_path / "child"
    script = f"row(a=0)\nif os.fork() == 0: open({str(child)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    passed, record = run(stage("hangs", script, limit=2.0), GOOD)
    assert passed and record["stages"]["hangs"]["rows"] == [{"a": 0}]
    assert record["stages"]["hangs"]["ended"] == "was killed after 2 s"
    assert record["stages"]["good"]["rows"] == [{"a": 1}, {"a": 2}]
    assert not is_alive(int(child.read_text()))


def is_alive(pid):
    """Whether the process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stage_that_crashes_is_named_with_its_last_words_and_its_torn_row_is_left_out(run):
    script = "row(a=0); file.write('{\"torn'); file.flush(); print('before'); sys.exit('no such kernel')"
    passed, record = run(stage("crashes", script), stage("aborts", "os.abort()"), GOOD)
    assert passed and record["stages"]["crashes"]["rows"] == [{"a": 0}]
    assert record["stages"]["crashes"]["ended"] == "ended with status 1: no such kernel"
    assert "before" in record["stages"]["crashes"]["log"]
    assert record["stages"]["aborts"]["ended"].startswith("ended with status -6")
    assert record["stages"]["good"]["rows"] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("script", ["row(passed=True); row(passed=False)", "row(passed=True); os.abort()"], ids=["fails", "crashes"])
def test_a_check_that_fails_or_crashes_fails_the_whole(run, script):
    assert not run(stage("check", script, is_check=True), GOOD)[0]
    assert run(stage("check", "row(passed=True)", is_check=True), GOOD)[0]


def test_a_check_that_hangs_fails_unless_the_deadline_cut_it_short(run, monkeypatch):
    monkeypatch.setattr(stages, "_LEAST_SECONDS", 0.0)
    hangs = stage("check", "time.sleep(600)", limit=0.5, is_check=True)
    assert not run(hangs)[0]
    assert run(hangs, seconds=0.2)[0]


def test_a_check_that_crashes_fails_however_little_time_is_left(run):
    passed, record = run(stage("check", "os.abort()", limit=60.0, is_check=True), seconds=30.0)
    assert not passed and record["passed"] is False


def test_the_file_is_whole_after_every_row(tmp_path, monkeypatch):
    seen, write = [], stages.write_json_atomic

    def write_and_read(path, record):
        write(path, record)
        seen.append(sum(len(stage["rows"]) for stage in json.loads(path.read_text())["stages"].values()))

    monkeypatch.setattr(stages, "write_json_atomic", write_and_read)
    run_stages([GOOD, stage("crashes", "row(a=3); os.abort()")], tmp_path / "gpu.json", {}, time.monotonic() + FAR)
    assert seen == [1, 2, 2, 3, 3]


def test_what_is_not_begun_says_why(run):
    passed, record = run(stage("absent", "", why_not="there is no nvcc"), GOOD, seconds=stages._LEAST_SECONDS / 2)
    assert passed and record["stages"] == {}
    assert record["not_measured"] == {"absent": "there is no nvcc", "good": TIME_IS_UP}


def test_on_a_gpu_every_backend_has_its_own_processes_and_what_is_absent_is_named(tmp_path, monkeypatch):
    settings = claim.Settings(torch.device("cuda"), 1, 1.0, smoke=False, output=tmp_path, pair=None)
    monkeypatch.setattr(gpu_stages, "find_sanitizer", lambda: None)
    found = {stage.name: stage for stage in gpu._stages(settings, {"cuda": "this is no Hopper GPU"})}
    assert list(found)[:3] == ["checks: torch", "checks: triton", "checks: cuda"] and list(found)[-1] == "peer: torch.compile of eager"
    assert [name for name, stage in found.items() if stage.is_check] == list(found)[:3]
    for work in gpu.MEASURED:
        assert not found[f"{work}: triton"].why_not and found[f"{work}: cuda"].why_not == "this is no Hopper GPU"
    assert "not on PATH" in found["sanitizer: racecheck triton"].why_not
    assert found["peer: unsloth_zoo fused_linear_jsd"].why_not == "unsloth-zoo is not installed"
    assert sum(stage.limit for stage in found.values() if stage.name.startswith("checks")) <= gpu.LIMIT


def test_a_sanitizers_exit_code_decides(tmp_path, monkeypatch):
    settings = claim.Settings(torch.device("cpu"), 1, 1.0, smoke=True, output=tmp_path, pair=None)
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(gpu_stages, "find_sanitizer", lambda: str(tool))
    for code in (0, 99):
        tool.write_text(f'#!/bin/sh\necho "$@"\necho "========= ERROR SUMMARY: {code} errors"\nexit {code}\n')
        tool.chmod(0o755)
        [row] = gpu_stages.sanitized(settings, "memcheck triton")
        assert row == {"check": "memcheck triton", "passed": code == 0, "seen": f"========= ERROR SUMMARY: {code} errors"}


def test_a_smoke_run_measures_everything_that_a_cpu_has(tmp_path):
    assert gpu.main(["--smoke", "--device", "cpu", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert record["environment"]["versions"]["torch"] == torch.__version__ and record["smoke"] is True
    for name, measured in record["stages"].items():
        if not name.startswith("peer: ") or name == "peer: eager":  # what else is installed here may be of any version
            assert measured["rows"] and measured["ended"] is None, name
    assert {f"{work}: torch" for work in gpu.MEASURED} | {"peer: eager"} <= record["stages"].keys()
    for row in record["stages"]["linear_kl: torch"]["rows"]:
        assert row["ratio_to_gemms"] > 0 and ("plan" in row) == (row["implementation"] in gpu_stages.PLANS)


def test_it_runs_where_nothing_is_installed(tmp_path):
    """-S: no editable install, only the checkout and the packages it needs."""
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    program = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--device", "cpu", "--output", str(tmp_path)]
    command = [*program, "--stage", "row kernel: torch", str(tmp_path / "rows")]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(json.loads(line)["share_of_copy"] > 0 for line in (tmp_path / "rows").read_text().splitlines())
