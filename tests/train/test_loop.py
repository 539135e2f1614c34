"""The loop on a toy: what one step computes, what is kept, and that no stop at any instant changes a bit of the result."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastkd.methods.objective import Objective, Share, Stage
from fastkd.train import checkpoint
from fastkd.train.batches import counter_torch_generator
from fastkd.train.checkpoint import list_checkpoints, load_checkpoint
from fastkd.train.config import StageArguments
from fastkd.train.loop import NonFiniteError, StageResult, StageTrainer
from fastkd.train.signals import Preempted
from tests.runs import log_lines, same_bits, timeless

ROWS, WIDTH = 20, 6


@dataclass(frozen=True)
class ToyBatch:
    input_ids: Tensor
    attention_mask: Tensor
    noise: Tensor

    def to(self, device: torch.device | str) -> ToyBatch:
        return self


class Regression(Objective):
    """mean over tokens of the squared distance to the rows' sums; `noise`, drawn for the batch, plays the part of masking."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(dropout), nn.LayerNorm(8), nn.Linear(8, 1))
        self.calls = 0
        self.on_batch: Callable[[int], None] = lambda number: None
        self.broken_at = -1

    def weight(self, batch: ToyBatch) -> float:
        return float(batch.attention_mask.sum())

    def forward(self, batch: ToyBatch, denominator: float) -> Tensor:
        self.on_batch(self.calls)
        self.calls += 1
        inputs = batch.input_ids.float() * batch.attention_mask
        error = self.student(inputs + batch.noise).squeeze(-1) - inputs.sum(-1)
        loss = (error**2 * batch.attention_mask.sum(-1)).sum() / denominator
        return loss * math.nan if self.calls == self.broken_at else loss


class Toy:
    """A stage, its trainer, and hooks that a test hangs a signal or an error on."""

    def __init__(
        self,
        folder: Path,
        *,
        dropout: float = 0.2,
        noise: float = 0.1,
        scores: Sequence[float] | None = None,
        keep: str = "best",
        evaluate_first: bool = False,
        **arguments: Any,
    ) -> None:
        generator = np.random.default_rng(0)
        lengths = generator.integers(2, WIDTH + 1, ROWS)
        rows = torch.from_numpy(generator.integers(1, 5, (ROWS, WIDTH)))
        self.objective = Regression(dropout)
        self.evaluations = 0
        self.on_evaluation: Callable[[int], None] = lambda number: None
        self.batches = 0

        def make_batch(indices: Sequence[int], rng: torch.Generator) -> ToyBatch:
            self.batches += 1
            mask = (torch.arange(WIDTH) < torch.tensor(lengths[indices])[:, None]).long()
            return ToyBatch(rows[indices], mask, noise * torch.randn(len(indices), WIDTH, generator=rng))

        def evaluate(share: Share) -> dict[str, float]:
            self.on_evaluation(self.evaluations)
            share.poll()
            self.objective.student.eval()
            with torch.no_grad():
                error = float((self.objective.student(rows.float()).squeeze(-1) - rows.sum(-1)).square().mean())
            self.objective.student.train()
            score = error if scores is None else scores[self.evaluations]
            self.evaluations += 1
            return {"error": score}

        stage = Stage("toy", self.objective, lengths, make_batch, evaluate, "error", False, evaluate_first, keep)
        settings = {"learning_rate": 0.05, "max_steps": 7, "per_device_train_batch_size": 3, "logging_steps": 1, **arguments}
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.trainer = StageTrainer(stage, StageArguments(**settings), folder, seed=0)

    def run(self) -> StageResult:
        return self.trainer.run()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.objective.student.state_dict().items()}


def same_end(left: Toy, right: Toy, results: tuple[StageResult, StageResult]) -> bool:
    """Weights, result, log and last checkpoint of two runs, all but the clock's."""
    states = [load_checkpoint(list_checkpoints(toy.folder)[0]) for toy in (left, right)]
    tensors = [{f"{file}.{name}": t for file, entries in found.items() for name, t in entries.items()} for found, _ in states]
    return (
        same_bits(left.weights(), right.weights())
        and timeless(vars(results[0])) == timeless(vars(results[1]))
        and log_lines(left.folder) == log_lines(right.folder)
        and same_bits(*tensors)
        and timeless(states[0][1]) == timeless(states[1][1])
    )


# ---- one step


