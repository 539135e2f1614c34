"""The quickstart: a teacher and four students on Python's own library, in minutes, on any machine and without a network.

A byte-level BPE tokenizer and a small decoder (the teacher) are made once and cached. A smaller student on half the vocabulary is
then trained from the same initial weights on the same rows in the same order: on hard labels alone, by plain full-vocabulary
distillation, and by GLMD; and on hard labels once more for as long as GLMD took, teacher included.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..methods.perplexity import events, perplexity
from ..models.load import load_frozen, load_language_model, load_tokenizer
from ..models.student import count_parameters
from ..sealed import Damaged, seal, verify
from ..store import new_folder, write_json_atomic
from ..tasks.corpus import open_corpus
from ..tasks.text import TextBatch, collate_text
from ..tasks.tokenized import tokenize_corpus
from .config import RunConfig, read_config
from .curves import perplexity_over, plot_curves
from .log import LOG_FILE, read_log
from .output import RESULTS_FILE, check_results
from .run import distill

log = logging.getLogger("fastkd")
CURVES_FILE = "curves.png"

VOCABULARY = 8192
LENGTH = 128
TEACHER_STEPS = 1300
STUDENT_STEPS = 250
TEST_ROWS = 400
STUDENTS = ("student_alone", "student_kd", "student_distilled", "student_alone_equal_time")


def glmd_config(output_dir: Path, seed: int) -> RunConfig:
    """What `fastkd train` would run for the student that GLMD distils."""
    return _student_config(output_dir, seed, "student_distilled", STUDENT_STEPS)


def quickstart(output_dir: Path, seed: int = 0) -> dict[str, Any]:
    """Run it all, or what is not finished yet; return what is written to results.json."""
    folder = output_dir / f"seed-{seed}"
    check_quickstart_folders(output_dir, folder)
    started = time.perf_counter()
    tokenizer_dir = make_tokenizer(output_dir / "tokenizer", VOCABULARY)
    teacher_result = distill(_teacher_config(output_dir))["train"]
    results = {}
    for name in STUDENTS[:3]:
        log.info("Training %s.", name)
        results[name] = next(iter(distill(_student_config(output_dir, seed, name, STUDENT_STEPS)).values()))
    ratio = results["student_distilled"]["seconds"] / results["student_alone"]["seconds"]
    equal_time = max(STUDENT_STEPS, round(STUDENT_STEPS * ratio))
    log.info("Training student_alone_equal_time for %d steps.", equal_time)
    config = _student_config(output_dir, seed, STUDENTS[3], equal_time, overwrite=True)
    results[STUDENTS[3]] = next(iter(distill(config).values()))

    batches = _test_batches(output_dir, tokenizer_dir)
    teacher = load_frozen(_teacher_dir(output_dir))
    distilled = load_language_model(results["student_distilled"]["student_dir"])
    assert distilled.vocab_map is not None
    kept = distilled.vocab_map
    scores = {"teacher": perplexity(teacher, batches, fold=kept)}
    kept_scores = {"teacher": perplexity(teacher, batches, kept_only=kept)}
    for name in STUDENTS:
        student = load_frozen(results[name]["student_dir"])
        scores[name] = perplexity(student, batches)
        kept_scores[name] = perplexity(student, batches, kept_only=kept)
    summary = {
        "method": "glmd",
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "metric": "perplexity over mapped tokens, held-out files of the Python standard library",
        "events": events(kept, kept.vocab_size),
        "higher_is_better": False,
        **scores,
        "kept_tokens_only": kept_scores,
        "teacher_parameters": count_parameters(teacher),
        "student_parameters": count_parameters(distilled),
        "teacher_vocab": teacher.vocabulary,
        "student_vocab": distilled.vocabulary,
        "student_dir": results["student_distilled"]["student_dir"],
        "steps": {"teacher": teacher_result["steps"], **{name: results[name]["steps"] for name in STUDENTS}},
        "train_seconds": {"teacher": teacher_result["seconds"], **{name: results[name]["seconds"] for name in STUDENTS}},
    }
    for place in (folder, output_dir):
        write_json_atomic(place / RESULTS_FILE, summary)
    _draw(folder)
    return summary


def check_quickstart_folders(output_dir: Path, folder: Path) -> None:
    """Create the folder of all quickstarts; refuse it, or the `folder` of this one in it, where results that are not ours lie."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for place in (output_dir, folder):
        check_results(place, ("method", "seed", "student_dir", "train_seconds"), [CURVES_FILE])


