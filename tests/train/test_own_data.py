"""Own labelled rows from a CSV file to an exported student, by every method on labels, and what `dataset` refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import fastkd
from fastkd.cli.main import main
from fastkd.methods.registry import METHODS
from fastkd.tasks.glue import TASKS
from fastkd.tasks.stdlib_tasks import STDLIB_TASKS
from fastkd.train.config import DatasetArguments
from fastkd.train.data import load_dataset
from fastkd.train.evaluate import evaluate_on_task
from fastkd.train.schema import from_mapping
from tests import own_rows, runs, tiny
from tests.own_rows import FEELINGS


def configuration(folder: Path, method: str, kind: str = "classes") -> dict[str, Any]:
    """All stages of the method, from a model without any head for a task."""
    teacher = runs.bert_teacher(folder)
    return runs.settings(
        folder,
        method=method,
        model_name_or_path=teacher,
        student={},
        dataset=own_rows.write_own(folder / "rows", kind),
        options={"teacher_filter_interval": 2} if method == "ted" else {},
        stages={spec.name: {} for spec in METHODS[method].stages},
        **({} if method == "finetune" else {"teacher_model_name_or_path": teacher, "student_layers": "first:1"}),
    )


def read(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def outputs(folder: str | Path, rows: list[dict[str, str]], columns: list[str]) -> tuple[Any, np.ndarray]:
    """The configuration and the scores that plain transformers has for the texts."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        texts = [tokenizer(*(row[column] for column in columns), truncation=True, max_length=32, return_tensors="pt") for row in rows]
        return model.config, torch.cat([model(**text).logits for text in texts]).double().numpy()


@pytest.mark.parametrize("method", ["finetune", "crild", "ted"])
@pytest.mark.parametrize("kind", own_rows.KINDS)
def test_from_a_file_to_an_exported_student(tmp_path, capsys, kind, method):
    """What plain transformers predicts of the exported student, by the names of its classes, scores as the card says."""
    run = configuration(tmp_path, method, kind)
    results = fastkd.distill(run)
    last = list(results.values())[-1]
    metrics = {"pearson", "spearman"} if kind == "values" else {"accuracy", "f1_macro"}
    assert set(last["scores"]) == metrics

    data, student = run["dataset"], last["student_dir"]
    (tmp_path / "rows" / "train.csv").unlink()
    test, judged, exported = tmp_path / "rows" / "test.csv", tmp_path / "judged", tmp_path / "exported"
    columns = ["--text_columns", ",".join(data["text_columns"]), "--label_column", data["label_column"], "--max_length", "32"]
    assert main(["eval", student, "--path", str(test), *columns, "--use_cpu", "--output_dir", str(judged)]) == 0
    shown = capsys.readouterr().out
    classes = "" if kind == "values" else " of the classes negative, neutral, positive"
    assert f"\n{test}: 18 examples{classes}." in shown
    assert main(["export", student, "--output_dir", str(exported), "--results", str(judged / "results.json")]) == 0

    rows = read(test)
    config, scores = outputs(exported, rows, data["text_columns"])
    labels = [row[data["label_column"]] for row in rows]
    found = json.loads((judged / "results.json").read_text())["models"]["student"]["scores"]
    if kind == "values":
        assert (config.num_labels, config.problem_type) == (1, "regression")
        assert found["pearson"] == pytest.approx(np.corrcoef(scores[:, 0], np.array(labels, dtype=float))[0, 1], abs=1e-4)
    else:
        assert config.id2label == dict(enumerate(FEELINGS)) and config.label2id == {name: i for i, name in enumerate(FEELINGS)}
        assert config.problem_type == "single_label_classification"
        assert found["accuracy"] == np.mean([config.id2label[row.argmax()] == label for row, label in zip(scores, labels, strict=True)])

    card = (exported / "README.md").read_text()
    assert "- Data: `train.csv`\n" in card and "on `test.csv`: 18 examples" in card and "| `dev.csv` |" in card
    assert ("- Classes: negative, neutral, positive\n" in card) == (kind != "values")
    front = yaml.safe_load(card.split("---\n")[1])
    assert {result["dataset"]["name"] for result in front["model-index"][0]["results"]} == {"dev.csv", "test.csv"}
    assert "datasets" not in front and "language" not in front