def test_a_step_is_adamw_on_the_clipped_gradient_of_the_whole_steps_mean(tmp_path):
    """Against a loop written out: decay on matrices alone, warm-up, clipping, one denominator, each micro-batch's own generator."""
    toy = Toy(
        tmp_path,
        dropout=0.0,
        max_steps=3,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        weight_decay=0.3,
        warmup_steps=2,
        lr_scheduler_type="linear",
        lr_final_ratio=0.1,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-3,
    )
    order, make_batch = toy.trainer.order, toy.trainer.stage.make_batch
    truth = Regression(0.0)
    matrices = [p for p in truth.parameters() if p.dim() > 1]
    others = [p for p in truth.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}], betas=(0.8, 0.9), eps=1e-3
    )
    losses = []
    for step, rate in enumerate((0.0, 0.025, 0.05)):
        both = [make_batch(order.batch(i), counter_torch_generator(0, i)) for i in (2 * step, 2 * step + 1)]
        joined = ToyBatch(*(torch.cat([getattr(b, name) for b in both]) for name in ("input_ids", "attention_mask", "noise")))
        loss = truth(joined, float(joined.attention_mask.sum()))
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(list(truth.parameters()), 0.5))
        assert norm > 0.5
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append((loss.item(), norm, rate))
    toy.run()
    for name, value in truth.student.state_dict().items():
        torch.testing.assert_close(toy.weights()[name], value, rtol=1e-5, atol=1e-6)
    logged = [(x["loss"], x["grad_norm"], x["learning_rate"]) for x in log_lines(tmp_path) if "loss" in x]
    assert logged == [pytest.approx(values, rel=1e-4) for values in losses]