def make_tokenizer(folder: Path, vocabulary: int, *, encoder: bool = False) -> Path:
    """A byte-level BPE tokenizer trained on the training files, made once; for an encoder, rows are [CLS] text [SEP]."""
    if folder.exists():
        try:
            verify(folder)
        except (Damaged, OSError) as error:
            raise ValueError(f"{folder} is not what this quickstart makes ({error}); name another --output_dir.") from error
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    log.info("Training a tokenizer of %d tokens.", vocabulary)
    special = ["[PAD]", "[CLS]", "[SEP]"] if encoder else ["<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(open_corpus("stdlib").rows(), trainer)
    names = {"eos_token": special[0], "pad_token": special[0]}
    if encoder:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    with new_folder(folder) as unfinished:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(unfinished)
        seal(unfinished, {"made_by": "fastkd quickstart"})
    return folder


def _text(**extra: Any) -> dict[str, Any]:
    return {"path": "stdlib", "train_split": "train", "eval_split": "dev", "max_length": LENGTH, "max_eval_rows": 60, **extra}


def _shared(output_dir: Path) -> dict[str, Any]:
    return {
        "cache_dir": str(output_dir / "cache"),
        "text": _text(),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "adam_beta2": 0.98,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "lr_final_ratio": 0.05,
        "logging_steps": 10,
    }


def _teacher_dir(output_dir: Path) -> str:
    return str(output_dir / "teacher" / "train" / "student")


def _teacher_config(output_dir: Path) -> RunConfig:
    return read_config(
        {
            **_shared(output_dir),
            "method": "lm",
            "output_dir": str(output_dir / "teacher"),
            "tokenizer_name_or_path": str(output_dir / "tokenizer"),
            "student": {
                "model_type": "llama",
                "hidden_size": 160,
                "intermediate_size": 448,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
                "bos_token_id": None,
                "eos_token_id": 0,
                "pad_token_id": 0,
            },
            "max_steps": TEACHER_STEPS,
            "learning_rate": 4e-3,
            "seed": 0,
        }
    )


def _student_config(output_dir: Path, seed: int, name: str, steps: int, *, overwrite: bool = False) -> RunConfig:
    method = {"student_kd": "kd", "student_distilled": "glmd"}.get(name, "lm")
    options: Mapping[str, Any] = {"glmd": {"temperature": 1.0}, "kd": {"temperature": 1.0, "label_weight": 1.0}, "lm": {}}[method]
    return read_config(
        {
            **_shared(output_dir),
            "method": method,
            "output_dir": str(output_dir / f"seed-{seed}" / name),
            "teacher_model_name_or_path": _teacher_dir(output_dir),
            "student": {
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 24,
            },
            "vocabulary": {"keep": 0.5},
            "options": dict(options),
            "max_steps": steps,
            "learning_rate": 5e-3,
            "eval_steps": max(1, steps // 5),
            "save_steps": steps,
            "seed": seed,
            "overwrite_output_dir": overwrite,
        }
    )


def _test_batches(output_dir: Path, tokenizer_dir: Path) -> list[TextBatch]:
    tokenizer: Any = load_tokenizer(str(tokenizer_dir))
    rows = tokenize_corpus(
        open_corpus("stdlib", split="test"), tokenizer, max_length=LENGTH, layout="packed", cache_dir=output_dir / "cache" / "tokens"
    )
    kept = [rows[i] for i in range(min(TEST_ROWS, len(rows)))]
    generator = torch.Generator()
    return [collate_text(kept[i : i + 25], pad_id=0, masking=None, generator=generator) for i in range(0, len(kept), 25)]


def _draw(folder: Path) -> None:
    """Perplexity on the development files over the steps, one curve a student."""
    labels = dict(zip(STUDENTS, ("hard labels alone", "plain KD", "GLMD", "hard labels, as long as GLMD"), strict=True))
    series = {}
    for name, label in labels.items():
        (log_file,) = (folder / name).glob(f"*/{LOG_FILE}")
        lines = read_log(log_file, strict=False)
        series[label] = [(line["step"], float(line["eval_perplexity"])) for line in lines if "eval_perplexity" in line]
    ylabel = perplexity_over(lines)
    plot_curves(series, folder / CURVES_FILE, title="Student on held-out files", xlabel="step", ylabel=ylabel, log_y=True)