def test_a_teacher_and_its_student_have_one_order_of_classes(tmp_path):
    """Rows in another order give the same classes, so that a teacher of one run teaches in another."""
    run = configuration(tmp_path, "finetune")
    teacher = fastkd.distill({**run, "output_dir": str(tmp_path / "teacher")})["train"]["student_dir"]
    path = tmp_path / "rows" / "train.csv"
    head, *lines = path.read_text().splitlines(keepends=True)
    path.write_text(head + "".join(sorted(lines)[::-1]))
    student = fastkd.distill({**run, "method": "crild", "teacher_model_name_or_path": teacher, "stages": {"kd": {}}})["kd"]
    assert set(student["scores"]) == {"accuracy", "f1_macro"}


def test_a_teacher_whose_classes_have_no_names_is_refused(tmp_path):
    """LABEL_0 may be any of them; of whole numbers from 0 it is the class 0."""
    run = configuration(tmp_path, "crild")
    unnamed = {"teacher_model_name_or_path": runs.bert_classifier(tmp_path, num_labels=3), "stages": {"kd": {}}}
    with pytest.raises(ValueError, match="does not name its 3 classes, so which of them is negative is not known; write id2label"):
        fastkd.distill({**run, **unnamed})
    for name in ("train", "dev"):
        path = tmp_path / "rows" / f"{name}.csv"
        path.write_text(path.read_text().replace("negative", "0").replace("neutral", "1").replace("positive", "2"))
    assert 0 <= fastkd.distill({**run, **unnamed})["kd"]["scores"]["accuracy"] <= 1


@pytest.mark.parametrize(("file", "said"), [("train", "rows.train"), ("dev", "rows.eval")])
def test_a_run_goes_on_with_the_same_labels_alone(tmp_path, file, said):
    """Wherever the rows lie now; another label, or another class, which moves the indices of all behind it, is another run."""
    run = configuration(tmp_path, "finetune")
    done = fastkd.distill(run)
    moved = {**run["dataset"]}
    for key in ("path", "eval_path"):
        moved[key] = str(Path(moved[key]).rename(tmp_path / f"moved-{Path(moved[key]).name}"))
    assert fastkd.distill({**run, "dataset": moved}) == done
    path = tmp_path / f"moved-{file}.csv"
    rest, _, last = path.read_text().rstrip().rpartition(",")
    path.write_text(f"{rest},{'positive' if last == 'neutral' else 'neutral'}\n")
    with pytest.raises(ValueError, match=said):
        fastkd.distill({**run, "dataset": moved})


# ---- evaluation alone


def classifier(folder: Path, head: str = "SequenceClassification", **settings: Any) -> str:
    tokenizer = tiny.wordpiece()
    return tiny.save(folder / head, tiny.transformer("bert", head, vocab_size=len(tokenizer), **settings), tokenizer)


