"""What every command says at its end: the commands that may come next are run as they are printed, places and all."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastkd.benchmarks import claim
from fastkd.cli.main import main
from fastkd.cli.next import PROMPT
from tests import runs
from tests.cli.test_main import write_config


def next_commands(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """Run a command; return the words of the commands that it ends with."""
    assert main(list(words)) == 0
    *_, lines = capsys.readouterr().out.partition("Next:\n")
    commands = [shlex.split(line) for line in lines.splitlines()]
    assert commands and all(command[0] == "fastkd" for command in commands)
    return [command[1:] for command in commands]


def kd(folder: Path, teacher: str, **more: Any) -> str:
    return write_config(
        folder,
        runs.settings(folder, **{"method": "kd", "teacher_model_name_or_path": teacher, "text": runs.write_text(folder), **more}),
    )


def test_after_a_run_its_student_is_judged_exported_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder whose name a shell has to be given in quotes."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    teacher = runs.llama_teacher(folder)
    path = kd(folder, teacher, vocabulary={"keep": 0.5, "multiple_of": 8})
    student = str(folder / "run" / "distill" / "student")
    judge, export, generate = next_commands(capsys, "train", path)
    text = ["--text", str(folder / "dev.txt"), "--documents", "line", "--max_length", "32"]
    assert judge == ["eval", student, "--teacher", teacher, *text]
    assert export == ["export", student, "--output_dir", f"{student}-exported"] and generate == ["generate", student, PROMPT]
    results = str(folder / "judged")
    assert next_commands(capsys, *judge, "--output_dir", results, "--use_cpu") == [[*export, "--results", f"{results}/results.json"]]
    assert main(judge) == 0
    assert "Nothing was written; --output_dir DIR keeps the scores and draws them.\n" in capsys.readouterr().out
    used = next_commands(capsys, *export, "--results", f"{results}/results.json")
    assert used == [["generate", f"{student}-exported", PROMPT], ["eval", f"{student}-exported", "--text", "TEXT"]]
    for command in (generate, used[0], [*used[1][:-1], str(folder / "dev.txt")]):
        assert main(command) == 0
    capsys.readouterr()
    assert next_commands(capsys, "train", path) == [judge, export, generate]  # it is finished, and says so again


def test_after_a_run_on_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, dataset = runs.bert_classifier(tmp_path), runs.write_dataset(tmp_path)
    config = runs.settings(
        tmp_path,
        method="crild",
        teacher_model_name_or_path=teacher,
        model_name_or_path=teacher,
        student_layers="first:1",
        student={},
        dataset={**dataset, "max_eval_rows": 6},
        stages={"kd": {}},
    )
    student = str(tmp_path / "run" / "kd" / "student")
    judge, export = next_commands(capsys, "train", write_config(tmp_path, config))
    rows = ["--task", "glue/rte", "--path", dataset["path"], "--max_rows", "6", "--max_length", "32"]
    assert judge == ["eval", student, "--teacher", teacher, *rows]
    assert main(judge) == 0 and "6 examples" in capsys.readouterr().out
    assert next_commands(capsys, *export) == [["eval", f"{student}-exported", "--task", "TASK"]]


def test_after_a_run_on_rows_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, labels in (("train", "abab"), ("dev", "ba")):
        rows = [{"first": f"row {number} of {split}", "second": "if", "what": label} for number, label in enumerate(labels)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {
        "path": str(tmp_path / "train.jsonl"),
        "eval_path": str(tmp_path / "dev.jsonl"),
        "text_columns": ["first", "second"],
        "label_column": "what",
        "max_length": 16,
    }
    config = runs.settings(
        tmp_path, method="finetune", model_name_or_path=runs.bert_teacher(tmp_path), student={}, dataset=dataset, max_steps=1
    )
    judge, _ = next_commands(capsys, "train", write_config(tmp_path, config))
    student = str(tmp_path / "run" / "train" / "student")
    rows_of_its_own = ["--path", dataset["eval_path"], "--text_columns", "first,second", "--label_column", "what"]
    assert judge == ["eval", student, *rows_of_its_own, "--max_length", "16"]
    assert main(judge) == 0 and "2 examples of the classes a, b" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "judged"), [("verbalizer", True), ("classification", False)])
def test_after_a_run_on_cloze_questions(kind: str, judged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which `fastkd eval` does not ask: a student that predicts words is judged on the run's text, a classifier is not."""
    path = write_config(tmp_path, runs.glmd(tmp_path, runs.bert_teacher(tmp_path), kind, max_steps=1))
    *judge, export = next_commands(capsys, "train", path)
    assert [command[0] for command in judge] == ["eval"] * judged and export[0] == "export"
    for command in (*judge, export):
        assert main(command) == 0


