"""Every GLUE, SuperGLUE and SQuAD task from tiny local copies in every form, and what a faulty copy is told."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest

from fastkd.tasks import glue
from fastkd.tasks.bad_rows import REFUSE_BAD_ROWS, BadRowPolicy
from fastkd.tasks.glue import TASKS, load_task
from fastkd.tasks.labelled import Answer, LabelledExample, TaskDataset

AWKWARD = 'NA said "no", twice: ünïcode'
# Rows as the hub has them (without idx), and the examples that they are.
PAIR = [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")]
FEATURES: dict[str, tuple[str, ...]] = {
    "glue/cola": ("sentence",),
    "glue/sst2": ("sentence",),
    "glue/mrpc": PAIR[0],
    "glue/stsb": PAIR[0],
    "glue/qqp": PAIR[2],
    "glue/mnli": PAIR[1],
    "glue/qnli": PAIR[3],
    "glue/rte": PAIR[0],
    "glue/wnli": PAIR[0],
    "super_glue/boolq": ("question", "passage"),
    "super_glue/cb": PAIR[1],
    "super_glue/copa": ("premise", "choice1", "choice2", "question"),
    "super_glue/multirc": ("paragraph", "question", "answer"),
    "super_glue/wic": ("word", "sentence1", "sentence2"),
    "super_glue/rte": PAIR[1],
    "squad": ("question", "context"),
    "squad_v2": ("question", "context"),
}
FLAT_FORMS = [".csv", ".tsv"]
FORMS = ["saved", ".parquet", ".jsonl", ".json"]


@pytest.fixture(autouse=True)
def local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def hub_rows(name: str, split: str, count: int = 4) -> list[dict[str, Any]]:
    spec = TASKS[name]
    rows = []
    for number in range(count):
        row: dict[str, Any] = {column: f"{split} {column} {number} {AWKWARD}" for column in FEATURES[name]}
        if name == "super_glue/copa":
            row["question"] = ("cause", "effect")[number % 2]
        if name == "super_glue/multirc":
            row |= {"paragraph": "the paragraph", "question": f"question {number // 2}"}
        if spec.kind == "question_answering":
            start = row["context"].index("said")
            row["answers"] = {"text": ["said", "said"], "answer_start": [start, start]}
            if name == "squad_v2" and number == 3:
                row["answers"] = {"text": [], "answer_start": []}
        elif spec.kind == "regression":
            row["label"] = number * 1.25
        else:
            row["label"] = number % len(spec.label_names or spec.choices)
        rows.append(row)
    return rows


def write(folder: Path, form: str, splits: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "saved":
        datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}).save_to_disk(folder)
        return folder
    for split, rows in splits.items():
        path = folder / f"{split}{form}"
        if form == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif form == ".json":
            path.write_text(json.dumps(rows))
        elif form == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif form == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join("\t".join(map(str, cells)) + "\n" for cells in [list(rows[0]), *(row.values() for row in rows)]))
    return folder


def copy_of(folder: Path, name: str, form: str = ".jsonl") -> Path:
    return write(folder, form, {split: hub_rows(name, split) for split in ("train", *TASKS[name].validation)})


def forms_of(name: str) -> list[str]:
    return FORMS if TASKS[name].kind == "question_answering" else FORMS + FLAT_FORMS


@pytest.mark.parametrize("name", list(TASKS))
def test_every_form_of_a_copy_is_the_same_task(tmp_path, name):
    prints = {form: load_task(name, copy_of(tmp_path / form, name, form)).fingerprint for form in forms_of(name)}
    assert len(set(prints.values())) == 1, prints
    task = load_task(name, tmp_path / "saved")
    assert task.name == name and list(task.splits) == ["train", *TASKS[name].validation]
    assert all(len(task.split(split)) == 4 for split in task.splits)


def one_row(folder: Path, name: str) -> LabelledExample:
    return load_task(name, copy_of(folder, name)).split(TASKS[name].validation[-1])[1]


def text(column: str, split: str = "validation") -> str:
    return f"{split} {column} 1 {AWKWARD}"


def test_the_columns_mean_what_the_benchmarks_say(tmp_path):
    for name in ("glue/cola", "glue/sst2"):
        assert one_row(tmp_path / name, name) == LabelledExample(text("sentence"), None, 1)
    for name in ("glue/mrpc", "glue/qqp", "glue/qnli", "glue/rte", "glue/wnli", "super_glue/boolq", "super_glue/cb", "super_glue/rte"):
        first, second = FEATURES[name]
        assert one_row(tmp_path / name, name) == LabelledExample(text(first), text(second), 1)
    assert one_row(tmp_path / "stsb", "glue/stsb") == LabelledExample(text("sentence1"), text("sentence2"), 1.25)
    mismatched = "validation_mismatched"
    assert one_row(tmp_path / "mnli", "glue/mnli") == LabelledExample(text("premise", mismatched), text("hypothesis", mismatched), 1)
    assert one_row(tmp_path / "wic", "super_glue/wic") == LabelledExample(f"{text('word')}: {text('sentence1')}", text("sentence2"), 1)
    assert one_row(tmp_path / "copa", "super_glue/copa") == LabelledExample(
        f"{text('premise')} What happened as a result?", label=1, choices=(text("choice1"), text("choice2"))
    )
    context = text("context")
    assert one_row(tmp_path / "squad", "squad") == LabelledExample(
        text("question"), context, answers=(Answer("said", context.index("said")),)
    )


def test_multirc_groups_the_answers_to_one_question(tmp_path):
    rows = load_task("super_glue/multirc", copy_of(tmp_path, "super_glue/multirc")).split("validation")
    assert rows[1].text == "the paragraph" and rows[1].second_text == f"question 0 {text('answer')}"
    assert rows[0].group == rows[1].group != rows[2].group == rows[3].group


@pytest.mark.parametrize(
    ("name", "names", "metrics"),
    [
        ("glue/cola", "unacceptable acceptable", "matthews"),
        ("glue/mnli", "entailment neutral contradiction", "accuracy"),
        ("glue/rte", "entailment not_entailment", "accuracy"),
        ("glue/wnli", "not_entailment entailment", "accuracy"),
        ("glue/mrpc", "not_equivalent equivalent", "f1 accuracy"),
        ("glue/stsb", "", "spearman pearson"),
        ("super_glue/cb", "entailment contradiction neutral", "f1_macro accuracy"),
        ("super_glue/boolq", "False True", "accuracy"),
        ("super_glue/multirc", "False True", "f1 group_exact_match"),
        ("squad_v2", "", "token_f1 exact_match"),
    ],
)
def test_label_names_are_in_the_hubs_order_and_metrics_the_benchmarks(name, names, metrics):
    assert (TASKS[name].label_names, TASKS[name].metrics) == (tuple(names.split()), tuple(metrics.split()))


@pytest.mark.parametrize("name", list(TASKS))
def test_right_predictions_score_one(tmp_path, name):
    task = load_task(name, copy_of(tmp_path, name))
    for split in TASKS[name].validation:
        rows = task.split(split)
        right = (
            [row.answers[0].text if row.answers else "" for row in rows] if name.startswith("squad") else [row.label for row in rows]
        )
        assert task.score(split, right) == pytest.approx(dict.fromkeys(TASKS[name].metrics, 1.0))


def test_unanswerable_questions_have_no_answers(tmp_path):
    rows = load_task("squad_v2", copy_of(tmp_path, "squad_v2")).split("train")
    assert [len(row.answers) for row in rows] == [1, 1, 1, 0]


def change(folder: Path, name: str, form: str = ".jsonl", bad_rows: BadRowPolicy = REFUSE_BAD_ROWS, **columns: Any) -> TaskDataset:
    """The task from a copy whose second validation row has other columns."""
    rows = {split: hub_rows(name, split) for split in ("train", *TASKS[name].validation)}
    rows[TASKS[name].validation[0]][1] |= columns
    return load_task(name, write(folder, form, rows), bad_rows=bad_rows)


def test_an_answer_that_is_a_little_off_is_put_right(tmp_path):
    shifted = change(tmp_path / "a", "squad", context="ab said ab", answers={"text": ["ab", "ab"], "answer_start": [6, 1]})
    assert shifted.split("validation")[1].answers == (Answer("ab", 8), Answer("ab", 0))
    with pytest.raises(ValueError, match=r"Row 1 \(the first is 0\).*'answers' holds the answer 'cat', which is not in the context"):
        change(tmp_path / "b", "squad", answers={"text": ["cat"], "answer_start": [0]})


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("glue/rte", {"label": -1}, r"Row 1 .*validation\.jsonl.*column 'label' holds the label -1; .*'not_entailment'.*test splits"),
        ("glue/rte", {"label": 2}, "holds the label 2; .*index below 2"),
        ("glue/rte", {"label": None}, "holds the label None"),
        ("glue/rte", {"sentence2": None}, "column 'sentence2' holds None; it must hold text"),
        ("glue/rte", {"sentence1": "", "sentence2": " "}, r"Row 1 .*validation\.jsonl.* has no text"),
        ("glue/stsb", {"label": -1.0}, r"holds the label -1\.0; it must be a number from 0 to 5"),
        ("glue/stsb", {"label": 5.5}, "from 0 to 5"),
        ("glue/stsb", {"label": None}, "from 0 to 5"),
        ("super_glue/copa", {"question": "reason"}, "column 'question' holds 'reason'; it must be one of 'cause', 'effect'"),
        ("super_glue/copa", {"choice2": " "}, "two or more are needed, none empty"),
        ("super_glue/copa", {"choice1": None}, r"Row 1 .*column 'choice1' holds None; it must hold text"),
        ("super_glue/copa", {"question": None}, r"Row 1 .*column 'question' holds None; it must hold text"),
        ("super_glue/multirc", {"answer": None}, r"Row 1 .*column 'answer' holds None"),
        ("super_glue/wic", {"word": None}, r"Row 1 .*column 'word' holds None"),
        ("super_glue/boolq", {"label": None}, r"Row 1 .*holds the label None"),
        ("squad", {"question": None}, r"Row 1 .*column 'question' holds None"),
        ("squad", {"context": None}, r"Row 1 .*column 'context' holds None"),
        ("squad", {"answers": None}, r"Row 1 .*column 'answers' holds None; it must hold lists"),
        ("squad", {"answers": {"text": None}}, r"Row 1 .*column 'answers' holds .*; it must hold lists"),
        ("squad", {"answers": {"text": ["said"]}}, r"Row 1 .*column 'answers' holds .*; it must hold lists"),
        ("squad", {"answers": {"text": [None], "answer_start": [0]}}, r"Row 1 .*'answers' holds the answer None at 0; it must be text"),
        ("squad", {"answers": {"text": ["d"], "answer_start": [None]}}, r"Row 1 .*holds the answer 'd' at None; .* a number"),
        ("squad", {"answers": {"text": ["said"], "answer_start": [-9]}}, r"Row 1 .*holds the answer 'said' at -9"),
        ("squad", {"answers": {"text": [""], "answer_start": [0]}}, r"Row 1 .*has the answer ''"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, columns, message):
    with pytest.raises(ValueError, match=message):
        change(tmp_path / "refused", name, **columns)
    whole = load_task(name, copy_of(tmp_path / "whole", name)).split("validation")
    kept = change(tmp_path / "skipped", name, bad_rows=BadRowPolicy("skip", 1), **columns).split("validation")
    assert kept == (whole[0], *whole[2:])
    with pytest.raises(ValueError, match="More than max_bad_rows=0 rows of"):
        change(tmp_path / "capped", name, bad_rows=BadRowPolicy("skip", 0), **columns)


@pytest.mark.parametrize(
    ("name", "column", "values", "message"),
    [
        ("squad", "answers", [{"text": [7], "answer_start": [0]}], "holds the answer 7 at 0"),
        ("squad", "answers", [{"text": ["said"], "answer_start": ["0"]}], "holds the answer 'said' at '0'"),
        ("squad", "answers", [{"text": ["said"], "answer_start": [0.5]}], r"holds the answer 'said' at 0\.5"),
        ("squad", "answers", [{"text": ["said"], "answer_start": [True]}], "holds the answer 'said' at True"),
        ("squad", "answers", [["said"], "said", 3], "it must hold lists"),
        ("glue/rte", "sentence1", [math.nan], "holds nan; it must hold text"),
        ("glue/rte", "sentence1", [["a"], {"a": "b"}, True], "it must hold text"),
        ("glue/rte", "label", ["9" * 5_000, 1.5, math.nan, [1], {"a": 1}, True], "it must be one of 'entailment', 'not_entailment'"),
        ("glue/stsb", "label", [10**400, math.nan, [1.0], True, "high"], "it must be a number from 0 to 5"),
        ("super_glue/copa", "choice1", [["a"], True], "it must hold text"),
    ],
)
def test_cells_of_another_type_are_bad_rows_too(monkeypatch, caplog, name, column, values, message):
    """As far as a row has them: files of one type throughout have no others."""
    for value in values:
        rows = [*hub_rows(name, "train"), {**hub_rows(name, "train")[0], column: value}]
        monkeypatch.setattr(glue, "read_split", lambda *_, rows=rows: (rows, "the copy"))
        with pytest.raises(ValueError, match=rf"Row 4 \(the first is 0\) of the copy.*{message}"):
            load_task(name)
        caplog.clear()
        kept = load_task(name, bad_rows=BadRowPolicy("skip"))
        assert all(len(kept.split(split)) == 4 for split in kept.splits)
        assert "1 rows of the copy cannot be used and were left out (on_bad_row: skip)." in caplog.text


def test_labels_may_be_names_booleans_or_digits(tmp_path):
    for number, label in enumerate((1, "1", "not_entailment")):
        form = ".csv" if isinstance(label, str) else ".jsonl"
        assert change(tmp_path / str(number), "super_glue/rte", form, label=label).split("validation")[1].label == 1
    rows = [{"question": "q", "passage": "p", "label": label} for label in (True, False)]
    task = load_task("super_glue/boolq", write(tmp_path / "boolq", ".jsonl", {"train": rows, "validation": rows}))
    assert [row.label for row in task.split("train")] == [1, 0]
    with pytest.raises(ValueError, match="holds the label 'true'"):
        change(tmp_path / "word", "super_glue/rte", ".csv", label="true")


def test_one_side_of_a_pair_may_be_empty_as_in_qqp(tmp_path):
    for form in (".csv", ".tsv", ".jsonl"):
        assert change(tmp_path / form, "glue/qqp", form, question2="").split("validation")[1].second_text == ""


def test_unknown_task_and_one_example_split(tmp_path):
    with pytest.raises(ValueError, match=r"'super_glue/wsc' is not a task: use one of glue/cola.*marked spans"):
        load_task("super_glue/wsc", tmp_path)
    splits = {"train": hub_rows("glue/rte", "train", 1), "validation": hub_rows("glue/rte", "validation")}
    with pytest.raises(ValueError, match="Split 'train' of glue/rte has 1 examples; at least two"):
        load_task("glue/rte", write(tmp_path / "rte", ".jsonl", splits))


def test_the_hub_is_asked_for_the_benchmark_and_its_configuration(tmp_path, monkeypatch):
    folder = copy_of(tmp_path / "data", "glue/mnli")
    builder = datasets.load_dataset_builder(str(folder), data_files={path.stem: str(path) for path in folder.iterdir()})
    asked = []

    def load_dataset_builder(path: str, name: str | None) -> Any:
        asked.append((path, name))
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert len(load_task("glue/mnli").split("validation_mismatched")) == 4
    assert set(asked) == {("nyu-mll/glue", "mnli")}