def test_accumulation_is_the_same_step(tmp_path):
    """8 rows at once, and 2 at a time: the same rows weigh the same, although the micro-batches hold unequal numbers of tokens."""
    toys = {}
    for size, times in ((8, 1), (2, 4)):
        toy = Toy(
            tmp_path / str(size),
            dropout=0.0,
            noise=0.0,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            group_by_length=False,
            warmup_steps=0,
        )
        # Without bucketing the order of batches still depends on their size: give both the rows 0..7, 8..15, 12..19.
        starts = {8: [0, 8, 12], 2: [0, 2, 4, 6, 8, 10, 12, 14, 12, 14, 16, 18]}[size]
        toy.trainer.order.batch = lambda i, starts=starts, size=size: np.arange(starts[i], starts[i] + size)  # type: ignore[method-assign]
        toy.run()
        toys[size] = toy
    for name, value in toys[8].weights().items():
        torch.testing.assert_close(toys[2].weights()[name], value, rtol=1e-5, atol=1e-6)
    losses = [[line["loss"] for line in log_lines(toy.folder) if "loss" in line] for toy in toys.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_log_means_over_its_window_and_counts_every_token(tmp_path):
    every = Toy(tmp_path / "1", max_steps=7)
    result = every.run()
    Toy(tmp_path / "3", max_steps=7, logging_steps=3).run()
    single = [line["loss"] for line in log_lines(tmp_path / "1") if "loss" in line]
    windows = {line["step"]: line["loss"] for line in log_lines(tmp_path / "3") if "loss" in line}
    assert windows == {3: pytest.approx(np.mean(single[:3])), 6: pytest.approx(np.mean(single[3:6])), 7: pytest.approx(single[6])}
    order, lengths = every.trainer.order, every.trainer.stage.lengths
    assert result.tokens == sum(lengths[order.batch(i)].sum() for i in range(7))


def test_epochs_decide_where_max_steps_does_not(tmp_path):
    toy = Toy(tmp_path, max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=2)  # 7 batches an epoch, 3 steps
    assert toy.run().steps == 5
    assert [line["step"] for line in log_lines(tmp_path) if "eval_error" in line] == [3, 5]


# ---- what is kept


def test_the_best_weights_go_on_and_ties_keep_the_earlier(tmp_path):
    scores = [3.0, 1.0, 2.0, 1.0, 5.0]
    toy = Toy(tmp_path, scores=scores, max_steps=4, eval_steps=1, save_total_limit=9, evaluate_first=True)
    result = toy.run()
    assert (result.kept_step, result.scores, result.steps) == (1, {"error": 1.0}, 4)
    saved, _ = load_checkpoint(tmp_path / "checkpoint-1")
    assert same_bits(toy.weights(), saved["model"])
    last, _ = load_checkpoint(tmp_path / "checkpoint-4")
    assert same_bits(last["best"], saved["model"]) and not same_bits(last["model"], saved["model"])


def test_the_last_weights_go_on_where_the_stage_says_so(tmp_path):
    toy = Toy(tmp_path, scores=[1.0, 2.0], keep="last", max_steps=2, eval_steps=1)
    result = toy.run()
    assert (result.kept_step, result.scores) == (2, {"error": 2.0})
    saved, _ = load_checkpoint(tmp_path / "checkpoint-2")
    assert same_bits(toy.weights(), saved["model"]) and "best" not in saved


def test_weights_given_to_a_stage_that_only_worsens_them_come_back(tmp_path):
    toy = Toy(tmp_path, scores=[1.0, 2.0], max_steps=1, warmup_steps=0, evaluate_first=True)
    given = toy.weights()
    assert toy.run().kept_step == 0
    assert same_bits(toy.weights(), given)
    assert [line["step"] for line in log_lines(tmp_path) if "eval_error" in line] == [0, 1]


# ---- a loss that is not finite


def test_a_non_finite_loss_updates_nothing(tmp_path):
    toy = Toy(tmp_path, gradient_accumulation_steps=2, save_steps=2)
    toy.objective.broken_at = 6  # the second micro-batch of the third step
    before: dict[str, Tensor] = {}

    def remember(number: int) -> None:
        if number == 4:
            before.update(toy.weights())

    toy.objective.on_batch = remember
    with pytest.raises(NonFiniteError) as refusal:
        toy.run()
    assert same_bits(toy.weights(), before)
    rows = toy.trainer.order.batch(5).tolist()  # of the broken micro-batch alone
    assert "Step 3 of stage toy has loss nan" in str(refusal.value)
    assert f"rows are {rows}." in str(refusal.value) and "lower learning_rate (now 0.05)" in str(refusal.value)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    whole = Toy(tmp_path / "whole", gradient_accumulation_steps=2, save_steps=2)
    mended = Toy(tmp_path, gradient_accumulation_steps=2, save_steps=2)
    assert same_end(whole, mended, (whole.run(), mended.run()))


def test_an_infinite_gradient_of_a_finite_loss_updates_nothing(tmp_path):
    toy = Toy(tmp_path)
    toy.objective.student[0].weight.register_hook(lambda gradient: gradient * math.inf)
    given = toy.weights()
    with pytest.raises(NonFiniteError, match=r"Step 1 .* gradient norm (inf|nan)"):
        toy.run()
    assert same_bits(toy.weights(), given)


# ---- exact resume


class Killed(BaseException):
    """SIGKILL for a test: nothing of the loop catches it."""


INTERRUPTED = {"gradient_accumulation_steps": 2, "eval_steps": 3, "save_steps": 2, "max_steps": 9, "evaluate_first": True}


def kill(number: int | None = None) -> None:
    raise Killed


def terminate(number: int | None = None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def at(moment: int, act: Callable[[], None]) -> Callable[[int], None]:
    return lambda number: act() if number == moment else None


@pytest.mark.parametrize("batch", range(0, 18, 3))
@pytest.mark.parametrize(("act", "error"), [(kill, Killed), (terminate, Preempted)], ids=["killed", "terminated"])
def test_stopped_at_any_micro_batch_ends_alike(tmp_path, batch, act, error):
    whole, first, second = (Toy(tmp_path / name, **INTERRUPTED) for name in ("whole", "stopped", "stopped"))
    expected = whole.run()
    first.objective.on_batch = at(batch, act)
    with pytest.raises(error):
        first.run()
    finished = (batch + 1) // 2  # the signal is heeded at the next micro-batch
    if act is terminate:  # nothing is lost: what is saved is the last finished step
        assert list_checkpoints(first.folder)[0].name == f"checkpoint-{finished}"
    resumed = second.run()
    assert second.batches == 18 - (finished * 2 if act is terminate else batch // 4 * 4)
    assert same_end(whole, second, (expected, resumed))


@pytest.mark.parametrize("evaluation", range(4))
@pytest.mark.parametrize(("act", "error"), [(kill, Killed), (terminate, Preempted)], ids=["killed", "terminated"])
def test_stopped_in_any_evaluation_ends_alike(tmp_path, evaluation, act, error):
    whole, first, second = (Toy(tmp_path / name, **INTERRUPTED) for name in ("whole", "stopped", "stopped"))
    expected = whole.run()
    first.on_evaluation = at(evaluation, act)
    with pytest.raises(error):
        first.run()
    resumed = second.run()
    assert same_bits(whole.weights(), second.weights())
    assert timeless(vars(expected)) == timeless(vars(resumed))
    assert log_lines(whole.folder) == log_lines(second.folder)
    if act is terminate and evaluation:
        assert second.batches == 18 - evaluation * 6


@pytest.mark.parametrize("save", range(5))
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_around_a_checkpoint_ends_alike(tmp_path, monkeypatch, save, moment):
    whole, first, second = (Toy(tmp_path / name, **INTERRUPTED) for name in ("whole", "stopped", "stopped"))
    expected = whole.run()
    saves, save_checkpoint = [], checkpoint.save_checkpoint

    def killing(*arguments: Any, **options: Any) -> None:
        saves.append(arguments)
        if len(saves) == save + 1 and moment == "before":
            kill()
        save_checkpoint(*arguments, **options)
        if len(saves) == save + 1:
            kill()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", killing)
        with pytest.raises(Killed):
            first.run()
    assert same_end(whole, second, (expected, second.run()))


def test_writing_in_the_background_changes_nothing(tmp_path):
    whole, background = Toy(tmp_path / "whole", **INTERRUPTED), Toy(tmp_path / "background", async_save=True, **INTERRUPTED)
    assert same_end(whole, background, (whole.run(), background.run()))


def test_what_is_written_in_the_background_is_of_the_step_it_was_asked_at(tmp_path, monkeypatch):
    """Training is two steps further when the files of step 3 are written, and they hold the weights of step 3."""
    steps = {"max_steps": 6, "eval_steps": 6, "save_steps": 3, "save_total_limit": 9}
    Toy(tmp_path / "whole", **steps).run()
    toy, further, save_checkpoint = Toy(tmp_path / "late", async_save=True, **steps), threading.Event(), checkpoint.save_checkpoint

    def late(output_dir: Path, step: int, *arguments: Any, **options: Any) -> Path:
        assert further.wait(60)
        return save_checkpoint(output_dir, step, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", late)
    toy.objective.on_batch = lambda number: further.set() if number == 5 else None
    toy.run()
    for name in ("checkpoint-3", "checkpoint-6"):
        found, expected = (load_checkpoint(tmp_path / run / name)[0] for run in ("late", "whole"))
        assert same_bits(found["model"], expected["model"]) and same_bits(found["optimizer"], expected["optimizer"])


def test_a_save_in_the_background_that_fails_is_not_lost(tmp_path, monkeypatch):
    save_checkpoint = checkpoint.save_checkpoint
    expected = Toy(tmp_path / "whole", max_steps=6, eval_steps=6, save_steps=2).run()

    def full(output_dir: Path, step: int, *arguments: Any, **options: Any) -> Path:
        if step == 2:
            raise OSError(28, "No space left on device")
        return save_checkpoint(output_dir, step, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        Toy(tmp_path / "stop", async_save=True, max_steps=6, eval_steps=6, save_steps=2).run()
    going_on = Toy(tmp_path / "on", async_save=True, max_steps=6, eval_steps=6, save_steps=2, save_failure="continue")
    assert timeless(vars(going_on.run())) == timeless(vars(expected))
    assert [path.name for path in list_checkpoints(tmp_path / "on")] == ["checkpoint-6", "checkpoint-4"]


def test_a_signal_after_the_last_micro_batch_is_not_swallowed(tmp_path, monkeypatch):
    """The stage is finished and saved; the run stops before its next stage all the same."""
    toy = Toy(tmp_path, max_steps=2)
    save_checkpoint = checkpoint.save_checkpoint

    def signalled(*arguments: Any, **options: Any) -> None:
        save_checkpoint(*arguments, **options)
        terminate()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", signalled)
        with pytest.raises(Preempted, match="SIGTERM; run the same command again"):
            toy.run()
    again = Toy(tmp_path, max_steps=2)
    assert again.run().steps == 2 and again.batches == 0


def test_a_run_with_another_student_is_not_resumed(tmp_path):
    Toy(tmp_path, max_steps=1).run()
    toy = Toy(tmp_path, max_steps=2)
    toy.objective.student.add_module("more", nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"other weights than the student.*more\.bias"):
        toy.run()


def test_old_signal_handlers_come_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    Toy(tmp_path, max_steps=1).run()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_finished_stage_is_not_trained_again(tmp_path):
    first = Toy(tmp_path)
    result = first.run()
    second = Toy(tmp_path)
    assert timeless(vars(second.run())) == timeless(vars(result))
    assert second.batches == 0 and same_bits(first.weights(), second.weights())
