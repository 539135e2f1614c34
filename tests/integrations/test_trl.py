"""TRL's trainers on fastkd: the values, gradients and entropies of the installed trl, and an undisturbed TRL after the block."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastkd.integrations import trl as ours
from tests import tiny
from tests.integrations.peer_packages import DEVICE
from tests.oracle import assert_close

BATCH, LENGTH, VOCABULARY = 3, 5, 41
BETAS = (0.0, 0.3, 0.5, 1.0)
COUNTS = (None, 23, torch.tensor(17.5))
"""num_items_in_batch, as trainers give it."""


@pytest.fixture
def distillation() -> Any:
    return installed("trl.trainer.distillation_trainer")


@pytest.fixture
def gkd() -> Any:
    return installed("trl.experimental.gkd.gkd_trainer")


def installed(module: str) -> Any:
    return pytest.importorskip(module, reason="trl is not installed (make .venv/bench)", exc_type=ImportError)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def chunked_arguments(dtype: torch.dtype, *, masked: bool, bias: bool) -> dict[str, Any]:
    """By the names of `_chunked_divergence_loss`; the student's require gradients."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64, device=DEVICE)
    if masked:
        mask[0, 2:], mask[2] = 0, 0
    tensors: dict[str, Any] = {
        "student_hidden_states": normal(BATCH, LENGTH, 8, seed=0, dtype=dtype).requires_grad_(),
        "teacher_hidden_states": normal(BATCH, LENGTH, 6, seed=1, dtype=dtype),
        "student_lm_head_weight": normal(VOCABULARY, 8, seed=2, dtype=dtype).requires_grad_(),
        "teacher_lm_head_weight": normal(VOCABULARY, 6, seed=3, dtype=dtype),
        "completion_mask": mask,
    }
    if bias:
        tensors["student_lm_head_bias"] = normal(VOCABULARY, seed=4, dtype=dtype).requires_grad_()
        tensors["teacher_lm_head_bias"] = normal(VOCABULARY, seed=5, dtype=dtype)
    return tensors


def values_and_gradients(loss: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    """What `loss` returns, and the gradients of 3 times the first value."""
    found = loss(**arguments)
    values = found if isinstance(found, tuple) else (found,)
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    return [*values, *torch.autograd.grad(3.0 * values[0], leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    for number, (given, truth) in enumerate(zip(found, expected, strict=True)):
        assert_close(given, truth, tolerance, f"value or gradient {number}")


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"softcap": 3.0}, {"scale": -1.3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize(("temperature", "masked", "bias"), [(1.0, False, False), (2.5, True, False), (0.7, True, True)])
@pytest.mark.parametrize("beta", BETAS)
def test_the_chunked_divergence_is_trls(
    beta: float, temperature: float, masked: bool, bias: bool, options: dict[str, float], distillation: Any
) -> None:
    """Loss, entropy and count; every gradient. TRL computes in float32 whatever it is given."""
    settings: dict[str, Any] = {"beta": beta, "temperature": temperature}
    for side in ("student", "teacher"):
        settings[f"{side}_logit_scale"] = options.get("scale", 1.0)
        settings[f"{side}_final_logit_softcapping"] = options.get("softcap")
    for dtype in (torch.float32, torch.float64):
        arguments = {**chunked_arguments(dtype, masked=masked, bias=bias), **settings}
        expected = values_and_gradients(distillation._chunked_divergence_loss, arguments)
        assert_same(values_and_gradients(ours.chunked_divergence_loss, arguments), expected)


@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_the_count_of_the_step_is_the_denominator(count: Any, distillation: Any) -> None:
    arguments = {**chunked_arguments(torch.float32, masked=True, bias=False), "beta": 0.5, "num_items_in_batch": count}
    expected = values_and_gradients(distillation._chunked_divergence_loss, arguments)
    assert_same(values_and_gradients(ours.chunked_divergence_loss, arguments), expected)


def test_a_rank_without_tokens_has_zeros(distillation: Any) -> None:
    arguments = {**chunked_arguments(torch.float32, masked=True, bias=True), "beta": 1.0}
    arguments["completion_mask"] = torch.zeros_like(arguments["completion_mask"])
    found = values_and_gradients(ours.chunked_divergence_loss, arguments)
    assert_same(found, values_and_gradients(distillation._chunked_divergence_loss, arguments))
    assert all(bool((value == 0).all()) for value in found)


def test_a_float32_head_of_16_bit_states_is_cast_as_by_trl(distillation: Any) -> None:
    arguments = chunked_arguments(torch.float32, masked=True, bias=False)
    arguments |= {name: x.detach().bfloat16() for name, x in arguments.items() if name.endswith("hidden_states")}
    arguments["student_hidden_states"].requires_grad_()
    arguments["beta"] = 0.5
    expected = values_and_gradients(distillation._chunked_divergence_loss, arguments)
    assert_same(values_and_gradients(ours.chunked_divergence_loss, arguments), expected, 1e-2)


@pytest.mark.parametrize(("reduction", "labelled"), itertools.product(("batchmean", "mean", "sum"), (False, True)))
@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_of_gkd_is_trls(beta: float, reduction: str, labelled: bool, gkd: Any) -> None:
    labels = torch.full((BATCH, LENGTH), 7, device=DEVICE)
    labels[:, :2], labels[1] = -100, -100
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-9)):
        for temperature, count in itertools.product((1.0, 2.5), COUNTS):
            arguments = {
                "student_logits": normal(BATCH, LENGTH, VOCABULARY, seed=0, dtype=dtype).requires_grad_(),
                "teacher_logits": normal(BATCH, LENGTH, VOCABULARY, seed=1, dtype=dtype),
                "labels": labels if labelled else None,
                "beta": beta,
                "temperature": temperature,
                "reduction": reduction,
                "num_items_in_batch": count,
            }
            expected = values_and_gradients(gkd.GKDTrainer.generalized_jsd_loss, arguments)
            assert_same(values_and_gradients(ours.generalized_jsd_loss, arguments), expected, tolerance)


def test_values_for_every_token_and_id_are_refused() -> None:
    logits = normal(1, 2, 3, seed=0)
    with pytest.raises(ValueError, match="reduction='none' has a value for every token and id"):
        ours.generalized_jsd_loss(logits, logits, reduction="none")


def test_the_block_ends_with_trls_own_losses(distillation: Any, gkd: Any) -> None:
    before = distillation._chunked_divergence_loss, vars(gkd.GKDTrainer)["generalized_jsd_loss"]

    def fail_inside() -> None:
        with ours.patch_trainers():
            assert distillation._chunked_divergence_loss is ours.chunked_divergence_loss
            assert gkd.GKDTrainer.generalized_jsd_loss is ours.generalized_jsd_loss
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert (distillation._chunked_divergence_loss, vars(gkd.GKDTrainer)["generalized_jsd_loss"]) == before


def test_another_version_of_trl_is_refused(distillation: Any, gkd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gkd.GKDTrainer.generalized_jsd_loss
    monkeypatch.setattr(distillation, "_chunked_divergence_loss", lambda hidden, beta: None)
    with pytest.raises(RuntimeError, match=r"_chunked_divergence_loss of TRL 1\.16\.0 takes \(hidden, beta\)"), ours.patch_trainers():
        pass
    monkeypatch.delattr(distillation, "_chunked_divergence_loss")
    with pytest.raises(RuntimeError, match=r"takes \(\), and fastkd knows TRL 1\.16"), ours.patch_trainers():
        pass
    assert gkd.GKDTrainer.generalized_jsd_loss is original


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% if m.role == 'assistant' %}[EOS]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "user", "assistant")


def tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[EOS]", *WORDS]
    splitter = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    splitter.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    made = PreTrainedTokenizerFast(tokenizer_object=splitter, **special)
    made.chat_template = TEMPLATE
    return made


def log_of(trainer_class: Any, config_class: Any, rows: dict[str, list[Any]], folder: Path, **settings: Any) -> list[tuple[float, ...]]:
    """(loss, entropy where it is logged) of four micro-batches in two steps."""
    fixed = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "bf16": False}
    quiet = {"logging_steps": 1, "report_to": [], "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True}
    args = config_class(str(folder), **fixed, **quiet, **settings)
    shape = {"vocab_size": 3 + len(WORDS), "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2}
    student, teacher = (tiny.transformer("qwen2", "CausalLM", seed=seed, **shape) for seed in (0, 1))
    data = Dataset.from_dict(rows)
    trainer = trainer_class(model=student, teacher_model=teacher, args=args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return [(line["loss"], *([line["entropy"]] if "entropy" in line else [])) for line in trainer.state.log_history if "loss" in line]


def test_trainers_distil_as_before(distillation: Any, gkd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("linear_kl_div", "kl_div"):
        op = getattr(ours, name)
        monkeypatch.setattr(ours, name, lambda *x, name=name, op=op, **options: (calls.append(name), op(*x, **options))[1])
    texts = [("the cat sat on", "the mat and then ran"), ("a dog", "sat under the tree")]
    chats = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in texts]
    runs = {
        "linear_kl_div": partial(
            log_of,
            distillation.DistillationTrainer,
            distillation.DistillationConfig,
            {"prompt": [asked for asked, _ in texts] * 4},
            tmp_path,
            beta=0.5,
            temperature=0.9,
            max_completion_length=6,
        ),
        "kl_div": partial(log_of, gkd.GKDTrainer, gkd.GKDConfig, {"messages": chats * 4}, tmp_path, beta=0.3, lmbda=0.0),
    }
    for op, run in runs.items():
        expected = run()
        assert not calls
        with ours.patch_trainers():
            found = run()
        assert calls == [op] * 4
        calls.clear()
        assert_close(torch.tensor(found), torch.tensor(expected), 1e-4)
        assert len(expected) == 2 and expected[0][0] > 1e-4
