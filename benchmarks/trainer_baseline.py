"""The same distillation in transformers' Trainer with eager losses: what a competent user writes in `compute_loss`.

Trainer's defaults hold where nothing is said, its fused AdamW among them. Nothing is logged, saved or judged. So that both loss curves
are of the same steps, it is given fastkd's batches: the order of rows, in which rows of one length are together as by
`group_by_length`, the masks, and pads to the longest row. They are made as they are asked for, in the time that is measured.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, PrinterCallback, Trainer, TrainingArguments

from .train_setup import Clock, Training


class DistillationTrainer(Trainer):
    """mean over tokens of T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + label_weight * cross-entropy of masked tokens."""

    def __init__(self, training: Training, args: TrainingArguments) -> None:
        super().__init__(AutoModelForMaskedLM.from_pretrained(training.student_folder), args)
        self.training, self.options = training, training.options
        self.teacher = AutoModelForMaskedLM.from_pretrained(training.teacher_folder).eval().requires_grad_(False).to(args.device)
        self.losses: list[Tensor] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels, mask, temperature = inputs.pop("labels"), inputs["attention_mask"], self.options.temperature
        logits = model(**inputs).logits.float()
        with torch.no_grad():
            target = (self.teacher(**inputs).logits.float() / temperature).softmax(-1)
        divergence = functional.kl_div((logits / temperature).log_softmax(-1), target, reduction="none").sum(-1)
        loss = temperature**2 * (divergence * mask).sum() / mask.sum()
        if self.options.label_weight > 0:
            loss = loss + self.options.label_weight * functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.losses.append(loss.detach())
        return loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The numbers of the batches, each of which becomes one."""
        numbers: Any = range(self.training.steps)

        def collate(number: Any) -> dict[str, Tensor]:
            return vars(self.training.batch(number))

        return DataLoader(numbers, batch_size=None, collate_fn=collate, pin_memory=self.args.dataloader_pin_memory)


def train(training: Training, clock: Clock) -> list[Tensor]:
    """Every step's loss."""
    config = training.config
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=config.per_device_train_batch_size,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_epsilon=config.adam_epsilon,
            max_grad_norm=config.max_grad_norm,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            use_cpu=config.use_cpu,
            seed=config.seed,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            dataloader_pin_memory=not config.use_cpu,
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(training, args)
        trainer.remove_callback(PrinterCallback)
        with clock:
            trainer.train()
    return trainer.losses
