"""Own labelled rows: which labels are classes and which are values, in what order, from which files, and what is refused."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from fastkd.tasks.bad_rows import BadRowPolicy
from fastkd.tasks.labelled import LabelledExample, TaskDataset
from fastkd.tasks.own_task import OwnRows

ROWS = OwnRows(["text"], "label")
NAMES = ["neutral", "positive", "negative"]
FEELINGS = [{"text": f"row {number}, NA", "label": NAMES[number % 3]} for number in range(9)]
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: Sequence[Row]) -> str:
    """A file in the form that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(labels: Sequence[Any]) -> list[Row]:
    return [{"text": f"row {number}", "label": label} for number, label in enumerate(labels)]


def load(
    folder: Path, train: Sequence[Row], dev: Sequence[Row] | None = None, *, form: str = ".csv", rows: OwnRows = ROWS, **options: Any
) -> TaskDataset:
    path = write(folder / f"train{form}", train)
    return rows.load(path, eval_path=write(folder / f"dev{form}", train if dev is None else dev), **options)


# ---- labels


def test_classes_are_sorted_by_name_whatever_the_order_of_the_rows(tmp_path):
    task, turned = load(tmp_path / "a", FEELINGS), load(tmp_path / "b", FEELINGS[::-1])
    assert (task.kind, task.metrics, task.num_outputs) == ("classification", ("accuracy", "f1_macro"), 3)
    assert task.label_names == turned.label_names == ("negative", "neutral", "positive")
    assert list(task.splits) == ["train", "validation"] and task.split("train")[:2] == (
        LabelledExample("row 0, NA", None, 1),
        LabelledExample("row 1, NA", None, 2),
    )
    assert sorted(task.split("train"), key=str) == sorted(turned.split("train"), key=str)
    assert task.split_fingerprint("train") != load(tmp_path / "c", [*FEELINGS[:8], {**FEELINGS[8], "label": "none"}]).split_fingerprint(
        "train"
    )


@pytest.mark.parametrize(
    ("form", "labels", "names"),
    [
        (".csv", [10, 9, -1, 10], ("-1", "9", "10")),
        (".jsonl", [10, 9, -1, 10], ("-1", "9", "10")),
        (".jsonl", ["10", "9", "-1", "10"], ("-1", "9", "10")),
        (".parquet", [True, False], ("False", "True")),
        (".csv", ["v10", "v9"], ("v10", "v9")),
        (".csv", ["1", "one"], ("1", "one")),
        (".csv", [" spam", "ham ", "spam"], ("ham", "spam")),
        (".csv", ["nan", "inf", "1_0"], ("1_0", "inf", "nan")),
        (".csv", ["LABEL: a", "[b]"], ("LABEL: a", "[b]")),
    ],
)
def test_names_and_whole_numbers_are_classes_and_numbers_sorted_by_value(tmp_path, form, labels, names):
    task = load(tmp_path, labelled(labels), form=form)
    assert (task.kind, task.label_names) == ("classification", names)
    assert [names[row.label] for row in task.split("train")] == [str(label).strip() for label in labels]  # type: ignore[index]


@pytest.mark.parametrize(
    ("form", "labels"),
    [(".csv", [1, 2.5, 0]), (".csv", ["1", "2.", "-.5e1"]), (".jsonl", [1, 2.5, 0]), (".parquet", [1.0, 2.0, 5.0])],
)
def test_numbers_of_which_one_is_a_float_are_values(tmp_path, form, labels):
    task = load(tmp_path, labelled(labels), form=form)
    assert (task.kind, task.metrics, task.label_names, task.num_outputs) == ("regression", ("pearson", "spearman"), (), 1)
    assert [row.label for row in task.split("train")] == list(map(float, labels))


def test_the_kind_can_be_chosen(tmp_path):
    values = load(tmp_path / "a", labelled([3, 1, 2]), kind="regression")
    assert values.kind == "regression" and [row.label for row in values.split("validation")] == [3.0, 1.0, 2.0]
    stars = load(tmp_path / "b", labelled([0.5, 10.0, 9.5]), kind="classification")
    assert stars.label_names == ("0.5", "9.5", "10.0")
    with pytest.raises(ValueError, match="holds 'good'; a finite number is needed to predict values"):
        load(tmp_path / "c", labelled([1, "good"]), kind="regression")


# ---- where rows are


