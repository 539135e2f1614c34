"""Loading task examples: the same rows from every kind of place, and what each place does with name and split."""

import json

import datasets
import pytest

from fastkd.tasks.examples import load_examples

ROWS = [{"premise": f"row {number}", "label": number % 2} for number in range(5)]


@pytest.fixture(autouse=True)
def local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path, rows=ROWS):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write_lines(path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        getattr(datasets.Dataset.from_list(ROWS), f"to_{suffix[1:]}")(path)
    assert load_examples(path) == ROWS
    assert load_examples(str(path), max_rows=2) == ROWS[:2]
    assert load_examples(path, max_rows=100) == ROWS


def test_a_file_is_one_split_by_itself(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl")
    assert load_examples(path, name="mnli", split="validation") == ROWS


def test_saved_folders(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "validation": data.select([4])}).save_to_disk(tmp_path / "splits")
    assert load_examples(tmp_path / "plain") == ROWS
    assert load_examples(tmp_path / "splits") == ROWS
    assert load_examples(tmp_path / "splits", split="validation") == ROWS[4:]
    with pytest.raises(ValueError, match=r"split='test' is not in .*'train', 'validation'"):
        load_examples(tmp_path / "splits", split="test")


def test_a_saved_folder_of_one_data_set_is_one_split_by_itself(tmp_path):
    folder = write_lines(tmp_path / "data" / "validation.jsonl").parent
    named = datasets.load_dataset(str(folder), split="validation")
    assert named.split == "validation"
    named.save_to_disk(tmp_path / "named")
    for split in ("train", "validation", "test"):
        assert load_examples(tmp_path / "named", name="mnli", split=split) == ROWS


def test_folder_of_files(tmp_path):
    folder = write_lines(tmp_path / "data" / "train.jsonl").parent
    assert load_examples(folder) == ROWS
    assert load_examples(folder, split="train[:40%]") == ROWS[:2]
    with pytest.raises(ValueError, match=r"split='test' is not in .*data.*: use one of 'train'"):
        load_examples(folder, split="test")
    write_lines(folder / "test.jsonl", ROWS[3:])
    assert load_examples(folder, split="test") == ROWS[3:]
    assert load_examples(folder, split="train+test") == ROWS + ROWS[3:]


def test_hub_data_set(tmp_path, monkeypatch):
    folder = write_lines(tmp_path / "data" / "validation.jsonl").parent
    builder = datasets.load_dataset_builder(str(folder))
    asked = []

    def load_dataset_builder(path, name):
        asked.append((path, name))
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert load_examples("org/name", name="mnli", split="validation", max_rows=3) == ROWS[:3]
    assert asked == [("org/name", "mnli")]
    with pytest.raises(ValueError, match=r"split='train' is not in the hub dataset 'org/name'.*: use one of 'validation'"):
        load_examples("org/name")


def test_refusals(tmp_path):
    for missing in ("missing.jsonl", tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"missing.* is no file, no folder"):
            load_examples(missing)
    with pytest.raises(OSError, match="hub dataset 'no-such-owner/no-such-data'"):
        load_examples("no-such-owner/no-such-data")
    for name, content, message in [
        ("rows.txt", "a", r"is no \.jsonl, .* file"),
        ("rows.xml", "a", r"'\.xml' is not in the kinds of file"),
        ("empty.jsonl", "", r"no row in .*empty\.jsonl"),
        ("empty.csv", "premise,label\n", r"Cannot read .*empty\.csv"),
        ("broken.jsonl", "{", r"Cannot read .*broken\.jsonl"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_examples(tmp_path / name)
    with pytest.raises(ValueError, match="max_rows is 0"):
        load_examples(tmp_path / "rows.jsonl", max_rows=0)


def test_words_of_csv_files_are_words(tmp_path):
    (tmp_path / "rows.csv").write_text("premise,label\nNA,1\nNone,2\n")
    wanted = [{"premise": "NA", "label": 1}, {"premise": "None", "label": 2}]
    assert load_examples(tmp_path / "rows.csv") == wanted
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.csv").rename(tmp_path / "folder" / "train.csv")
    assert load_examples(tmp_path / "folder") == wanted