def own(folder: Path, **options: Any) -> DatasetArguments:
    data = own_rows.write_own(folder / "rows")
    return DatasetArguments(**{**data, "path": data["eval_path"], "eval_path": None, "text_columns": ("text",), **options})


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"head": "MaskedLM"}, "was saved as BertForMaskedLM, and is to give every text one class or one value; fine-tune it"),
        ({"head": "TokenClassification"}, "was saved as BertForTokenClassification"),
        ({"problem_type": "multi_label_classification"}, r"gives a text several labels \(multi-label classification\)"),
        ({}, r"Row 0 \(the first is 0\) of .*dev\.csv: column 'label' holds 'positive'; the classes are 0, 1, 2\."),
        ({"num_labels": 2, "id2label": {0: "bad", 1: "good"}}, "column 'label' holds 'positive'; the classes are bad, good"),
        ({"num_labels": 1, "id2label": {0: "score"}}, "column 'label' holds 'positive'; a finite number is needed"),
    ],
)
def test_models_that_do_not_predict_such_labels(tmp_path, model, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate_on_task({"student": classifier(tmp_path, **model)}, own(tmp_path), use_cpu=True)


def test_classes_are_those_of_the_model_in_its_order(tmp_path):
    names = dict(enumerate(("positive", "negative", "neutral")))
    model, given = classifier(tmp_path, id2label=names), own(tmp_path)
    evaluation = evaluate_on_task({"student": model}, given, use_cpu=True)
    assert evaluation["data"]["classes"] == tuple(names.values()) and evaluation["data"]["split"] is None
    rows = read(str(given.path))
    predicted = [names[row.argmax()] for row in outputs(model, rows, ["text"])[1]]
    found = np.mean([name == row["label"] for name, row in zip(predicted, rows, strict=True)])
    assert evaluation["models"]["student"]["scores"]["accuracy"] == found
    with pytest.raises(ValueError, match="kind is 'regression', and the student was made for classification"):
        evaluate_on_task({"student": model}, own(tmp_path, kind="regression"), use_cpu=True)
    unnamed = runs.bert_classifier(tmp_path, num_labels=3)
    with pytest.raises(ValueError, match="does not name its 3 classes"):
        evaluate_on_task({"teacher": model, "student": unnamed}, given, use_cpu=True)


# ---- what `dataset` refuses


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        ({}, "task is not set, and neither is path; name a task, or by path the labelled rows of your own"),
        ({"path": "a.csv", "label_column": "text"}, "label_column is 'text', which is among text_columns too"),
        ({"path": "a.csv", "label_column": ["a", "b"]}, "label_column names several columns, and multi-label .* is not supported"),
        ({"path": "a.csv", "kind": "multi_label"}, "kind is the text 'multi_label'; it must be classification | regression | null"),
        (
            {"task": "glue/rte", "label_column": "gold"},
            "label_column is 'gold', which task glue/rte does not read; leave one of them out",
        ),
        ({"task": "glue/rte", "text_columns": ["a", "b"]}, "text_columns is"),
        ({"task": "stdlib/module", "eval_path": "dev.csv"}, "eval_path is 'dev.csv', which task stdlib/module does not read"),
        ({"task": "pairs", "path": "a.csv", "kind": "regression"}, "kind is 'regression', which task pairs does not read"),
    ],
)
def test_keys_that_do_not_go_together(dataset, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_mapping(DatasetArguments, dataset)


def test_an_unknown_task_is_told_all_there_are():
    with pytest.raises(ValueError, match="'stdlib/modules' is not a task: use one of ") as refused:
        load_dataset(DatasetArguments(task="stdlib/modules"))
    listed = str(refused.value).partition("use one of ")[2].partition(". (")[0].split(", ")
    assert {*listed} == {*TASKS, *STDLIB_TASKS, "stdlib/pairs", "pairs"}
    assert "labelled rows of your own are no task: leave it out and name their file by path" in str(refused.value)


def test_only_the_splits_that_are_read_are_asked_for(tmp_path):
    """MNLI has two to evaluate on; a copy with a labelled test split may be evaluated on it."""
    rows = [json.dumps({"premise": f"p {n}", "hypothesis": "h", "label": n % 3}) + "\n" for n in range(6)]
    for split in ("train", "validation_matched", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    assert list(load_dataset(DatasetArguments(task="glue/mnli", path=str(tmp_path))).splits) == ["train", "validation_matched"]
    named = DatasetArguments(task="glue/mnli", path=str(tmp_path), eval_split="test")
    assert list(load_dataset(named).splits) == ["train", "test"]
    (tmp_path / "train.jsonl").unlink()
    evaluation = evaluate_on_task({"student": classifier(tmp_path, num_labels=3)}, named, use_cpu=True)
    assert evaluation["data"]["split"] == "test" and evaluation["data"]["examples"] == 6
