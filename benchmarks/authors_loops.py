"""The authors' loops, rewritten after their code: one training step of GLMD, CR-ILD and TED as each of their repositories computes it.

Not their code: what a step runs and what it materialises, in its order, on transformers' BERT with the eager attention of their models.
Left out is what would set the curves apart or has no part on one device: 16-bit floats and their casts, model parallelism, and their
own optimizers, for which torch's AdamW stands (GLMD has apex's, CR-ILD its BertAdam).

    GLMD     github.com/aitsc/GLMKD: distill/distill_model.py, distill/pretrain.py
    CR-ILD   github.com/jongwooko/CR-ILD: training_functions.py, losses.py
    TED      github.com/cliang1453/task-aware-distillation: text-classification/ted_glue_no_trainer.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, get_linear_schedule_with_warmup

from fastkd.methods.mixup import MixedBatch
from fastkd.models.filters import FilterBank
from fastkd.models.folder import VOCAB_MAP_FOLDER
from fastkd.models.load import load_config
from fastkd.tasks.text import IGNORE_INDEX
from fastkd.train.batches import counter_torch_generator
from fastkd.vocab.map import VocabMap

from .train_setup import FILTERS, PAD, SEED, Clock, Training

LossOf = Callable[[Any, int], Tensor]
"""(batch, its number) -> loss."""


def train(training: Training, clock: Clock) -> list[Tensor]:
    """Every step's loss."""
    trained, loss_of = METHODS[training.case.method](training)
    config, losses = training.config, []
    parameters = [(name, parameter) for module in trained for name, parameter in module.named_parameters()]
    groups = [
        {"params": [p for name, p in parameters if not _undecayed(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters if _undecayed(name)], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)
    scheduler = get_linear_schedule_with_warmup(optimizer, int(config.warmup_steps), training.steps)
    with clock:
        for number in range(training.steps):
            loss = loss_of(training.batch(number).to(training.device), number)
            loss.backward()
            if config.max_grad_norm > 0:
                nn.utils.clip_grad_norm_([parameter for _, parameter in parameters], config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return losses


def _undecayed(name: str) -> bool:
    return name.endswith("bias") or "LayerNorm" in name


def _glmd(training: Training) -> tuple[list[nn.Module], LossOf]:
    """Logits of both models everywhere; the teacher's over its whole vocabulary, of which the kept columns are then gathered. The
    hard labels' loss is computed and only logged."""
    load = partial(_model, AutoModelForMaskedLM, device=training.device)
    student, teacher = load(training.student_folder), load(training.teacher_folder).eval()
    vocab_map = VocabMap.load(training.student_folder / VOCAB_MAP_FOLDER)
    slots, kept = vocab_map.id_to_slot.to(training.device), vocab_map.kept_ids.to(training.device)
    temperature = training.options.temperature

    def loss_of(batch: Any, number: int) -> Tensor:
        mask = batch.attention_mask
        student_logits = student(input_ids=slots[batch.input_ids], attention_mask=mask).logits
        with torch.no_grad():
            teacher_logits = teacher(input_ids=batch.input_ids, attention_mask=mask).logits
        labels = torch.where(batch.labels == IGNORE_INDEX, batch.labels, slots[batch.labels.clamp_min(0)])
        functional.cross_entropy(student_logits.flatten(0, 1), labels.flatten())
        student_logits, teacher_logits = student_logits * mask[..., None], teacher_logits * mask[..., None]
        log_q = (student_logits / temperature).log_softmax(-1)
        p = (teacher_logits[..., kept] / temperature).softmax(-1)
        return temperature**2 * functional.kl_div(log_q, p, reduction="none").sum(-1).mean()

    return [student], loss_of


def _crild(training: Training) -> tuple[list[nn.Module], LossOf]:
    """The published command: Q, K and V relations of mixed rows, made for all layers of both models, of which the last ones are
    compared. Rows are padded to the longest allowed; there is a clean forward for a consistency that this command never computes, and
    `fit_dense` on all hidden states in every forward of the student."""
    load = partial(_model, AutoModelForSequenceClassification, device=training.device)
    student, teacher = _Shown(load(training.student_folder)), _Shown(load(training.teacher_folder).eval())
    fit_dense = nn.Linear(student.width, teacher.width).to(training.device)

    def run_student(*inputs: Any) -> dict[str, list[Tensor]]:
        seen, hidden = student(*inputs)
        for state in hidden:
            fit_dense(state)
        return seen

    def loss_of(batch: Any, number: int) -> Tensor:
        ids, mask = (_padded(x, training.size.length) for x in (batch.input_ids, batch.attention_mask))
        mixed = MixedBatch.draw(batch, counter_torch_generator(SEED, number))
        either = (mask + mask.flip(0)).clamp_max(1)
        with torch.no_grad():
            run_student(ids, mask, None)
            theirs, _ = teacher(ids, either, mixed)
        own = run_student(ids, either, mixed)
        losses = []
        for letter in "QKV":
            scores, targets = [_relation(x) for x in own[letter]], [_relation(x) for x in theirs[letter]]
            losses.append(-(targets[-1].softmax(-1) * scores[-1].log_softmax(-1)).sum(-1).mean())
        return torch.stack(losses).sum()

    return [student, fit_dense], loss_of


def _ted(training: Training) -> tuple[list[nn.Module], LossOf]:
    """The filtered states of all layers of both models, alive together; the teacher is given the labels too."""
    load = partial(_model, AutoModelForSequenceClassification, device=training.device)
    student, teacher = load(training.student_folder), load(training.teacher_folder).eval()
    teacher_bank, student_bank = (FilterBank.load(training.filters[name]).to(training.device) for name in FILTERS)
    teacher_bank.requires_grad_(False)
    options = training.options

    def run(model: nn.Module, bank: FilterBank, batch: Any) -> tuple[Any, list[Tensor]]:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
        output = model(**inputs, output_hidden_states=True)
        return output, [bank.filtered(k, output.hidden_states[layer]) for k, layer in enumerate(bank.shape.layers)]

    def loss_of(batch: Any, number: int) -> Tensor:
        output, own = run(student, student_bank, batch)
        with torch.no_grad():
            target, theirs = run(teacher, teacher_bank, batch)
        log_q, p = (output.logits / options.temperature).log_softmax(-1), (target.logits / options.temperature).softmax(-1)
        divergence = options.temperature**2 * functional.kl_div(log_q, p, reduction="batchmean")
        distances = [functional.mse_loss(mine, other) for mine, other in zip(own, theirs, strict=True)]
        return output.loss + options.kl_alpha * divergence + options.mse_alpha * torch.stack(distances).mean()

    return [student, student_bank], loss_of


METHODS: dict[str, Callable[[Training], tuple[list[nn.Module], LossOf]]] = {"glmd": _glmd, "crild": _crild, "ted": _ted}
"""What is trained, and a step's loss."""


class _Shown(nn.Module):
    """A BERT that shows Q, K and V of all layers and mixes what it embeds, as the model code of CR-ILD's authors does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.mixed = model, None
        self.seen: dict[str, list[Tensor]] = {}
        self.width, self.heads = model.config.hidden_size, model.config.num_attention_heads
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            for letter, module in zip("QKV", (attention.query, attention.key, attention.value), strict=True):
                module.register_forward_hook(partial(self._show, letter))
        model.bert.embeddings.register_forward_hook(lambda module, inputs, state: self.mixed.embed(state) if self.mixed else state)

    def _show(self, letter: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen[letter].append(output.unflatten(-1, (self.heads, -1)).transpose(1, 2))

    def forward(self, ids: Tensor, mask: Tensor, mixed: Any) -> tuple[dict[str, list[Tensor]], Any]:
        self.seen, self.mixed = {letter: [] for letter in "QKV"}, mixed
        hidden = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return self.seen, hidden


def _relation(x: Tensor) -> Tensor:
    """(B, heads, S, d) -> scores (B, heads, S, S)."""
    return x @ x.mT / x.shape[-1] ** 0.5


def _padded(x: Tensor, length: int) -> Tensor:
    return functional.pad(x, (0, length - x.shape[1]), value=PAD)


def _model(auto: Any, folder: Path, *, device: torch.device) -> Any:
    config = load_config(str(folder))  # plain transformers refuses that of a student on a kept vocabulary
    return auto.from_pretrained(folder, config=config, attn_implementation="eager").to(device).train()