def test_a_run_without_text_to_be_judged_on_leaves_a_gap_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {**runs.write_text(tmp_path), "eval_path": None}
    judge, *_ = next_commands(capsys, "train", kd(tmp_path, runs.llama_teacher(tmp_path), text=text, max_steps=1))
    assert judge[-2:] == ["--text", "TEXT"]


def test_a_run_that_makes_filters_alone_suggests_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = runs.bert_classifier(tmp_path)
    config = runs.settings(
        tmp_path,
        method="ted",
        teacher_model_name_or_path=teacher,
        model_name_or_path=teacher,
        student={},
        dataset=runs.write_dataset(tmp_path),
        stages={"teacher_filters": {}},
        max_steps=1,
    )
    assert main(["train", write_config(tmp_path, config)]) == 0
    shown = capsys.readouterr().out
    assert "Next:" not in shown and str(tmp_path / "run" / "teacher_filters" / "filters") in shown


@pytest.mark.parametrize("stages", [None, {"distill": {}}])
def test_after_a_cache_the_run_that_reads_it(stages: dict[str, Any] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cache = kd(tmp_path, runs.llama_teacher(tmp_path), **({"stages": stages} if stages else {})), str(tmp_path / "cache of it")
    flags = ["--max_steps", "3"]
    (train,) = next_commands(capsys, "cache", path, "--stage", "distill", "--output", cache, *flags)
    assert train[:2] == ["train", path]
    assert main(train) == 0
    made = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["distill"]
    assert made["teacher_cache"] is not None and made["settings"]["max_steps"] == 3


def test_after_counts_a_pruned_model_and_then_its_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, text = runs.llama_teacher(tmp_path), runs.write_text(tmp_path)["path"]
    (prune,) = next_commands(capsys, "vocab", "count", "--model", model, "--data", text, "--output_dir", "counts")
    assert prune[-1] == f"{Path(model).name}-pruned"
    generate, judge = next_commands(capsys, *prune)
    assert generate == ["generate", prune[-1], PROMPT] and main(generate) == 0
    assert main([*judge[:-1], text, "--use_cpu"]) == 0


def test_an_encoder_is_not_asked_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = runs.bert_teacher(tmp_path)
    judge = next_commands(capsys, "export", student, "--output_dir", str(tmp_path / "out"))
    assert judge == [["eval", str(tmp_path / "out"), "--text", "TEXT"]]


def test_who_has_no_exported_form_is_not_told_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = runs.bert_teacher(tmp_path)
    config = runs.settings(
        tmp_path,
        method="crild",
        teacher_model_name_or_path=teacher,
        model_name_or_path=teacher,
        student={},
        dataset=runs.write_dataset(tmp_path),
        options={"relu_head": True},
        stages={"teacher": {}, "kd": {}},
        max_steps=1,
    )
    (judge,) = next_commands(capsys, "train", write_config(tmp_path, config))
    assert judge[:4] == ["eval", str(tmp_path / "run/kd/student"), "--teacher", str(tmp_path / "run/teacher/teacher")]
    assert main(judge) == 0


def test_after_measuring_a_report_of_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "run_claims", lambda names, settings: [])
    command = ["bench", "masked", "--device", "cpu", "--output", str(tmp_path)]
    assert next_commands(capsys, *command) == [["bench", "report", "--results", str(tmp_path)]]
    assert main([*command, "--smoke"]) == 0 and "Next:" not in capsys.readouterr().out
