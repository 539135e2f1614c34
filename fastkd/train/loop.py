"""The training loop of one stage: micro-batches, one optimizer step, evaluation, checkpoints that resume bit for bit."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.objective import Position, Stage
from .batches import BatchOrder, counter_torch_generator
from .checkpoint import load_checkpoint, newest_checkpoint, prune_checkpoints, save_checkpoint
from .config import StageArguments
from .log import Progress, RunLog, peak_memory_mb
from .schedule import learning_rate_factor, resolve_warmup
from .signals import Preempted, SignalFlag
from .state import load_optimizer_tensors, optimizer_tensors, restore_rng, rng_tensors

log = logging.getLogger("fastkd")
State = dict[str, Tensor]


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the weights were not updated."""


@dataclass
class Progressed:
    """Where the stage stands, beside tensors: all of it is in every checkpoint."""

    step: int = 0
    evaluated_step: int = -1
    best_step: int = -1
    best: dict[str, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)
    window_loss: float = 0.0
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class StageResult:
    """How a stage ended. `scores` are those of the weights that go on; `seconds` and `tokens` are of training alone."""

    stage: str
    steps: int
    kept_step: int
    scores: dict[str, float]
    seconds: float
    tokens: int
    peak_memory_mb: float


class StageTrainer:
    """Trains `stage` in `folder`; `run()` starts, or goes on from the newest checkpoint that verifies."""

    def __init__(self, stage: Stage, arguments: StageArguments, folder: Path, *, seed: int, device: torch.device) -> None:
        self.stage, self.arguments, self.folder, self.device = stage, arguments, folder, device
        self.seed = seed
        self.order = BatchOrder(stage.lengths, arguments.per_device_train_batch_size, seed, bucket=arguments.group_by_length)
        steps_per_epoch = max(1, self.order.batches_per_epoch // arguments.gradient_accumulation_steps)
        self.total_steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch)
        at_once = arguments.max_steps > 0
        self.eval_steps = arguments.eval_steps or (self.total_steps if at_once else min(steps_per_epoch, self.total_steps))
        self.save_steps = arguments.save_steps or self.eval_steps
        decay = arguments.lr_decay_steps
        self.decay_steps = round(decay * self.total_steps) if decay <= 1 else int(decay)
        self.warmup_steps = resolve_warmup(arguments.warmup_steps, self.decay_steps)
        self.names = {p: name for name, p in stage.objective.named_parameters() if p.requires_grad}
        if not self.names:
            raise ValueError(f"Stage {stage.name} has no parameter to train.")
        self.optimizer = _adamw(self.names, arguments)
        half = torch.bfloat16 if arguments.bf16 else torch.float16
        self.autocast: Callable[[], Any] = (
            (lambda: torch.autocast(device.type, dtype=half)) if arguments.bf16 or arguments.fp16 else contextlib.nullcontext
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=arguments.fp16)
        self.at = Progressed()
        self.best_state: State = {}
        self.saved_step = -1

    def run(self) -> StageResult:
        """Train to the end; the student then holds the weights that go on."""
        stage = self.stage
        stage.objective.train()
        resumed = newest_checkpoint(self.folder)
        if resumed is not None:
            self._load(resumed)
            log.info("Stage %s goes on from %s.", stage.name, resumed)
        with (
            SignalFlag() as flag,
            RunLog(self.folder, stage=stage.name, resume_step=self.at.step if resumed is not None else -1) as lines,
            Progress(self.total_steps, initial=self.at.step, description=stage.name) as bar,
        ):
            self.rng = rng_tensors()
            try:
                if stage.evaluate_first and self.at.evaluated_step < 0:
                    self._evaluate(lines, flag)
                while self.at.step < self.total_steps:
                    self._catch_up(lines, flag)
                    self._step(lines, flag)
                    bar.update()
                self._catch_up(lines, flag)
            except Preempted:
                self._save()
                raise
        if stage.keep == "best" and self.best_state:
            _load_state(stage.objective.student, self.best_state)
        kept_best = stage.keep == "best" and bool(self.best_state)
        return StageResult(
            stage=stage.name,
            steps=self.at.step,
            kept_step=self.at.best_step if kept_best else self.at.step,
            scores=self.at.best if kept_best else self.at.latest,
            seconds=self.at.seconds,
            tokens=self.at.tokens,
            peak_memory_mb=peak_memory_mb(),
        )

    def _step(self, lines: RunLog, flag: SignalFlag) -> None:
        """One optimizer step; nothing of it counts until it is complete, so that a signal may stop it anywhere."""
        arguments, objective = self.arguments, self.stage.objective
        started = time.perf_counter()
        self.rng = rng_tensors()
        first = self.at.step * arguments.gradient_accumulation_steps
        indices = range(first, first + arguments.gradient_accumulation_steps)
        batches = [self._micro_batch(i) for i in indices]
        denominator = sum(objective.weight(batch) for batch in batches)
        objective.begin_step(self._position())
        tokens = int(sum(batch.attention_mask.sum() for batch in batches))
        total = torch.zeros((), device=self.device)
        for batch in batches:
            flag.poll()
            with self.autocast():
                loss = objective(batch.to(self.device), denominator)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        limit = arguments.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(list(self.names), limit))
        factor = learning_rate_factor(
            arguments.lr_scheduler_type,
            self.at.step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            final_ratio=arguments.lr_final_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = factor * arguments.learning_rate
        step_loss = float(total)
        if not (math.isfinite(step_loss) and (math.isfinite(norm) or self.scaler.is_enabled())):
            self.optimizer.zero_grad()
            rows = [self.order.batch(i).tolist() for i in indices]
            raise NonFiniteError(
                f"Step {self.at.step + 1} of stage {self.stage.name} has loss {step_loss} and gradient norm {norm}; the weights were "
                f"not updated. Its training rows are {rows}. Look at them, or lower learning_rate (now {arguments.learning_rate})."
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        objective.end_step()
        at = self.at
        at.step += 1
        at.tokens += tokens
        at.seconds += time.perf_counter() - started
        at.window_loss += step_loss
        if at.step % arguments.logging_steps == 0 or at.step == self.total_steps:
            window = (at.step - 1) % arguments.logging_steps + 1
            lines.write(
                {
                    "step": at.step,
                    "epoch": round(at.step * arguments.gradient_accumulation_steps / self.order.batches_per_epoch, 4),
                    "loss": at.window_loss / window,
                    "grad_norm": norm,
                    "learning_rate": factor * arguments.learning_rate,
                    "tokens_per_second": round(at.tokens / at.seconds, 1),
                    "peak_memory_mb": round(peak_memory_mb(), 1),
                    "seconds": round(at.seconds, 3),
                }
            )
            at.window_loss = 0.0

    def _micro_batch(self, index: int) -> Any:
        """Rows and whatever is drawn for them follow from the seed and the micro-batch's number alone."""
        generator = counter_torch_generator(self.seed, index)
        return self.stage.objective.prepare(self.stage.make_batch(self.order.batch(index), generator), generator)  # type: ignore[arg-type]

    def _position(self) -> Position:
        steps_per_epoch = self.order.batches_per_epoch / self.arguments.gradient_accumulation_steps
        return Position(self.at.step, self.total_steps, int(self.at.step / steps_per_epoch), self.total_steps / steps_per_epoch)

    def _catch_up(self, lines: RunLog, flag: SignalFlag) -> None:
        """Evaluate and save if that is due at this step and not done; so a run that was stopped in between does it on resuming."""
        step, end = self.at.step, self.at.step == self.total_steps
        if step == 0:
            return
        self.rng = rng_tensors()  # the finished step's: a signal during the evaluation saves this one
        if (step % self.eval_steps == 0 or end) and self.at.evaluated_step < step:
            self._evaluate(lines, flag)
        if step % self.save_steps == 0 or end:
            self._save()

    def _evaluate(self, lines: RunLog, flag: SignalFlag) -> None:
        stage, at = self.stage, self.at
        if stage.evaluate is not None:
            with self.autocast():
                scores = stage.evaluate(flag.poll)
            lines.write({"step": at.step, **{f"eval_{name}": value for name, value in scores.items()}})
            sign = 1.0 if stage.higher_is_better else -1.0
            at.latest = scores
            if not at.best or sign * scores[stage.metric] > sign * at.best[stage.metric]:
                at.best, at.best_step = scores, at.step
                if stage.keep == "best":
                    self.best_state = {name: value.to("cpu", copy=True) for name, value in _state(stage.objective.student).items()}
        at.evaluated_step = at.step

    def _save(self) -> None:
        if self.saved_step == self.at.step:
            return
        tensors = {
            **{name: _state(module) for name, module in self._changing().items()},
            "optimizer": optimizer_tensors(self.optimizer, self.names),
            "rng": self.rng,
        }
        if self.best_state:
            tensors["best"] = self.best_state
        save_checkpoint(self.folder, self.at.step, tensors, {**asdict(self.at), "scaler": self.scaler.state_dict()})
        prune_checkpoints(self.folder, self.arguments.save_total_limit)
        self.saved_step = self.at.step

    def _changing(self) -> dict[str, nn.Module]:
        """What a checkpoint holds: the student, unless it is frozen throughout, and what is kept beside it."""
        objective = self.stage.objective
        student = {"model": objective.student} if any(p.requires_grad for p in objective.student.parameters()) else {}
        return {**student, **objective.auxiliary()}

    def _load(self, path: Path) -> None:
        tensors, state = load_checkpoint(path, self.device)
        self.scaler.load_state_dict(state.pop("scaler"))
        for name, module in self._changing().items():
            _load_state(module, tensors[name])
        load_optimizer_tensors(self.optimizer, self.names, tensors["optimizer"])
        self.best_state = {name: value.cpu() for name, value in tensors.get("best", {}).items()}
        self.at = Progressed(**state)
        self.saved_step = self.at.step
        restore_rng(tensors["rng"])


def _adamw(names: dict[nn.Parameter, str], arguments: StageArguments) -> torch.optim.AdamW:
    """AdamW over two groups: matrices and embeddings are decayed, biases and norms are not."""
    groups = [
        {"params": [p for p in names if p.dim() >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in names if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
    )


def _state(module: nn.Module) -> State:
    """Every parameter once (tied ones under their first name), and the persistent buffers."""
    persistent = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return {name: value.detach() for name, value in {**dict(module.named_parameters()), **buffers}.items()}


def _load_state(module: nn.Module, state: State) -> None:
    own = _state(module)
    if own.keys() != state.keys():
        raise ValueError(f"The checkpoint holds other weights than the student: {sorted(own.keys() ^ state.keys())[:5]}.")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
