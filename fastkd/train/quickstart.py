"""The quickstart: a teacher and five students on Python's own library, in minutes, on any machine and without a network.

A byte-level BPE tokenizer and a small decoder (the teacher, which reads all files) are made once and cached. A smaller student on half
the vocabulary has few of them, which is what distillation is for. From the same weights, on the same rows in the same order, it is
trained on hard labels alone, by plain full-vocabulary distillation, and by GLMD; and by the first two for as long as GLMD took.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..methods.perplexity import events, perplexity
from ..models.load import load_frozen, load_language_model, load_tokenizer
from ..models.student import count_parameters
from ..sealed import Damaged, seal, verify
from ..store import new_folder, write_bytes_atomic, write_json_atomic
from ..tasks.corpus import open_corpus
from ..tasks.text import TextBatch, collate_text
from ..tasks.tokenized import tokenize_corpus
from .config import RunConfig, read_config
from .curves import perplexity_over, plot_curves
from .log import LOG_FILE, read_log
from .output import RESULTS_FILE, check_results
from .run import distill
from .schema import to_yaml

log = logging.getLogger("fastkd")
CURVES_FILE = "curves.png"
CONFIG_FILE = "distil.yaml"
"""What `fastkd train` runs for the student that the method distils."""

VOCABULARY = 8192
LENGTH = 128
TEACHER_STEPS = 700
STUDENT_STEPS = 400
STUDENT_DOCUMENTS = 300
"""Of the 4934 that the teacher reads."""
TEST_ROWS = 400
STUDENTS = {"student_alone": "lm", "student_kd": "kd", "student_distilled": "glmd"}
"""Methods, by the names of the students that are trained for as many steps."""
EQUAL_TIME = {"student_alone_equal_time": "student_alone", "student_kd_equal_time": "student_kd"}
"""Students that are trained as long as `student_distilled`, by the name of what they are trained like."""


def glmd_config(output_dir: Path, seed: int) -> RunConfig:
    """What `fastkd train` would run for the student that GLMD distils."""
    return _student_config(output_dir, seed, "student_distilled", STUDENT_STEPS)


def quickstart(output_dir: Path, seed: int = 0) -> dict[str, Any]:
    """Run it all, or what is not finished yet; return what is written to results.json."""
    folder = output_dir / f"seed-{seed}"
    check_quickstart_folders(output_dir, folder)
    started = time.perf_counter()
    tokenizer_dir = make_tokenizer(output_dir / "tokenizer", VOCABULARY)
    teacher_result = distill(teacher_config(output_dir))["train"]
    results = {}
    for name in STUDENTS:
        log.info("Training %s.", name)
        results[name] = next(iter(distill(_student_config(output_dir, seed, name, STUDENT_STEPS)).values()))
    for name, like in EQUAL_TIME.items():
        steps = max(1, round(STUDENT_STEPS * results["student_distilled"]["seconds"] / results[like]["seconds"]))
        log.info("Training %s for %d steps.", name, steps)
        results[name] = next(iter(distill(_student_config(output_dir, seed, name, steps)).values()))

    batches = _test_batches(output_dir, tokenizer_dir)
    teacher = load_frozen(_teacher_dir(output_dir))
    distilled = load_language_model(results["student_distilled"]["student_dir"])
    assert distilled.vocab_map is not None
    kept = distilled.vocab_map
    scores = {"teacher": perplexity(teacher, batches, fold=kept)}
    kept_scores = {"teacher": perplexity(teacher, batches, kept_only=kept)}
    for name in results:
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
        "steps": {"teacher": teacher_result["steps"], **{name: result["steps"] for name, result in results.items()}},
        "train_seconds": {"teacher": teacher_result["seconds"], **{name: result["seconds"] for name, result in results.items()}},
        "student_documents": STUDENT_DOCUMENTS,
    }
    write_bytes_atomic(folder / CONFIG_FILE, to_yaml(glmd_config(output_dir, seed), defaults=False).encode())
    for place in (folder, output_dir):
        write_json_atomic(place / RESULTS_FILE, summary)
    _draw(folder)
    return summary


def check_quickstart_folders(output_dir: Path, folder: Path) -> None:
    """Create the folder of all quickstarts; refuse it, or the `folder` of this one in it, where results that are not ours lie."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for place in (output_dir, folder):
        check_results(place, ("method", "seed", "student_dir", "train_seconds"), [CURVES_FILE, CONFIG_FILE])


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


def teacher_config(output_dir: Path) -> RunConfig:
    """What `fastkd train` would run for the teacher."""
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


_OPTIONS: dict[str, dict[str, Any]] = {
    "lm": {},
    "kd": {"temperature": 1.0, "label_weight": 1.0},
    "glmd": {"temperature": 1.0, "teacher_mass": "slots"},
}


def _student_config(output_dir: Path, seed: int, name: str, steps: int) -> RunConfig:
    method = STUDENTS[EQUAL_TIME.get(name, name)]
    return read_config(
        {
            **_shared(output_dir),
            "text": _text(max_rows=STUDENT_DOCUMENTS),
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
            "options": _OPTIONS[method],
            "max_steps": steps,
            "learning_rate": 5e-3,
            "eval_steps": max(1, steps // 5),
            "save_steps": steps,
            "seed": seed,
            # How long "as long as GLMD" is differs from run to run, so a second call begins it anew.
            "overwrite_output_dir": name in EQUAL_TIME,
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
    """Perplexity on the development files over the time of training, one curve for each student that trains as long as GLMD."""
    series = {}
    for label, name in zip(("hard labels", "plain KD", "GLMD, no labels"), (*EQUAL_TIME, "student_distilled"), strict=True):
        (log_file,) = (folder / name).glob(f"*/{LOG_FILE}")
        lines = read_log(log_file, strict=False)
        series[label] = _over_time(lines)
    ylabel = perplexity_over(lines)
    title, xlabel = "Student on held-out files", "seconds of training"
    plot_curves(series, folder / CURVES_FILE, title=title, xlabel=xlabel, ylabel=ylabel, log_y=True)


def _over_time(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(seconds of training, perplexity) wherever there is one; a log tells the seconds every few steps."""
    points, seconds = [], 0.0
    for line in lines:
        seconds = line.get("seconds", seconds)
        if "eval_perplexity" in line:
            points.append((seconds, float(line["eval_perplexity"])))
    return points
