"""`fastkd eval` as people call it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fastkd.cli.main import main
from fastkd.models.load import load_language_model, load_tokenizer, save_model
from fastkd.models.prune import prune_model
from fastkd.vocab.map import VocabMap
from tests import runs


def mapped(folder: Path, teacher: str) -> str:
    """A student on half of the teacher's vocabulary, as a run leaves it."""
    import torch

    model = load_language_model(teacher)
    chosen = VocabMap.from_counts(torch.arange(model.vocabulary, 0, -1), 0.5, multiple_of=8)
    student = prune_model(model.model, chosen.assign_stand_ins(model.head.weight.detach(), "dot"))
    save_model(student, load_tokenizer(teacher), folder / "student")
    return str(folder / "student")


def test_a_task_in_one_table(tmp_path, capsys):
    teacher, student, other = (runs.bert_classifier(tmp_path, seed=seed) for seed in (1, 2, 3))
    data = runs.write_dataset(tmp_path)
    command = ["eval", student, "--teacher", teacher, "--baseline", f"kd={other}", "--task", "glue/rte", "--path", data["path"]]
    assert main([*command, "--max_length", "32", "--max_rows", "6", "--use_cpu", "--output_dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["teacher", "student", "kd"] == list(results["models"])
    for line, result in zip(lines[2:5], results["models"].values(), strict=True):
        cells = [f"{value:.4g}" for value in result["scores"].values()]
        assert line.split()[1 : 1 + len(cells)] == cells
        assert str(result["parameters"]) in line
    assert lines[0].split()[:3] == ["accuracy", "calibration", "error"] and "KL from teacher, nats" in lines[0]
    assert f"glue/rte (the copy at {data['path']}), split validation: 6 examples of the classes entailment, not_entailment." in shown
    assert "15 bins of equal width" in shown
    assert results["settings"]["max_length"] == 32 and results["models"]["kd"]["model_name_or_path"] == other
    assert "lm_eval" not in shown


@pytest.mark.parametrize("task", ["glue/rte", None])
def test_a_split_is_named_and_no_other_is_asked_for(tmp_path, capsys, task):
    """A labelled test split of a folder, of a copy of a task as of own rows, and the same rows as a file."""
    folder = Path(runs.write_dataset(tmp_path)["path"])
    (folder / "validation.jsonl").rename(folder / "test.jsonl")
    (folder / "train.jsonl").unlink()
    named = ["--task", task] if task else ["--text_columns", "sentence1,sentence2"]
    command = ["eval", runs.bert_classifier(tmp_path), *named, "--max_length", "32", "--use_cpu", "--path"]
    assert main([*command, str(folder), "--split", "test"]) == 0
    shown = capsys.readouterr().out
    assert f"{folder}{')' if task else ''}, split test: 8 examples of the classes " in shown
    assert main([*command, str(folder)]) == 2 and "no file of split 'validation'" in capsys.readouterr().err
    if task is None:
        assert main([*command, str(folder / "test.jsonl")]) == 0
        whole = capsys.readouterr().out
        assert whole.splitlines()[2] == shown.splitlines()[2] and f"\n{folder / 'test.jsonl'}: 8 examples of the classes 0, 1." in whole
        assert main([*command, str(folder / "test.jsonl"), "--split", "test"]) == 2
        assert "is one split by itself; name none" in capsys.readouterr().err


def test_text_and_the_way_to_lm_eval(tmp_path, capsys):
    """The command that is printed for a mapped student runs: what it exports is what is then named to lm_eval."""
    teacher, text = runs.llama_teacher(tmp_path), runs.write_text(tmp_path)
    student = mapped(tmp_path, teacher)
    command = ["--text", text["eval_path"], "--max_length", "32", "--batch_size", "4", "--use_cpu"]
    assert main(["eval", student, "--teacher", teacher, *command]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "next tokens, judged over 352 slots of 700 ids." in shown
    export, run = shown.splitlines()[-1].split(" && ")
    assert main(shlex.split(export)[1:]) == 0
    arguments = dict(zip(shlex.split(run)[1::2], shlex.split(run)[2::2], strict=True))
    assert run.startswith("lm_eval ") and set(arguments) == {"--model", "--model_args", "--tasks", "--batch_size"}
    exported = arguments["--model_args"].removeprefix("pretrained=")
    assert arguments["--model"] == "hf" and load_language_model(exported).vocabulary == 352
    capsys.readouterr()
    assert main(["eval", exported, *command]) == 0
    shown = capsys.readouterr().out
    assert "judged over all 352 ids." in shown and shown.splitlines()[-1].strip().startswith(
        f"lm_eval --model hf --model_args pretrained={exported} "
    )
    assert main(["eval", exported, "--teacher", teacher, *command]) == 2
    assert "give the folder that it was exported from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "glue/rte", "--path", "DATA"], "would be random. Fine-tune it first"),
        (["--task", "glue/rtt"], "'glue/rtt' is not a task: use one of glue/cola"),
        (["--text", "TEXT", "--path", "DATA"], "--path does not go with --text"),
        (["--task", "glue/rte", "--text_column", "body"], "--text_column does not go with --task"),
        (["--path", "DATA", "--text_column", "body"], "--text_column does not go with --path"),
        (["--text", "TEXT", "--label_column", "gold"], "--label_column does not go with --text"),
        (["--task", "glue/rte", "--label_column", "gold"], "label_column is 'gold', which task glue/rte does not read"),
        (["--path", "DATA", "--text_columns", "a,b,c"], "text_columns has 3 names"),
        ([], "there is nothing to judge on; name a task by --task, labelled rows by --path, or a text by --text"),
        (["--text", "TEXT", "--baseline", "kd"], "--baseline is 'kd'; give a name and a folder"),
        (["--text", "TEXT", "--baseline", "student=MODEL"], "has a name that is taken"),
        (["--text", "TEXT", "--batch_size", "0"], "argument --batch_size: '0' is no whole number from 1"),
        (["--text", "TEXT", "--split", "test"], "test"),
        (["--text", "/no/where.txt"], "path='/no/where.txt' is no file"),
        (["--text", "TEXT", "--max_length=--"], "argument --max_length: -- is no value"),
        (["--text", "TEXT", "--max_rows", "-1"], "argument --max_rows: '-1' is no whole number from 1"),
        (["--text", "TEXT", "--output_dir", ""], "argument --output_dir: '' names nothing"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(tmp_path, capsys, flags, sentence):
    places = {
        "MODEL": runs.bert_teacher(tmp_path),
        "DATA": runs.write_dataset(tmp_path)["path"],
        "TEXT": runs.write_text(tmp_path)["path"],
    }

    def filled(words: str) -> str:
        for word, place in places.items():
            words = words.replace(word, place)
        return words

    out = tmp_path / "out"
    assert main(["eval", places["MODEL"], "--output_dir", str(out), *map(filled, flags)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # behind what transformers logs
    assert said.startswith("fastkd eval: ") and filled(sentence) in said and not out.exists()