def test_every_form_is_the_same_task(tmp_path):
    prints = {}
    for form in (".csv", ".jsonl", ".parquet"):
        prints[f"two {form}"] = load(tmp_path / form, FEELINGS, FEELINGS[:3], form=form).fingerprint
        for split, rows in (("train", FEELINGS), ("validation", FEELINGS[:3])):
            write(tmp_path / f"folder{form}" / f"{split}{form}", rows)
        prints[f"folder {form}"] = ROWS.load(str(tmp_path / f"folder{form}")).fingerprint
    splits = {"train": datasets.Dataset.from_list(FEELINGS), "validation": datasets.Dataset.from_list(FEELINGS[:3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    prints["saved"] = ROWS.load(str(tmp_path / "saved")).fingerprint
    splits["validation"].save_to_disk(tmp_path / "saved-dev")
    prints["saved apart"] = ROWS.load(str(tmp_path / ".csv" / "train.csv"), eval_path=str(tmp_path / "saved-dev")).fingerprint
    for part in (0, 1):
        write(tmp_path / "parts" / f"part-{part}.csv", FEELINGS[4 * part : 4 + 5 * part])
    prints["glob"] = ROWS.load(str(tmp_path / "parts" / "part-*.csv"), eval_path=str(tmp_path / "saved-dev")).fingerprint
    assert len(set(prints.values())) == 1, prints


def test_a_split_is_named(tmp_path):
    for number, split in enumerate(("train", "dev", "test")):
        write(tmp_path / f"{split}.csv", FEELINGS[number:])
    task = ROWS.load(str(tmp_path), eval_split="test")
    assert list(task.splits) == ["train", "test"] and task.split("test") == ROWS.load(str(tmp_path), eval_split="dev").split("dev")[1:]
    assert list(ROWS.load(str(tmp_path), eval_split="train").splits) == ["train"]
    assert list(ROWS.load(str(tmp_path / "dev.csv"), eval_path=str(tmp_path), eval_split="train").splits) == ["train", "validation"]
    with pytest.raises(FileNotFoundError, match=r"no file of split 'validation' .*There is: dev\.csv, test\.csv, train\.csv"):
        ROWS.load(str(tmp_path))
    with pytest.raises(ValueError, match=r"The split 'test' is asked for, and .*dev\.csv' is one split by itself; name none"):
        ROWS.load(str(tmp_path / "train.csv"), eval_path=str(tmp_path / "dev.csv"), eval_split="test")
    with pytest.raises(
        ValueError, match=r"path .*train\.csv' is one split, so training and evaluation would share its rows; name .*eval_path"
    ):
        ROWS.load(str(tmp_path / "train.csv"))


def test_one_split_for_a_model_whose_classes_are_known(tmp_path):
    path, names = write(tmp_path / "test.csv", FEELINGS), ("positive", "neutral", "negative")
    task = ROWS.load_split(path, None, "classification", names)
    assert task.label_names == names and [row.label for row in task.split("validation")[:3]] == [1, 0, 2]
    assert list(ROWS.load_split(str(tmp_path), "test", "classification", names).splits) == ["test"]
    with pytest.raises(ValueError, match=r"Row 0 .* column 'label' holds 'neutral'; the classes are 0, 1\."):
        ROWS.load_split(path, None, "classification", ("0", "1"))


def test_pairs_and_other_columns(tmp_path):
    pairs = OwnRows(["premise", "hypothesis"], "gold")
    rows = [{"id": n, "premise": f"p {n}", "hypothesis": n or "", "gold": "yes" if n % 2 else "no"} for n in range(4)]
    for form in (".csv", ".jsonl"):
        text = [{**row, "hypothesis": str(row["hypothesis"])} for row in rows]
        task = load(tmp_path / form, rows if form == ".csv" else text, form=form, rows=pairs)
        assert task.split("train")[0] == LabelledExample("p 0", "", 0) and task.split("train")[1] == LabelledExample("p 1", "1", 1)


def test_cells_of_csv_are_text_to_the_letter(tmp_path):
    rows = [{"text": text, "label": "a" if number else "b"} for number, text in enumerate(["NA", "007", "1e5", "null"])]
    assert [row.text for row in load(tmp_path, rows).split("train")] == ["NA", "007", "1e5", "null"]


def test_named_classes_of_a_saved_data_set_and_its_rows_without_label(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["positive", "negative"])})
    rows = [{"text": "good", "label": 0}, {"text": "bad", "label": 1}, {"text": "?", "label": -1}]
    train = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": train, "validation": train.select([0, 1])}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"Row 2 .*column 'label' holds no label; the classes are negative, positive"):
        ROWS.load(str(tmp_path))
    task = OwnRows(["text"], "label", BadRowPolicy("skip")).load(str(tmp_path))
    assert task.label_names == ("negative", "positive") and [row.label for row in task.split("train")] == [1, 0]


# ---- what is refused


@pytest.mark.parametrize(
    "labels", [[1, "negative"], ["negative", 1], [1, "negative", "neutral"], [1, "2", "10"], [1, "null"], [True, "a"]]
)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_column_of_numbers_and_strings_is_refused_and_no_class_vanishes(tmp_path, labels, policy):
    rows = OwnRows(["text"], "label", BadRowPolicy(policy))
    with pytest.raises(
        ValueError, match=r"The column 'label' of .*train\.jsonl.* mixes kinds of values.*all of them as strings, or all"
    ):
        load(tmp_path, labelled(labels * 3), form=".jsonl", rows=rows)
    names = load(tmp_path / "strings", labelled([str(label) for label in labels] * 3), form=".jsonl", rows=rows).label_names
    assert set(names) == set(map(str, labels))


@pytest.mark.parametrize(
    ("form", "train", "dev", "message"),
    [
        (
            ".csv",
            FEELINGS,
            labelled(["neutral", "angry"]),
            r"Row 1 \(the first is 0\) of .*dev\.csv: column 'label' holds 'angry'; the classes are negative, neutral, positive",
        ),
        (".csv", labelled([0, 1]), labelled([0, 2]), r"Row 1 .*dev\.csv: column 'label' holds '2'; the classes are 0, 1\."),
        (".jsonl", labelled([0, 1]), labelled([0, 2]), r"Row 1 .*dev\.jsonl'?: column 'label' holds 2; the classes are 0, 1\."),
        (".csv", labelled(["a", "", "b"]), None, r"Row 1 .*train\.csv: column 'label' holds no label"),
        (".jsonl", labelled(["a", None, "b"]), None, r"Row 1 .*holds no label"),
        (".jsonl", labelled([0.5, float("nan"), 1.0]), None, r"Row 1 .*holds no label; a finite number is needed"),
        (".csv", labelled(["0.5", "1e999"]), None, r"Row 1 .*holds '1e999'; a finite number is needed"),
        (".csv", labelled(["a", "a"]), None, r"train\.csv has the class 'a' alone, and a classification needs two classes or more"),
        (".csv", labelled(["", ""]), None, r"train\.csv has no label at all"),
        (
            ".jsonl",
            labelled([["a", "b"], ["a"]]),
            None,
            r"Row 0 .*column 'label' holds \['a', 'b'\].*multi-label classification.*token classification",
        ),
        (
            ".csv",
            labelled(["['a', 'b']", "['a']"]),
            None,
            r"Row 0 .*column 'label' holds .*multi-label classification.*token classification",
        ),
        (".jsonl", labelled([{"a": 1}, {"a": 0}]), None, r"Row 0 .*column 'label' holds \{'a': 1\}, and a label is one name or number"),
        (
            ".jsonl",
            [{"text": ["a", "b"], "label": "x"}, {"text": ["c"], "label": "y"}],
            None,
            r"column 'text' holds \['a', 'b'\]; it must hold text",
        ),
        (".csv", [{"text": " ", "label": "x"}, {"text": "a", "label": "y"}], None, r"Row 0 .*train\.csv has no text"),
        (
            ".csv",
            [{"body": "a", "label": "x"}],
            None,
            r"The column 'text' that text_columns and label_column name is missing in .*train\.csv, which has 'body', 'label'",
        ),
        (
            ".csv",
            [{"body": "a", "class": "x"}],
            None,
            r"The columns 'text', 'label' that text_columns and label_column name are missing",
        ),
        (".jsonl", [{"text": "a", "class": "x"}], None, r"The column 'label' that .* is missing in .*which has 'text', 'class'"),
        (".txt", labelled(["a", "b"]), None, r"missing in .*train\.txt"),
        (
            ".csv",
            labelled(["a", "b"]),
            labelled(["a"]),
            r"Split 'validation' of .* has 1 examples; at least two",
        ),
        (".csv", labelled([0.5, 1]), labelled([1, 1]), r"Split 'validation' of .* has the value 1.0 in all of its 2 examples"),
    ],
)
def test_rows_that_cannot_be_learned_from(tmp_path, form, train, dev, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, train, dev, form=form)


def test_bad_rows_can_be_left_out_but_not_labels_that_are_lists(tmp_path, caplog):
    skipping = OwnRows(["text"], "label", BadRowPolicy("skip"))
    rows = [*FEELINGS, {"text": "no label", "label": ""}, {"text": "", "label": "neutral"}]
    task = load(tmp_path, rows, [*FEELINGS, {"text": "?", "label": "angry"}], rows=skipping)
    assert len(task.split("train")) == len(task.split("validation")) == len(FEELINGS)
    assert "2 rows of " in caplog.text and "holds 'angry'" in caplog.text
    with pytest.raises(ValueError, match="multi-label classification"):
        load(tmp_path / "lists", labelled([["a"], ["b", "c"]]), form=".jsonl", rows=skipping)


def test_the_log_says_what_was_read(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastkd")
    load(tmp_path / "a", FEELINGS)
    assert "train.csv: 9 rows of the classes negative (3), neutral (3), positive (3)." in caplog.text
    load(tmp_path / "b", labelled([0.5, 4]))
    assert "train.csv: 2 rows with values from 0.5 to 4." in caplog.text
