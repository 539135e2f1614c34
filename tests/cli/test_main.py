"""The command as people call it: exit codes, sentences, help without torch, and every command on tiny models."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.cli.main import main
from fastkd.models.load import load_language_model, load_tokenizer
from fastkd.train.config import read_config
from fastkd.train.schema import load_yaml, to_yaml
from fastkd.vocab.count import TokenCounts
from tests import runs, tiny
from tests.ranks import torchrun
from tests.runs import log_lines, same_bits, weights

ROOT = Path(__file__).parents[2]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def write_config(folder: Path, config: dict[str, Any]) -> str:
    (folder / "run.yaml").write_text(to_yaml(read_config(config), defaults=False))
    return str(folder / "run.yaml")


# ---- commands


def test_what_is_no_command(capsys):
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    assert "there is no command 'zzz'; it has quickstart, train, vocab, generate" in capsys.readouterr().err
    assert main([]) == 2 and main(["train"]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"{fastkd.__version__}\n")


# ---- train


def test_train_runs_all_stages_and_prints_where_the_student_is(tmp_path, capsys):
    path = write_config(tmp_path, runs.glmd(tmp_path, runs.bert_teacher(tmp_path)))
    flags = ["--max_steps", "3", "--stages.task_words.max_steps", "2", "--save_total_limit", "1"]
    assert main(["train", path, *flags]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in shown[2:5]] == [["pretrain", "3"], ["task_words", "2"], ["task_scores", "3"]]
    rows = re.search(r"perplexity [\d.]+ over (\d+) slots of 600 ids", shown[2])
    assert (
        rows is not None
        and 300 <= int(rows[1]) < 600
        and "accuracy" in shown[4]
        and shown[4].endswith(str(tmp_path / "run" / "task_scores" / "student"))
    )
    assert main(["train", path, *flags, "--stage", "task_words"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:3]] == ["task_words"]


def test_off_a_terminal_a_run_tells_where_it_stands(tmp_path, capsys, caplog):
    """A line for every one of the log, which is named before."""
    path = write_config(tmp_path, runs.glmd(tmp_path, runs.bert_teacher(tmp_path), stages={"pretrain": {}}))
    assert main(["train", path, "--logging_steps", "2"]) == 0
    told = [line for line in caplog.messages if "pretrain" in line]
    log = tmp_path / "run" / "pretrain" / "log.jsonl"
    assert told[0] == f"Stage pretrain: steps 0 to 4, log {log}."
    losses, scores = [[line for line in log_lines(log.parent) if key in line] for key in ("loss", "eval_perplexity")]
    for line, logged in zip(told[1:3], losses, strict=True):
        start = f"pretrain: step {logged['step']}/4, loss {logged['loss']:.4g}, "
        assert line.startswith(start) and re.search(r", [\d,]+ tokens/s, [\d,]+ MB, \d\d:\d\d left$", line)
    assert told[3].startswith(f"pretrain: step 4/4, perplexity {scores[0]['eval_perplexity']:.4g} over {scores[0]['eval_events']}, ")
    assert len(told) == 4


def test_two_ranks_do_not_print_torchs_warnings(tmp_path):
    path = write_config(
        tmp_path,
        runs.settings(
            tmp_path,
            method="lm",
            student=runs.LLAMA,
            tokenizer_name_or_path=runs.llama_teacher(tmp_path),
            text=runs.write_text(tmp_path),
            max_steps=2,
        ),
    )
    process = torchrun("train", path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shown, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "find_unused_parameters" not in told and told.count("Stage train: steps 0 to 2, log ") == 1
    assert shown.splitlines()[2].startswith("train ") and shown.count("Next:") == 1


def test_what_print_config_prints_is_the_same_run(tmp_path, capsys):
    path = write_config(tmp_path, runs.glmd(tmp_path, runs.bert_teacher(tmp_path)))
    flags = ["--learning_rate", "1e-3", "--stages.pretrain.max_steps", "-1", "--options.temperature=3"]
    assert main(["train", path, "--print_config", *flags]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = read_config(load_yaml(tmp_path / "printed.yaml"))
    assert printed == read_config(load_yaml(path), flags)
    assert printed.stages["pretrain"].max_steps == -1 and printed.stages["task_words"].learning_rate == 1e-3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learning_rat", "1"], "fastkd train: --learning_rat is not a known flag; did you mean --learning_rate?"),
        (["--options.temperature", "0"], "options.temperature=0.0 must be "),
        (["--text.path", "/no/where.txt"], "path='/no/where.txt' is no file"),
        (["--stage", "distill"], "method glmd has no such stage"),
        (["--output_dir", "/dev/null/run"], "output_dir='/dev/null/run' cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(tmp_path, capsys, flags, sentence):
    path = write_config(tmp_path, runs.glmd(tmp_path, runs.bert_teacher(tmp_path)))
    assert main(["train", path, *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_a_file_that_is_not_there(capsys):
    assert main(["train", "/no/where.yaml"]) == 2
    assert "/no/where.yaml cannot be read" in capsys.readouterr().err


def test_a_non_finite_loss_is_code_1(tmp_path, capsys):
    path = write_config(tmp_path, runs.glmd(tmp_path, runs.bert_teacher(tmp_path)))
    assert main(["train", path, "--learning_rate", "1e36", "--warmup_steps", "0", "--save_steps", "1"]) == 1
    error = capsys.readouterr().err
    assert "fastkd train: Step 2 of stage pretrain has loss" in error and "Its training rows are [" in error
    assert [path.name for path in (tmp_path / "run").rglob("checkpoint-*")] == ["checkpoint-1"]


TERMINATE = """
import os, signal, sys
from fastkd.cli.main import main
from fastkd.train import loop

