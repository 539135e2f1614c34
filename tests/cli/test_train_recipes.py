"""`fastkd train` with a recipe's name: which file it means, what it refuses, and that a recipe of each method runs as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastkd.cli.main import main
from fastkd.recipes import FOLDER, config_path, recipe_titles
from fastkd.train.config import read_config
from fastkd.train.schema import load_yaml
from tests import runs, tiny


def test_a_name_is_a_recipe(capsys):
    assert config_path("ted/rte") == FOLDER / "ted" / "rte.yaml"
    assert main(["train", "ted/rte", "--print_config", "--output_dir", "mine"]) == 0
    shown = capsys.readouterr().out
    assert "output_dir: mine" in shown and "mse_alpha: 50" in shown


def test_a_file_goes_before_a_recipe(tmp_path, monkeypatch, capsys):
    (tmp_path / "ted").mkdir()
    (tmp_path / "ted" / "rte").write_text("{method: lm, output_dir: runs/of-the-file, student: {num_hidden_layers: 1}}")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "ted/rte", "--print_config"]) == 0
    assert "output_dir: runs/of-the-file" in capsys.readouterr().out
    assert main(["train", "ted/cola", "--print_config"]) == 0
    assert "output_dir: runs/ted-cola" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ted/rtf", "glue", "ted/../ted/rte", ""])
def test_an_unknown_name_is_refused_with_all_recipes(name, capsys):
    assert main(["train", name]) == 2
    error = capsys.readouterr().err
    assert f"fastkd train: {name!r} is neither a file nor a recipe" in error and ", ".join(recipe_titles()) in error
    assert ("did you mean ted/rte?" in error) == (name == "ted/rtf" or ".." in name)


def test_a_yaml_file_that_is_not_there_is_no_recipe(capsys):
    assert main(["train", "ted/rte.yaml"]) == 2
    assert "ted/rte.yaml cannot be read" in capsys.readouterr().err


def test_a_recipe_is_listed_as_it_is_written(capsys):
    assert main(["train", "--list", "ted/rte"]) == 0
    assert capsys.readouterr().out == (FOLDER / "ted" / "rte.yaml").read_text(encoding="utf-8")
    assert main(["train", "--list", "ted/rtf"]) == 2
    assert "did you mean ted/rte?" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipe_titles())
def test_what_differs_from_the_defaults_is_the_same_run(name, tmp_path, capsys):
    shown = {}
    for flag in ("--print_config", "--all"):
        assert main(["train", name, "--print_config", *{flag} - {"--print_config"}]) == 0
        shown[flag] = capsys.readouterr().out
        (tmp_path / "printed.yaml").write_text(shown[flag])
        assert read_config(load_yaml(tmp_path / "printed.yaml")) == read_config(load_yaml(config_path(name)))
    assert shown["--print_config"].count("\n") < 100 < shown["--all"].count("\n")
    assert "logging_steps" not in shown["--print_config"] and "logging_steps: 10" in shown["--all"]


def test_all_without_print_config_is_refused(capsys):
    assert main(["train", "ted/rte", "--all"]) == 2
    assert "--all is of --print_config, which is not given" in capsys.readouterr().err


def test_a_file_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").write_text("{}")
    assert config_path("~/run") == tmp_path / "run"


def test_list(capsys):
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(recipe_titles())
    assert next(line for line in lines if line.startswith("ted/rte ")).split(maxsplit=1)[1].startswith("TED on RTE: DeBERTaV3-base")


# ---- recipes run


@pytest.fixture
def rte(tmp_path: Path) -> str:
    """A folder like the hub's of GLUE, and of SuperGLUE, with RTE alone; a column of either for every text."""
    lines = [line[:60] for line in tiny.lines()[:48]]
    columns = ("sentence1", "sentence2", "premise", "hypothesis")
    (tmp_path / "data" / "rte").mkdir(parents=True)
    for split, own in (("train", lines[:32]), ("validation", lines[32:])):
        rows = [{**dict.fromkeys(columns, line), "label": number % 2} for number, line in enumerate(own)]
        (tmp_path / "data" / "rte" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "data")


def run(tmp_path: Path, name: str, **flags: object) -> list[str]:
    """The stages that a recipe ran, two steps of each."""
    values = {"output_dir": tmp_path / "run", "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, **flags}
    assert main(["train", name, *(word for key, value in values.items() for word in (f"--{key}", str(value)))]) == 0
    return [stage for stage in read_config(load_yaml(config_path(name))).stages if (tmp_path / "run" / stage / "result.json").is_file()]


def models(tmp_path: Path, name: str, layers: int, **student: int) -> dict[str, str]:
    """Teacher and student, without heads."""
    tokenizer = tiny.wordpiece()
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "max_position_embeddings": 128}
    made = {"teacher_model_name_or_path": sizes, "model_name_or_path": {**sizes, **student}}
    return {key: tiny.save(tmp_path / key, tiny.transformer(name, "", **settings), tokenizer) for key, settings in made.items()}


def test_ted_rte_runs(tmp_path, rte, capsys):
    flags = {**models(tmp_path, "deberta-v3", 2, hidden_size=16), "dataset.path": rte}
    models_and_filters = ("teacher", "student", "filters", "filters", "student")
    made = dict(zip(("teacher", "student", "teacher_filters", "student_filters", "distill"), models_and_filters, strict=True))
    assert run(tmp_path, "ted/rte", **flags) == list(made)
    shown = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2 : 2 + len(made)]]
    assert shown == [str(tmp_path / "run" / stage / folder) for stage, folder in made.items()]


def test_crild_rte_runs(tmp_path, rte):
    flags = {**models(tmp_path, "bert", 12), "dataset.path": rte}
    assert run(tmp_path, "crild/rte", **flags) == ["teacher", "ild", "kd"]
    assert json.loads((tmp_path / "run" / "kd" / "student" / "config.json").read_text())["num_hidden_layers"] == 6


def test_glmd_pretrain_then_rte_run(tmp_path, rte):
    teacher, text = runs.bert_teacher(tmp_path), runs.write_text(tmp_path)
    pretrain = tmp_path / "pretrain"
    flags = {"output_dir": pretrain, "teacher_model_name_or_path": teacher, "vocabulary.multiple_of": 8, "student.num_hidden_layers": 1}
    corpus = {"text.path": text["path"], "text.name": "null", "text.max_length": 32}
    run(tmp_path, "glmd/pretrain", **flags, **corpus)
    words = {"teacher_model_name_or_path": teacher, "task.cloze.label_words": "if,for", "task.cloze.max_length": 64}
    student = {"model_name_or_path": pretrain / "pretrain" / "student"}
    data = {"task.path": f"{rte}/rte/train.jsonl", "task.name": "null", "task.eval_path": f"{rte}/rte/validation.jsonl"}
    assert run(tmp_path, "glmd/rte", **words, **student, **data) == ["task_words", "task_scores"]
