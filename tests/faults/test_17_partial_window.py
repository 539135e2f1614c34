"""Fault 17: the last partial accumulation window; rows not divisible by the world size. Each counts once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.train.loop import StageTrainer
from fastkd.train.ranks import Ranks
from tests.train.test_loop import ROWS, Toy


def rows_seen(folder: Path, ranks: Ranks, **arguments: Any) -> list[list[int]]:
    """The rows of every micro-batch that this rank makes in six epochs."""
    toy = Toy(folder, max_steps=1, per_device_train_batch_size=3, **arguments)
    trainer = toy.trainer
    trainer.ranks, trainer.micro_batches = ranks, trainer.arguments.gradient_accumulation_steps * ranks.world_size
    seen: list[list[int]] = []
    while (trainer.at.step + 1) * trainer.micro_batches <= 6 * trainer.order.batches_per_epoch:
        seen += [trainer.order.batch(i).tolist() for i in trainer._own_micro_batches()]
        trainer.at.step += 1
    return seen


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_comes_once_an_epoch_over_all_ranks(tmp_path, accumulation, world_size):
    """20 rows in batches of 3: neither the batches nor their number divide. Windows run on over the end of an epoch."""
    seen = [
        rows_seen(tmp_path / f"{rank}", Ranks(rank, world_size), gradient_accumulation_steps=accumulation) for rank in range(world_size)
    ]
    in_order = [batch for window in zip(*seen, strict=True) for batch in window]
    per_epoch = -(-ROWS // 3)
    epochs = [in_order[start : start + per_epoch] for start in range(0, len(in_order) - per_epoch + 1, per_epoch)]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert Counter(row for batch in epoch for row in batch) == Counter(range(ROWS))


@pytest.mark.parametrize("accumulation", [2, 7])
def test_an_uneven_window_has_the_gradient_of_its_rows_as_one_batch(tmp_path, accumulation):
    """The epoch's last batch has 2 rows and the others 3, of different lengths: each token counts alike."""
    toy = Toy(tmp_path, dropout=0.0, noise=0.0, max_steps=1, gradient_accumulation_steps=accumulation)
    captured: dict[str, torch.Tensor] = {}
    trainer: StageTrainer = toy.trainer
    small = next(i for i in range(trainer.order.batches_per_epoch) if len(trainer.order.batch(i)) < 3)
    trainer.at.skipped = small // accumulation  # so the first step is that of the window which holds it
    step = trainer.optimizer.step

    def keep(*arguments: Any) -> Any:
        captured.update({name: parameter.grad.clone() for parameter, name in trainer.names.items()})
        return step(*arguments)

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    trainer.arguments = replace(trainer.arguments, max_grad_norm=0.0)
    first = trainer.at.skipped * accumulation
    rows = np.concatenate([trainer.order.batch(i) for i in range(first, first + accumulation)])
    batch = trainer.stage.make_batch(rows, torch.Generator())
    toy.objective(batch, toy.objective.weight(batch)).backward()
    expected = {name: parameter.grad.clone() for parameter, name in trainer.names.items()}
    toy.objective.zero_grad()
    toy.run()
    assert len(rows) % 3  # a smaller batch is among them
    for name, gradient in expected.items():
        torch.testing.assert_close(captured[name], gradient, rtol=1e-5, atol=1e-6)