evaluate = loop.StageTrainer._evaluate
def interrupted(self, lines, flag):
    if self.at.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    evaluate(self, lines, flag)
loop.StageTrainer._evaluate = interrupted
sys.exit(main(sys.argv[1:]))
"""


def test_terminated_in_an_evaluation_loses_nothing(tmp_path):
    """SIGTERM: code 143, the step is saved, and the same command ends with the same bits as a run that nobody stopped."""
    config = runs.settings(
        tmp_path,
        teacher_model_name_or_path=runs.bert_teacher(tmp_path),
        text=runs.write_text(tmp_path),
        max_steps=7,
        gradient_accumulation_steps=2,
        eval_steps=3,
        save_steps=2,
    )
    path = write_config(tmp_path, config)
    stopped = run_python("-c", TERMINATE, "train", path)
    assert stopped.returncode == 128 + signal.SIGTERM == 143, stopped.stderr
    assert "fastkd train: stopped by SIGTERM; run the same command again to go on." in stopped.stderr
    stage = tmp_path / "run" / "pretrain"
    assert sorted(path.name for path in stage.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    resumed = run_python("-m", "fastkd", "train", path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"goes on from {stage / 'checkpoint-3'}" in resumed.stderr and "pretrain" in resumed.stdout
    whole = fastkd.distill({**config, "output_dir": str(tmp_path / "whole")})["pretrain"]
    assert same_bits(weights(whole), weights(stage / "student"))
    assert log_lines(tmp_path / "whole" / "pretrain") == log_lines(stage)
    assert json.loads((stage / "result.json").read_text())["scores"] == whole["scores"]


# ---- export and vocab


@pytest.mark.parametrize(("make", "auto"), [(runs.bert_teacher, "MaskedLM"), (runs.llama_teacher, "CausalLM")])
def test_an_exported_student_opens_with_plain_transformers(tmp_path, capsys, make, auto):
    import transformers

    config = runs.settings(
        tmp_path,
        teacher_model_name_or_path=make(tmp_path),
        text=runs.write_text(tmp_path),
        vocabulary={"keep": 0.5, "multiple_of": 8},
    )
    folder = fastkd.distill(config)["pretrain"]["student_dir"]
    assert main(["export", folder, "--output_dir", str(tmp_path / "exported")]) == 0
    assert "AutoTokenizer and AutoModel open it" in capsys.readouterr().out
    student, tokenizer = load_language_model(folder).eval(), load_tokenizer(folder)
    plain = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path / "exported").eval()
    plain_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert len(plain_tokenizer) == plain.config.vocab_size == student.vocabulary < len(tokenizer)
    compared = 0
    for line in tiny.lines()[:40]:  # the counted lines: most have dropped ids nowhere, and are the same tokens in both
        ids, slots = (t(line, return_tensors="pt").input_ids for t in (tokenizer, plain_tokenizer))
        if ids.shape != slots.shape or not torch.equal(student.to_ids(slots), ids):
            continue
        compared += 1
        with torch.no_grad():
            torch.testing.assert_close(plain(input_ids=slots).logits, student(ids), rtol=1e-5, atol=1e-5)
    assert compared >= 20
    assert main(["export", folder, "--output_dir", str(tmp_path / "exported")]) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err


def test_counts_and_a_pruned_model(tmp_path, capsys):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    teacher, text = runs.bert_teacher(tmp_path), runs.write_text(tmp_path)
    count = ["vocab", "count", "--model", teacher, "--data", text["path"], "--output_dir", str(tmp_path / "counts")]
    count += ["--documents", "line"]
    assert main(count) == 0
    first = capsys.readouterr().out
    assert " tokens in 48 rows; " in first and f"Saved in {tmp_path / 'counts'}" in first
    assert main(count) == 0 and capsys.readouterr().out == first
    old, counts = load_tokenizer(teacher), TokenCounts.load(tmp_path / "counts").counts
    rare = next(token for token, id in sorted(old.get_vocab().items()) if token.isalpha() and len(token) > 4 and not counts[id])
    prune = ["vocab", "prune", "--model", teacher, "--counts", str(tmp_path / "counts"), "--protected", rare]
    assert main([*prune, "--keep", "0.6", "--output_dir", str(tmp_path / "pruned")]) == 0
    assert "600 -> 384 vocabulary rows" in capsys.readouterr().out
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path / "pruned"), AutoTokenizer.from_pretrained(tmp_path / "pruned")
    whole = AutoModelForMaskedLM.from_pretrained(teacher)
    assert len(tokenizer) == model.config.vocab_size == 384
    rows, old_rows = model.get_input_embeddings().weight, whole.get_input_embeddings().weight
    for token, slot in tokenizer.get_vocab().items():
        assert torch.equal(rows[slot], old_rows[old.convert_tokens_to_ids(token)])
    assert tokenizer.tokenize(rare) == [rare]
    assert main([*prune, "--keep", "0.6", "--output_dir", str(tmp_path / "pruned")]) == 2
    for keep in ("0", "-1", "nan", "inf", "1e999", "-inf", "0.0"):
        capsys.readouterr()
        assert main([*prune, f"--keep={keep}", "--output_dir", str(tmp_path / "none")]) == 2
        told = capsys.readouterr().err
        assert "fastkd vocab: keep is " in told and told.count("\n") == 1 and not (tmp_path / "none").exists()


def test_counts_of_another_tokenizer_prune_nothing(tmp_path, capsys):
    text = runs.write_text(tmp_path)
    count = ["vocab", "count", "--model", runs.llama_teacher(tmp_path), "--data", text["path"]]
    assert main([*count, "--output_dir", str(tmp_path / "counts")]) == 0
    prune = ["vocab", "prune", "--model", runs.bert_teacher(tmp_path), "--counts", str(tmp_path / "counts"), "--keep", "0.5"]
    assert main([*prune, "--output_dir", str(tmp_path / "pruned")]) == 2
    assert "holds the counts of another tokenizer" in capsys.readouterr().err and not (tmp_path / "pruned").exists()
