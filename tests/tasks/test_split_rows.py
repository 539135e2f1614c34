"""Where a split's rows are found, and what is said of a copy that is not whole."""

import json

import datasets
import pytest

from fastkd.tasks.split_rows import read_split

ROWS = [{"sentence": f"row {number}", "label": number % 2, "idx": number} for number in range(4)]
COLUMNS = ("sentence", "label")
WANTED = [{"sentence": f"row {number}", "label": number % 2} for number in range(4)]


@pytest.fixture(autouse=True)
def local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_at(path, split="train", config=None, columns=COLUMNS):
    return read_split(str(path), config, split, columns)[0]


def test_only_the_columns_asked_for_in_a_folder_of_files(tmp_path):
    write_lines(tmp_path / "train.jsonl")
    (tmp_path / "README.md").write_text("---\n")
    rows, description = read_split(str(tmp_path), "sst2", "train", COLUMNS)
    assert rows == WANTED and "train.jsonl" in description


def test_parts_are_read_in_order_from_the_configurations_folder(tmp_path):
    for part in (1, 0):
        table = datasets.Dataset.from_list(ROWS[2 * part : 2 * part + 2])
        (tmp_path / "glue" / "sst2").mkdir(parents=True, exist_ok=True)
        table.to_parquet(tmp_path / "glue" / "sst2" / f"train-0000{part}-of-00002.parquet")
    assert rows_at(tmp_path / "glue", config="sst2") == rows_at(tmp_path / "glue" / "sst2", config="sst2") == WANTED
    with pytest.raises(FileNotFoundError, match=r"no file of split 'train'.*There is: sst2\."):
        rows_at(tmp_path / "glue", config="cola")


def test_a_split_is_not_found_under_a_longer_name(tmp_path):
    write_lines(tmp_path / "validation_matched.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file of split 'validation' .*There is: validation_matched\.jsonl"):
        rows_at(tmp_path, "validation")


def test_class_names_of_a_saved_folder_outlive_another_order(tmp_path):
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["positive", "negative"])})
    rows = [{"sentence": "good", "label": 0}, {"sentence": "bad", "label": 1}, {"sentence": "?", "label": -1}]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows, features=features)}).save_to_disk(tmp_path / "saved")
    assert [row["label"] for row in rows_at(tmp_path / "saved")] == ["positive", "negative", -1]
    with pytest.raises(ValueError, match=r"split='validation' is not in .*'train'"):
        rows_at(tmp_path / "saved", "validation")


def test_a_class_that_has_no_name_is_left_to_its_row(tmp_path):
    """It is no index into another order of the classes either."""
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_list([{"sentence": "a", "label": label} for label in (0, 7, -1, None)], features=features)
    named = datasets.Features({**features, "label": datasets.ClassLabel(names=["positive", "negative"])})
    table = datasets.Dataset(table.data, info=datasets.DatasetInfo(features=named))
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path)
    assert [row["label"] for row in rows_at(tmp_path)] == ["positive", "class 7 of 2", -1, None]


def test_cells_are_text_to_the_letter(tmp_path):
    (tmp_path / "train.csv").write_text('\ufeffsentence,label\nNA,0\n"1,5 ""quoted""\nline",1\n,1\n', encoding="utf-8")
    (tmp_path / "dev.tsv").write_text('label\tsentence\n0\tnull\n1\t"opened, and never closed\n1\t007\n')
    assert [row["sentence"] for row in rows_at(tmp_path)] == ["NA", '1,5 "quoted"\nline', ""]
    assert [row["sentence"] for row in rows_at(tmp_path, "dev")] == ["null", '"opened, and never closed', "007"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.tsv", "sentence\tlabel\na\t0\nb\n", r"train\.tsv, line 3: the row has not the 2 cells"),
        ("train.tsv", "sentence\tlabel\na\tb\t0\n", r"line 2: the row has not the 2 cells"),
        ("train.csv", 'sentence,label\n"a,0\n', r"Cannot read .*train\.csv, line 2: .*whole \.csv file"),
        ("train.csv", b"sentence,label\n\xff\xfe,0\n", r"Cannot read .*train\.csv, line 2: .*decode.*Save the file as UTF-8"),
        ("train.csv", "sentence,label\né,0\n".encode("latin-1"), r"Cannot read .*train\.csv, line 2: .*decode.*Save the file as UTF-8"),
        ("train.csv", b"sentence,label\n" + 9000 * b"a,0\n" + b"\xe9,0\n", r"train\.csv, line 9002: "),
        ("train.csv", "sentence,sentence,label\na,b,0\n", r"train\.csv has several columns called 'sentence'; give each a name"),
        ("train.tsv", "x\tx\tsentence\tlabel\na\tb\tc\t0\n", r"train\.tsv has several columns called 'x'"),
        ("train.csv", "", r"columns 'sentence', 'label' .* are missing in .*train\.csv, which has none"),
        (
            "train.csv",
            "text,label\na,0\n",
            r"column 'sentence' of the hub's format is missing in .*train\.csv, which has 'text', 'label'",
        ),
        ("train.jsonl", '{"text": "a", "label": 0}\n', r"column 'sentence' .*which has 'text', 'label'"),
        ("train.jsonl", '{"sentence": "a\n', r"Cannot read .*train\.jsonl"),
    ],
)
def test_faulty_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        rows_at(tmp_path)


def test_places_that_hold_no_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is: nothing"):
        rows_at(tmp_path)
    path = write_lines(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"is one file; name the folder .*such as train\.jsonl"):
        rows_at(path)
    (tmp_path / "train.csv").write_text("sentence,label\n")
    with pytest.raises(ValueError, match=r"has split 'train' as \.csv and \.jsonl; keep one"):
        rows_at(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no file, no folder"):
        rows_at(tmp_path / "missing")
