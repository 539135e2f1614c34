"""The quickstart of CR-ILD and TED in miniature: what results.json holds, one initialisation for all students, the YAML it prints."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from fastkd.cli.main import main
from fastkd.models.load import load_tokenizer
from fastkd.models.task_model import TaskHead
from fastkd.tasks import stdlib
from fastkd.tasks.corpus import open_corpus
from fastkd.train import task_quickstart as quickstart
from fastkd.train.config import read_config
from fastkd.train.run_models import RunModels
from tests.train.test_quickstart import FIELDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer made of a few files, and a few steps."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("task-quickstart")
    (folder / "few.txt").write_text("\n".join(file.read_text() for file in stdlib.stdlib_files("train")[:8]))
    few = open_corpus(folder / "few.txt", documents="line")
    patch.setattr("fastkd.train.quickstart.open_corpus", lambda path: few)
    small = {"VOCABULARY": 600, "LENGTH": 16, "FEW_SAMPLE": 32, "TEACHER_EPOCHS": 0.05, "STUDENT_EPOCHS": 2.0, "EVAL_STEPS": 1}
    for name, value in small.items():
        patch.setattr(quickstart, name, value)
    yield folder
    patch.undo()


@pytest.mark.parametrize("method", ["crild", "ted"])
def test_results(folder, method, capsys, monkeypatch):
    drawn, draw = {}, quickstart.plot_curves
    monkeypatch.setattr(quickstart, "plot_curves", lambda series, *place, **more: drawn.update(series) or draw(series, *place, **more))
    assert main(["quickstart", "--method", method, "--seed", "3", "--output_dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert results == json.loads((folder / f"{method}-seed-3" / "results.json").read_text())
    assert set(results) >= FIELDS
    assert results["method"] == method and results["seed"] == 3 and results["higher_is_better"] is True
    assert results["student_parameters"] < results["teacher_parameters"] and results["student_vocab"] == results["teacher_vocab"] == 600
    for row in ("teacher", *quickstart.STUDENTS, *quickstart.EQUAL_TIME):
        assert 0 < results[row] < 1 and f"{results[row]:.1%}" in shown
    assert results["steps"]["student_alone_equal_time"] >= results["steps"]["student_alone"] == 2
    assert (folder / f"{method}-seed-3" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert results["student_dir"] in shown
    assert max(len(line) for line in shown.splitlines() if str(folder) not in line) <= 80
    made = folder / f"{method}-seed-3" / "student_distilled"
    stages = list(quickstart.student_config(folder, method, 3).stages)
    steps = [json.loads((made / stage / "result.json").read_text())["steps"] for stage in stages]
    at = [step for step, _ in drawn[quickstart.TITLES[method]]]
    assert at == sorted(set(at)) and at[-1] == sum(steps) == results["steps"]["student_distilled"]
    before_last = sum(steps[:-1])
    assert before_last > 0 and sum(step > before_last for step in at) == steps[-1]


def test_all_students_start_from_the_same_weights(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    states = []
    for name in (*quickstart.STUDENTS, *quickstart.EQUAL_TIME):
        config = quickstart.student_config(folder, "ted", 3, name)
        models = RunModels(config, folder / "nowhere", folder / "cache", tokenizer)
        states.append(models._first_task_student(config, TaskHead("classification", 8)).state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


@pytest.mark.parametrize("method", ["crild", "ted"])
def test_the_printed_config_is_the_run(folder, method, capsys):
    assert main(["quickstart", "--method", method, "--output_dir", str(folder), "--seed", "3", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert read_config(printed) == quickstart.student_config(folder, method, 3)
    assert printed["method"] == method and list(printed["stages"])[-1] == ("kd" if method == "crild" else "distill")
