"""Two ranks compute what one process computes: DDP and FSDP2, every method, whatever a rank's share of the tokens is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fastkd
from fastkd.train.log import read_log
from tests import runs
from tests.ranks import spawn

ENGINES = {"ddp": {}, "fsdp": {"fsdp": True, "fsdp_teacher": True}}
WEIGHTS = 1e-4
"""How far sums of another order may take the weights, relatively, in the steps of a run; gradients move with them."""
# Gradients that are zero but for rounding (attention's key biases) would otherwise be made as large as any other.
EXACT = {"adam_epsilon": 1e-2, "learning_rate": 0.03, "warmup_steps": 0, "max_steps": 3}


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """Small runs of all methods, dropout on, by name; rows of many lengths."""
    text, dataset = runs.write_text(folder), runs.write_dataset(folder)
    bert, llama, classifier = runs.bert_teacher(folder), runs.llama_teacher(folder), runs.bert_classifier(folder)

    def of(method: str, teacher: str, **more: Any) -> dict[str, Any]:
        return runs.settings(folder, method=method, teacher_model_name_or_path=teacher, **{**EXACT, **more})

    stage = {"per_device_train_batch_size": 2}
    labelled = {"dataset": dataset, "student": {"num_hidden_layers": 1}}
    return {
        "glmd": {**runs.glmd(folder, bert), **EXACT, "per_device_train_batch_size": 2},
        "glmd-decoder": of("glmd", llama, text=text, **stage),
        "untied": of("kd", runs.llama_teacher(folder, 2, tie_word_embeddings=False), text=text, **stage),
        "kd-encoder": of("kd", bert, text=text, options={"label_weight": 1.0}, vocabulary={"keep": 0.5, "multiple_of": 8}, **stage),
        "crild": of("crild", classifier, stages={"ild": {}, "kd": {}}, options={"preset": "consistency", "ema_decay": 0.5}, **labelled),
        "crild-qkv": of("crild", classifier, stages={"ild": {}}, options={"preset": "paper_script"}, **labelled),
        "ted": of(
            "ted",
            classifier,
            stages={name: {} for name in ("student", "teacher_filters", "student_filters", "distill")},
            options={"teacher_filter_interval": 2},
            **labelled,
        ),
        "ted-text": of(
            "ted",
            llama,
            text=text,
            stages={name: {} for name in ("teacher_filters", "student_filters", "distill")},
            options={"teacher_filter_interval": 2},
            **stage,
        ),
        "ted-untied": of(
            "ted",
            runs.llama_teacher(folder, 2, tie_word_embeddings=False),
            text=text,
            stages={name: {} for name in ("teacher_filters", "student_filters", "distill")},
            options={"teacher_filter_interval": 2},
            **stage,
        ),
        # Few tokens have a label: whole micro-batches are without one.
        "unlabelled-rank": of("lm", bert, text=text, options={"mask_probability": 0.02}, per_device_train_batch_size=1),
    }


def made(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the stages of a run have made."""
    files = sorted(file for file in folder.glob("*/*/*.safetensors") if "checkpoint" not in str(file))
    return {f"{file.parent.relative_to(folder)}.{k}": v for file in files for k, v in safetensors.torch.load_file(file).items()}


def logs(folder: Path) -> list[dict[str, Any]]:
    return [runs.timeless(line) for file in sorted(folder.glob("*/log.jsonl")) for line in read_log(file)]


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 distance of two tensors. Of one whose values are zero but for rounding, relative to 1e-3 each."""
    assert found.keys() == expected.keys() and found
    scale = {k: max(float(v.double().norm()), 1e-3 * v.numel() ** 0.5) for k, v in expected.items()}
    return max(float((found[k].double() - v.double()).norm()) / scale[k] for k, v in expected.items())


def same_losses(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whether all that was logged is the same: losses to 2e-5, and what follows the weights to the first order as closely as they."""

    def is_same(name: str, value: float, truth: float) -> bool:
        return value == pytest.approx(truth, rel=WEIGHTS if name == "grad_norm" else 2e-5, abs=1e-7)

    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(is_same(k, a[k], b[k]) for k in a if isinstance(a[k], float))
        for a, b in zip(found, expected, strict=True)
    )


def run_all(rank: int, folder: str, cases: list[tuple[str, str, int]]) -> None:
    configs = json.loads((Path(folder) / "configurations.json").read_text())
    for name, engine, accumulation in cases:
        output = str(Path(folder) / f"{name}-{engine}-{accumulation}")
        fastkd.distill({**configs[name], **ENGINES[engine], "gradient_accumulation_steps": accumulation, "output_dir": output})


CASES = [
    (name, engine, accumulation)
    for name in (
        "glmd",
        "glmd-decoder",
        "untied",
        "crild",
        "crild-qkv",
        "ted",
        "ted-text",
        "ted-untied",
        "kd-encoder",
        "unlabelled-rank",
    )
    for engine in ENGINES
    for accumulation in ((1, 2, 4) if name in ("glmd", "crild", "ted", "unlabelled-rank") else (1,))
]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "configurations.json").write_text(json.dumps(configurations(folder)))
    spawn(run_all, str(folder), CASES, seconds=600)
    return folder


@pytest.fixture(scope="module")
def one_process(two_ranks: Path) -> Any:
    configs, results = json.loads((two_ranks / "configurations.json").read_text()), {}

    def run(name: str, accumulation: int) -> Path:
        output = two_ranks / f"{name}-one-{accumulation}"
        if output not in results:
            results[output] = fastkd.distill({**configs[name], "gradient_accumulation_steps": accumulation, "output_dir": str(output)})
        return output

    return run


@pytest.mark.parametrize(("name", "engine", "accumulation"), CASES, ids=lambda value: str(value))
def test_two_ranks_end_as_one_process(two_ranks, one_process, name, engine, accumulation):
    found, expected = two_ranks / f"{name}-{engine}-{accumulation}", one_process(name, 2 * accumulation)
    assert distance(made(found), made(expected)) < WEIGHTS
    assert same_losses(logs(found), logs(expected))
