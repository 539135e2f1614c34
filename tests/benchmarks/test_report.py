"""Tables and plots come from the JSON alone, name their environment, and say what was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastkd.benchmarks.report import BEGIN, END, SECTIONS, main, page, read_records, readme_table, with_table

ROOT = Path(__file__).parent.parent.parent


def seconds(median: float) -> dict:
    return {"rounds": 5, "median": median, "minimum": median, "maximum": median, "lower_quartile": median, "upper_quartile": median}


def record(claim: str, device: str = "cpu", **measured) -> dict:
    name = "Some CPU AVX2" if device == "cpu" else "Some GPU"
    stamp = {
        "device": name,
        "threads": 2,
        "python": "3.12.1",
        "versions": {"torch": "2.13.0"},
        "commit": "abc1234",
        "time": "2030-01-02T03:04",
    }
    return {"claim": claim, "device": device, "smoke": False, "repeats": 5, "environment": stamp, **measured}


def linear_kl(device: str = "cpu") -> dict:
    shape = {"tokens": 4096, "vocabulary": 30522, "student_width": 384, "teacher_width": 768}
    errors = [{"kl": 4.1e-4, "student": 2.1e-3, "head": 2.4e-3}, {"kl": 3e-2, "student": 1e-3, "head": 9e-4}]
    dtype = "float32" if device == "cpu" else "bfloat16"
    results = [
        {"implementation": "GEMMs alone", "dtype": dtype, "seconds": seconds(2.0), "ratio_to_gemms": 1.0, "peak_bytes": 64e6},
        {"implementation": "fastkd cpp", "dtype": dtype, "seconds": seconds(2.2), "ratio_to_gemms": 1.1, "peak_bytes": 123.4e6},
        {"implementation": "Peer", "dtype": dtype, "seconds": seconds(9.0), "ratio_to_gemms": 4.5, "peak_bytes": None},
    ]
    for row, known in zip(results, (None, errors, errors), strict=True):
        row["gradient_error"] = known
    return record("linear_kl", device, shape=shape, results=results, left_out={"TRL chunked divergence": "trl is not installed"})


def others() -> list[dict]:
    scaling = [{"tokens": n, "seconds": seconds(n / 1e3), "microseconds_per_token": 1e3, "peak_bytes": 5e6} for n in (1024, 2048)]
    gradients = {"student_error": 1e-2, "head_error": 2e-2, "student_cosine": 0.99995, "head_cosine": 0.9999}
    filtered = {"threshold": 2.0**-12, "seconds": seconds(1.5), "ratio_to_gemms": 0.75, "columns_kept": 0.25, "dropped_mass": 1e-3}
    judged = {"implementation": "fastkd cpp", "dtype": "float32", "kl": 1e-4, "value": None, "student": 1e-5, "head": 2e-5}
    return [
        record(
            "scaling",
            results=scaling,
            large_vocabulary={"shape": {"tokens": 1024, "vocabulary": 262144}, "peak_bytes": None},
        ),
        record("grad_filter", floor=seconds(2.0), unfiltered=seconds(2.2) | {"ratio_to_gemms": 1.1}, results=[filtered | gradients]),
        record("accuracy", results=[judged, {**judged, "kl": 1.0}], left_out={}),
        record("relation_kl", results=[{"targets": n, **row} for n in (1, 3) for row in beside_eager("q", "k")], left_out={}),
        record("projected_mse", results=beside_eager("states", "bias")[1:], left_out={"eager": "the process was killed"}),
        record("train_throughput", results=[train_throughput()], profile=PROFILE),
    ]


PROFILE = {"case": "kd", "steps": 6, "sections": {"optimizer": {"seconds_per_step": 0.02, "share": 0.0123}}}


def train_throughput() -> dict:
    ours, theirs = (
        {"implementation": name, "tokens_per_second": speed, "peak_bytes": peak, "peak_bytes_above": peak - 4e8, "losses": [2.0, 1.25]}
        for name, speed, peak in (("fastkd", 3000.0, 6e8), ("Trainer", 1000.0, 24e8))
    )
    compared = {"speedup": 3.0, "peak_ratio": 0.25, "peak_ratio_above": 0.1, "loss_difference": 2e-6}
    return {"title": "KD", "sides": [ours, theirs], **compared}


def beside_eager(*gradients: str) -> list[dict]:
    errors = {"value": 1e-7, **dict.fromkeys(gradients, 3e-7)}
    eager = {"implementation": "eager", "seconds": seconds(8.0), "ratio_to_gemms": 4.0, "ratio_to_eager": 1.0, "peak_bytes": 2e9}
    ours = {"implementation": "fastkd", "seconds": seconds(3.0), "ratio_to_gemms": 1.5, "ratio_to_eager": 0.375, "peak_bytes": 5e7}
    floor = {"implementation": "GEMMs alone", "seconds": seconds(2.0), "ratio_to_gemms": 1.0, "ratio_to_eager": 0.25, "peak_bytes": 2e7}
    return [{**eager, "errors": errors}, {**floor, "errors": None}, {**ours, "errors": errors}]


@pytest.fixture
def folder(tmp_path):
    for made in [linear_kl(), *others()]:
        (tmp_path / f"{made['claim']}_cpu.json").write_text(json.dumps(made))
    (tmp_path / "quickstart_seed0.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold table\n{END}\nafter\n")
    return tmp_path


def report(folder: Path) -> int:
    return main(["--results", str(folder), "--docs", str(folder / "docs"), "--readme", str(folder / "README.md")])


def test_everything_is_written(folder):
    assert report(folder) == 0
    text = (folder / "docs" / "benchmarks.md").read_text()
    assert "| fastkd cpp | 2.2 | 1.10 | 123 | 2.4e-03 | 1.0e-03 |\n" in text
    assert "| Peer | 9 | 4.50 | not measured | 2.4e-03 | 1.0e-03 |\n" in text
    assert "| TRL chunked divergence (trl is not installed) | not measured | not measured |" in text
    assert "Some CPU AVX2, 2 threads, Python 3.12.1, torch 2.13.0, commit abc1234, 2030-01-02; tokens 4096" in text
    assert "| 2.44e-04 | 25.0% | 1.5 | 0.75 | 1.0e-03 |" in text
    assert "tokens 1024, vocabulary 262144: peak not measured MB" in text
    assert all(f"## {name}\n\n{sentence}" in text for name, sentence in SECTIONS.items())
    for head in ("| targets: 1 | seconds |", "| targets: 3 | seconds |"):
        assert head in text
    assert text.count("| fastkd | 3 | 1.50 | 0.38 | 50 | 0.025 | 1.0e-07 | 3.0e-07 | 3.0e-07 |\n") == 2
    assert text.count("| GEMMs alone | 2 | 1.00 | 0.25 | 20 | 0.010 |  |  |  |\n") == 2
    assert "of eager's peak | error, value | error, states | error, bias |\n" in text
    assert "| fastkd | 3 | 1.50 | 0.38 | 50 | not measured | 1.0e-07 | 3.0e-07 | 3.0e-07 |\n" in text
    assert "| eager (the process was killed) | not measured |" in text
    assert "| KD | fastkd | 3000 | 3.00 | 600 | 0.25 | 200 | 0.10 | 1.25 | 2.0e-06 |\n" in text
    assert "|  | Trainer | 1000 |  | 2400 |  | 2000 |  | 1.25 |  |\n" in text
    assert "in case `kd`" in text and "| optimizer | 20.0 | 1.2 |\n" in text
    # Nothing was measured on a GPU, and on the CPU seven claims.
    assert text.count("not measured.\n") == len(SECTIONS) + len(SECTIONS) - 7
    for name in ("linear_kl_cpu", "scaling_cpu", "grad_filter_cpu", "accuracy_cpu"):
        assert (folder / "docs" / "img" / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"(img/{name}.png)" in text
    readme = (folder / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith(f"{END}\nafter\n") and "old table" not in readme
    assert "| fastkd cpp | 1.10 | 123 | 2.4e-03 | not measured |" in readme
    assert "| Peer | 4.50 | not measured | 2.4e-03 | not measured |" in readme


def test_a_report_of_the_same_files_changes_nothing(folder):
    assert report(folder) == 0
    first = {path: path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".png"}
    assert report(folder) == 0
    assert first == {path: path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".png"}


def test_both_devices_stand_side_by_side():
    table = readme_table([linear_kl(), linear_kl("cuda")])
    assert "| CPU, float32: x GEMMs alone | peak MB | gradient error | Some GPU, bfloat16: x GEMMs alone | peak MB |" in table
    assert "| fastkd cpp | 1.10 | 123 | 2.4e-03 | 1.10 | 123 | 2.4e-03 |" in table and "NVIDIA GPU" not in table


@pytest.mark.parametrize("change", [{"smoke": True}, {"claim": "linear"}])
def test_what_is_no_measurement_is_refused(folder, change, capsys):
    (folder / "linear_kl_cpu.json").write_text(json.dumps({**linear_kl(), **change}))
    assert report(folder) == 2
    assert "linear_kl_cpu.json is not a measurement" in capsys.readouterr().err and not (folder / "docs").exists()


def test_a_readme_without_the_comments_is_refused_before_anything_is_written(folder, capsys):
    (folder / "README.md").write_text("no table here\n")
    assert report(folder) == 2
    assert "lacks the two lines" in capsys.readouterr().err and not (folder / "docs").exists()


def test_the_documents_are_those_of_the_results():
    """`fastkd bench report` is due whenever a result changes."""
    records = read_records(ROOT / "benchmarks" / "results")
    images = {path.name for path in (ROOT / "docs" / "img").glob("*.png")}
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page(records, images), "run `fastkd bench report`"
    readme = (ROOT / "README.md").read_text()
    assert with_table(readme, readme_table(records["linear_kl"]), ROOT / "README.md") == readme, "run `fastkd bench report`"
