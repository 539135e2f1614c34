"""KDTrainer at the sizes of BERT-base and GPT-2 small: Trainer's callbacks, the eager loss and its gradient, and the saved student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from fastkd.integrations.hf import KDTrainer
from fastkd.models.truncate import keep_layers

pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'fastkd[hf]'")
import transformers
from transformers import TrainerCallback, TrainingArguments

STEPS, ROWS, LENGTH, TEMPERATURE = 2, 2, 16, 2.0


def bert() -> Any:
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (12, 768, 30_522)
    return transformers.BertForMaskedLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    assert (config.n_layer, config.n_embd, config.vocab_size) == (12, 768, 50_257)
    return transformers.GPT2LMHeadModel(config)


@dataclass
class Watch(TrainerCallback):
    """What Trainer tells its callbacks, in order, and the norm of the gradient before every step."""

    events: list[str] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.events.append("begin")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.events.append("step")

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.norms.append(gradient_norm(model))

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.events.append("log" if "loss" in logs else "log scores" if "eval_loss" in logs else "log end")

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        self.events.append("evaluate" if "eval_loss" in metrics else "?")

    def on_save(self, *_: Any, **__: Any) -> None:
        self.events.append("save")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.events.append("end")


def gradient_norm(model: torch.nn.Module) -> float:
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def rows(vocabulary: int) -> dict[str, Tensor]:
    """One batch: the second row is shorter, and every third token has a label."""
    ids = torch.randint(5, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 7]])
    labels = ids.masked_fill(~mask | (torch.arange(LENGTH) % 3 > 0), -100)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def eager_loss(student: Any, teacher: Any, batch: dict[str, Tensor], *, causal: bool) -> Tensor:
    """T^2 KL(teacher || student), the mean over tokens, and cross-entropy, the mean over labels, of logits as transformers has them."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target = teacher.eval()(**inputs).logits
    logits, labels, mask = student(**inputs).logits, batch["labels"], batch["attention_mask"].bool()
    log_p, log_q = ((z[mask] / TEMPERATURE).log_softmax(-1) for z in (target, logits))
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    divergence = kl_div(log_q, log_p, reduction="sum", log_target=True) / mask.sum()
    return TEMPERATURE**2 * divergence + cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("make", [bert, gpt2])
def test_a_pair_of_a_real_size_trains_through_the_callbacks_of_trainer(make: Callable[[], Any], tmp_path: Path):
    torch.manual_seed(0)
    teacher = make()
    student = keep_layers(teacher, "every:2")
    with torch.no_grad():  # of random weights they say nearly the same
        teacher.get_output_embeddings().weight.mul_(2)
    batch = rows(teacher.config.vocab_size)
    expected = eager_loss(student, teacher, batch, causal=make is gpt2)
    expected.backward()
    expected_norm = gradient_norm(student)
    student.zero_grad()

    watch = Watch()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=ROWS,
        train_sampling_strategy="sequential",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=STEPS,
        save_strategy="steps",
        save_steps=STEPS,
        save_only_model=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    dataset: Any = [{name: column[i] for name, column in batch.items()} for i in range(ROWS)]
    trainer = KDTrainer(
        student,
        args,
        teacher=teacher,
        method="kd",
        options={"temperature": TEMPERATURE, "completion_only": False},
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[watch],
    )
    trainer.train()

    assert watch.events == ["begin", *["step", "log"] * STEPS, "log scores", "evaluate", "save", "log end", "end"]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4) and watch.norms[0] == pytest.approx(expected_norm, rel=1e-4)
    (judged,) = (line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line)
    with torch.no_grad():
        assert judged == pytest.approx(eager_loss(student, teacher, batch, causal=make is gpt2).item(), rel=1e-4)
    assert losses[0] > losses[1] > judged

    opened = type(student).from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert opened.config.num_hidden_layers == 6
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in opened.state_dict().items())
