"""`fastkd eval` as people call it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fastkd.cli.main import main
from fastkd.models.load import load_language_model, load_tokenizer, save_model
from fastkd.models.student import prune_model
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
    assert "glue/rte, split validation: 6 examples." in shown and "15 bins of equal width" in shown
    assert results["settings"]["max_length"] == 32 and results["models"]["kd"]["model_name_or_path"] == other
    assert "lm_eval" not in shown


def test_text_and_the_way_to_lm_eval(tmp_path, capsys):
    """The command that is printed for a mapped student runs: what it exports is what is then named to lm_eval."""
    teacher, text = runs.llama_teacher(tmp_path), runs.write_text(tmp_path)
    student = mapped(tmp_path, teacher)
    command = ["--text", text["eval_path"], "--max_length", "32", "--batch_size", "4", "--use_cpu"]
    assert main(["eval", student, "--teacher", teacher, *command]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "next tokens, judged as 352 slots of the kept vocabulary." in shown
    export, run = shown.splitlines()[-1].split(" && ")
    assert main(shlex.split(export)[1:]) == 0
    arguments = dict(zip(shlex.split(run)[1::2], shlex.split(run)[2::2], strict=True))
    assert run.startswith("lm_eval ") and set(arguments) == {"--model", "--model_args", "--tasks", "--batch_size"}
    exported = arguments["--model_args"].removeprefix("pretrained=")
    assert arguments["--model"] == "hf" and load_language_model(exported).vocabulary == 352
    capsys.readouterr()
    assert main(["eval", exported, *command]) == 0
    shown = capsys.readouterr().out
    assert "judged as tokens." in shown and shown.splitlines()[-1].strip().startswith(
        f"lm_eval --model hf --model_args pretrained={exported} "
    )
    assert main(["eval", exported, "--teacher", teacher, *command]) == 2
    assert "give the folder that it was exported from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "glue/rte", "--path", "DATA"], "fastkd eval: The model MODEL has no trained head for classification"),
        (["--task", "glue/rtt"], "'glue/rtt' is not a task"),
        (["--text", "TEXT", "--path", "DATA"], "--path does not go with --text"),
        (["--task", "glue/rte", "--text_column", "body"], "--text_column does not go with --task"),
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
    error = capsys.readouterr().err
    assert filled(sentence) in error and "Traceback" not in error and not out.exists()
