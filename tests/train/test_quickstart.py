"""The quickstart in miniature: every field of results.json, one initialisation for all students, and the YAML it prints."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from fastkd.cli.main import main
from fastkd.models.load import load_frozen, load_language_model, load_tokenizer
from fastkd.tasks import stdlib
from fastkd.train import quickstart
from fastkd.train.config import read_config
from fastkd.train.run_models import RunModels

FIELDS = {
    "method",
    "seed",
    "seconds",
    "metric",
    "higher_is_better",
    "teacher",
    "student_alone",
    "student_kd",
    "student_distilled",
    "teacher_parameters",
    "student_parameters",
    "teacher_vocab",
    "student_vocab",
    "student_dir",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A few files, a few steps."""
    patch = pytest.MonkeyPatch()
    whole = {split: stdlib.stdlib_files(split) for split in stdlib.SPLITS}
    patch.setattr(stdlib, "stdlib_files", lambda split: whole[split][:8])
    sizes = {"VOCABULARY": 768, "LENGTH": 32, "TEACHER_STEPS": 6, "STUDENT_STEPS": 8, "STUDENT_DOCUMENTS": 4, "TEST_ROWS": 20}
    for name, value in sizes.items():
        patch.setattr(quickstart, name, value)
    output_dir = tmp_path_factory.mktemp("quickstart")
    results = quickstart.quickstart(output_dir, seed=3)
    yield output_dir, results
    patch.undo()


def test_results(finished):
    output_dir, results = finished
    assert set(results) >= FIELDS
    assert (
        results
        == json.loads((output_dir / "results.json").read_text())
        == json.loads((output_dir / "seed-3" / "results.json").read_text())
    )
    assert results["seed"] == 3 and results["higher_is_better"] is False
    assert results["student_vocab"] * 2 <= results["teacher_vocab"] == 768
    assert results["student_parameters"] < results["teacher_parameters"]
    for row in ("teacher", *quickstart.STUDENTS, *quickstart.EQUAL_TIME):
        assert 1.0 < results[row] < 5000.0
    steps, seconds = results["steps"], results["train_seconds"]
    for name, like in quickstart.EQUAL_TIME.items():
        assert steps[like] == 8 and steps[name] == max(1, round(8 * seconds["student_distilled"] / seconds[like]))
    with (output_dir / "seed-3" / "distil.yaml").open() as file:
        assert read_config(yaml.safe_load(file)) == quickstart.glmd_config(output_dir, 3)
    assert (output_dir / "seed-3" / "curves.png").read_bytes().startswith(b"\x89PNG")
    student = load_language_model(results["student_dir"])
    assert student.vocabulary == results["student_vocab"]


def test_all_students_start_from_the_same_weights(finished):
    output_dir, _ = finished
    teacher = load_frozen(quickstart._teacher_dir(output_dir))
    states = []
    for name in (*quickstart.STUDENTS, *quickstart.EQUAL_TIME):
        config = quickstart._student_config(output_dir, 3, name, 8)
        models = RunModels(config, output_dir / "seed-3" / name, output_dir / "cache", load_tokenizer(str(output_dir / "tokenizer")))
        states.append(models._first_student(teacher, config).state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_a_second_call_keeps_the_teacher_and_the_students(finished):
    output_dir, results = finished
    weights = output_dir / "teacher" / "train" / "student" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = quickstart.quickstart(output_dir, seed=3)
    assert weights.stat().st_mtime_ns == before
    assert {k: again[k] for k in quickstart.STUDENTS} == {k: results[k] for k in quickstart.STUDENTS}


def test_what_is_shown_fits_80_columns(finished, capsys, monkeypatch):
    output_dir, results = finished
    monkeypatch.setattr(quickstart, "quickstart", lambda *_: results)
    assert main(["quickstart", "--output_dir", str(output_dir), "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if str(output_dir) not in line]
    assert len(lines) > 12 and max(map(len, lines)) <= 80
    generate = f"generate {results['student_dir']} 'def read_file('"
    assert shown.endswith(f"Next:\n  fastkd {generate}\n  fastkd train {output_dir}/seed-3/distil.yaml --output_dir runs/mine\n")
    assert results["events"] == f"{results['student_vocab']} slots of 768 ids" and f"over {results['events']}" in shown
    for name in ("teacher", *quickstart.STUDENTS, *quickstart.EQUAL_TIME):
        assert f"{results[name]:.1f}" in shown and f"{results['kept_tokens_only'][name]:.1f}" in shown
    assert f"{results['student_parameters']:,} parameters, and a vocabulary of {results['student_vocab']:,}" in shown


def test_the_printed_config_is_the_run(finished, capsys):
    output_dir, _ = finished
    assert main(["quickstart", "--output_dir", str(output_dir), "--seed", "3", "--print_config"]) == 0
    shown = capsys.readouterr().out
    printed = yaml.safe_load(shown)
    assert read_config(printed) == quickstart.glmd_config(output_dir, 3) and "gradient_accumulation_steps" not in shown
    assert main(["quickstart", "--output_dir", str(output_dir), "--seed", "3", "--print_config", "--all"]) == 0
    whole = capsys.readouterr().out
    assert read_config(yaml.safe_load(whole)) == read_config(printed) and "gradient_accumulation_steps: 1" in whole
    assert printed["method"] == "glmd" and printed["options"] == {"temperature": 1.0, "teacher_mass": "slots"}
