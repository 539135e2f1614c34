"""The training loop of one stage: micro-batches, one optimizer step, evaluation, checkpoints that resume bit for bit."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..methods.objective import Position, Share, Stage
from ..models.language_model import LanguageModel
from ..ops.backends import arithmetic
from .batches import BatchOrder, counter_torch_generator, seed_global_generators, total_steps
from .checkpoint import CheckpointWriter, checkpoint_identity, load_checkpoint, newest_checkpoint, on_cpu
from .config import StageArguments
from .log import LOG_FILE, Progress, RunLog, peak_memory_mb
from .parallel import Engine, gradient_norm
from .prefetch import MicroBatch, Prefetch
from .profile import BETWEEN, StepProfiler, section
from .ranks import Ranks
from .schedule import learning_rate_factor, resolve_warmup
from .signals import Preempted, SignalFlag
from .state import State, load_optimizer_tensors, module_tensors, optimizer_tensors, own_tensors, set_module_tensors

log = logging.getLogger("fastkd")
_DROPOUT = 1  # sets its random stream apart from that of a micro-batch's masks


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the weights were not updated."""


@dataclass
class Progressed:
    """Where the stage stands, beside tensors: all of it is in every checkpoint.

    The position in the data is `step + skipped` optimizer steps' worth of micro-batches.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated_step: int = -1
    best_step: int = -1
    best: dict[str, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the loss and its terms since the last line of the log."""
    log_bytes: int = 0
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
    events: str | None = None
    """What a perplexity among the scores is over."""


class StageTrainer:
    """Trains `stage` in `folder`; `run()` starts, or goes on from the newest checkpoint that verifies."""

    def __init__(
        self,
        stage: Stage,
        arguments: StageArguments,
        folder: Path,
        *,
        seed: int,
        ranks: Ranks | None = None,
        flag: SignalFlag | None = None,
        fsdp: bool = False,
        identity: str = "",
    ) -> None:
        """flag: of whoever holds the signals already. fsdp: split the student over the ranks. identity: of the run, for checkpoints."""
        self.stage, self.arguments, self.folder, self.seed, self.identity = stage, arguments, folder, seed, identity
        self.ranks, self.flag = ranks or Ranks(), flag
        self.order = BatchOrder(stage.lengths, arguments.per_device_train_batch_size, seed, bucket=arguments.group_by_length)
        self.micro_batches = arguments.gradient_accumulation_steps * self.ranks.world_size
        """Micro-batches of an optimizer step over all ranks, which take them in turn."""
        steps_per_epoch = max(1, self.order.batches_per_epoch // self.micro_batches)
        epochs = arguments.num_train_epochs
        self.total_steps = total_steps(arguments.max_steps, epochs, self.order.batches_per_epoch, self.micro_batches)
        at_once = arguments.max_steps > 0
        self.eval_steps = arguments.eval_steps or (self.total_steps if at_once else min(steps_per_epoch, self.total_steps))
        self.save_steps = arguments.save_steps or self.eval_steps
        decay = arguments.lr_decay_steps
        self.decay_steps = round(decay * self.total_steps) if decay <= 1 else int(decay)
        self.warmup_steps = resolve_warmup(arguments.warmup_steps, self.decay_steps)
        if isinstance(stage.objective.student, LanguageModel):
            stage.objective.student.check_own_loss(any_alignment=True)  # while its weights are whole
        self.engine = Engine(stage.objective, self.ranks, sharded=fsdp, keep_layers_whole=stage.captures)
        self.names = {p: name for name, p in stage.objective.named_parameters() if p.requires_grad}
        if not self.names:
            raise ValueError(f"Stage {stage.name} has no parameter to train.")
        self.optimizer = _adamw(self.names, arguments)
        half, kind = torch.bfloat16 if arguments.bf16 else torch.float16, self.ranks.device.type
        self.autocast: Callable[[], Any] = (
            (lambda: torch.autocast(kind, dtype=half)) if arguments.bf16 or arguments.fp16 else contextlib.nullcontext
        )
        self.scaler = torch.amp.GradScaler(kind, enabled=arguments.fp16)
        self.writer = CheckpointWriter(self.ranks, in_background=arguments.async_save, identity=identity)
        self.at = Progressed()
        self.best_state: State = {}
        self.saved_step = -1

    def run(self) -> StageResult:
        """Train to the end; the student then holds the weights that go on."""
        stage, ranks = self.stage, self.ranks
        stage.objective.train()
        self._resume()
        if ranks.is_main:
            log.info("Stage %s: steps %d to %d, log %s.", stage.name, self.at.step, self.total_steps, self.folder / LOG_FILE)
        with (
            contextlib.nullcontext(self.flag) if self.flag is not None else SignalFlag(ranks) as flag,
            Progress(self.total_steps, initial=self.at.step, description=stage.name, shown=ranks.is_main) as bar,
            RunLog(
                self.folder if ranks.is_main else None,
                stage=stage.name,
                keep=self.at.log_bytes,
                bar=bar,
                report_to=self.arguments.report_to,
            ) as lines,
            StepProfiler(self.arguments.profile_steps if ranks.is_main else 0, self.folder / "profile", stage.objective) as profiler,
            contextlib.closing(self.writer),
            contextlib.closing(Prefetch(self._micro_batch)) as batches,
        ):
            try:
                if stage.evaluate_first and self.at.evaluated_step < 0:
                    self._evaluate(lines, flag)
                while self.at.step < self.total_steps:
                    with section(BETWEEN):
                        self._catch_up(lines, flag)
                    bar.update(self._step(batches, lines, flag))
                    profiler.step()
                with section(BETWEEN):
                    self._catch_up(lines, flag)
            except Preempted:
                self._save(lines, is_last=True)
                raise
            flag.poll()  # a signal after the last one stops the run before its next stage
        kept_best = stage.keep == "best" and bool(self.best_state)
        if kept_best:
            set_module_tensors(stage.objective.student, self.best_state)
        return StageResult(
            stage=stage.name,
            steps=self.at.step,
            kept_step=self.at.best_step if kept_best else self.at.step,
            scores=self.at.best if kept_best else self.at.latest,
            seconds=self.at.seconds,
            tokens=self.at.tokens,
            peak_memory_mb=peak_memory_mb(),
            events=stage.events,
        )

    def _step(self, prefetch: Prefetch, lines: RunLog, flag: SignalFlag) -> bool:
        """One optimizer step, or none where it would not be finite; it counts once it is complete, so a signal may stop it anywhere."""
        arguments, objective, ranks, at = self.arguments, self.stage.objective, self.ranks, self.at
        started = time.perf_counter()
        indices = self._own_micro_batches()
        with section("data"):
            batches = prefetch.take(indices, self._own_micro_batches(ahead=1) if at.step + 1 < self.total_steps else ())
            denominator, tokens = self._counts(batches, flag)
        objective.terms.clear()
        objective.begin_step(self._position())
        losses = []
        for index, made in zip(indices, batches, strict=True):
            if ranks.world_size == 1:
                flag.poll()
            last = index == indices[-1]
            seed_global_generators(self.seed, index, _DROPOUT)
            with self.engine.micro_batch(last=last):
                with self.autocast():
                    loss = self.engine(objective, made.batch, denominator)
                self.engine.backward(self.scaler.scale(loss), last=last)
            losses.append(loss.detach())
        with section("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = gradient_norm(list(self.names), arguments.max_grad_norm)
        names = ["loss", *(f"loss_{name}" for name in objective.terms)]
        sums = torch.stack([torch.stack(losses).sum(), *objective.terms.values()])
        if ranks.world_size > 1:
            dist.all_reduce(sums)
        # The one time that the host waits for the device.
        step_loss, *terms, step_norm = torch.cat([sums, norm[None].to(sums)]).tolist()
        if not (math.isfinite(step_loss) and math.isfinite(step_norm)):
            self._skip(lines, step_loss, step_norm, indices, losses)
            return False
        rate = arguments.learning_rate * self._rate_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with section("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            objective.end_step()
        at.step += 1
        at.skipped_in_a_row = 0
        at.tokens += tokens
        at.seconds += time.perf_counter() - started
        at.window = {name: at.window.get(name, 0.0) + value for name, value in zip(names, [step_loss, *terms], strict=True)}
        if at.step % arguments.logging_steps == 0 or at.step == self.total_steps:
            self._log(lines, step_norm, rate)
        return True

    def _log(self, lines: RunLog, norm: float, rate: float) -> None:
        at = self.at
        steps = (at.step - 1) % self.arguments.logging_steps + 1
        lines.write(
            {
                "step": at.step,
                "epoch": round((at.step + at.skipped) * self.micro_batches / self.order.batches_per_epoch, 4),
                **{name: value / steps for name, value in at.window.items()},
                "grad_norm": norm,
                "learning_rate": rate,
                "tokens_per_second": round(at.tokens / max(at.seconds, 1e-9), 1),
                "peak_memory_mb": round(peak_memory_mb(), 1),
                "seconds": round(at.seconds, 3),
            }
        )
        at.window = {}

    def _skip(self, lines: RunLog, loss: float, norm: float, indices: Sequence[int], losses: Sequence[Tensor]) -> None:
        """Leave the weights as they are: go on with the next rows, or stop. All ranks come here together, as they see the same sums."""
        arguments, at = self.arguments, self.at
        broken = [index for index, value in zip(indices, losses, strict=True) if not math.isfinite(float(value))]
        found = self.ranks.gather([broken, list(indices)])
        # A gradient may be infinite where every loss is finite: then it is one of all.
        suspects = [index for own, _ in found for index in own] or [index for _, own in found for index in own]
        rows = [row for index in sorted(suspects) for row in self.order.batch(index).tolist()]
        overflowed = self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() > 1.0
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # which it leaves out, and remembers
            self.scaler.update()
        self.optimizer.zero_grad()
        what = f"Step {at.step + 1} of stage {self.stage.name} has loss {loss} and gradient norm {norm}"
        if not overflowed:
            at.skipped_in_a_row += 1
            if arguments.non_finite == "stop" or at.skipped_in_a_row > arguments.max_skipped_steps:
                raise NonFiniteError(
                    f"{what}; the weights were not updated"
                    + (f", {at.skipped_in_a_row} times in a row" if at.skipped_in_a_row > 1 else "")
                    + f". Its training rows are {rows}. Look at them, or lower learning_rate (now {arguments.learning_rate})."
                )
            log.warning("%s; its rows %s are skipped.", what, rows)
        at.skipped += 1
        lines.write({"step": at.step + 1, "skipped": at.skipped, "loss": loss, "grad_norm": norm, "rows": rows})

    def _counts(self, batches: Sequence[MicroBatch], flag: SignalFlag) -> tuple[Any, int]:
        """The step's denominator and tokens over all ranks, who also hear here of each other's signals."""
        weight, tokens = sum(made.weight for made in batches), sum(made.tokens for made in batches)
        mark, tokens_sum, *weights = self.ranks.sum(np.array([flag.mark, tokens, *np.atleast_1d(weight)]))
        flag.heed(mark)
        # Where nothing counts all sums are zero, whatever they are divided by.
        sums = [float(value) or 1.0 for value in weights]
        return np.array(sums) if isinstance(weight, np.ndarray) else sums[0], int(tokens_sum)

    def _own_micro_batches(self, ahead: int = 0) -> range:
        """The numbers of this rank's micro-batches in the coming optimizer step, or in one that many steps ahead of it."""
        first = (self.at.step + self.at.skipped + ahead) * self.micro_batches + self.ranks.rank
        return range(first, first + self.micro_batches, self.ranks.world_size)

    def _micro_batch(self, index: int) -> MicroBatch:
        """Rows and whatever is drawn for them follow from the seed and the micro-batch's number alone."""
        generator, objective = counter_torch_generator(self.seed, index), self.stage.objective
        batch = objective.prepare(self.stage.make_batch(self.order.batch(index), generator), generator)  # type: ignore[arg-type]
        return MicroBatch(batch.to(self.ranks.device), objective.weight(batch), int(batch.attention_mask.sum()))

    def _rate_factor(self) -> float:
        return learning_rate_factor(
            self.arguments.lr_scheduler_type,
            self.at.step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            final_ratio=self.arguments.lr_final_ratio,
        )

    def _position(self) -> Position:
        steps_per_epoch = self.order.batches_per_epoch / self.micro_batches
        return Position(self.at.step, self.total_steps, int(self.at.step / steps_per_epoch), self.total_steps / steps_per_epoch)

    def _catch_up(self, lines: RunLog, flag: SignalFlag) -> None:
        """Evaluate and save if that is due at this step and not done; so a run that was stopped in between does it on resuming."""
        step, end = self.at.step, self.at.step == self.total_steps
        if step == 0:
            return
        if (step % self.eval_steps == 0 or end) and self.at.evaluated_step < step:
            self._evaluate(lines, flag)
        if step % self.save_steps == 0 or end:
            self._save(lines, is_last=end)

    def _evaluate(self, lines: RunLog, flag: SignalFlag) -> None:
        stage, at = self.stage, self.at
        if stage.evaluate is not None:
            with self.autocast():
                share = Share(self.ranks.rank, self.ranks.world_size, flag.poll, self.ranks.gather)
                # One rank's scores, so that all agree on which are the best.
                scores = self.ranks.gather(self.engine.evaluate(stage.evaluate, share))[0]
            over = {} if stage.events is None else {"events": stage.events}
            lines.write({"step": at.step, **{f"eval_{name}": value for name, value in {**scores, **over}.items()}})
            sign = 1.0 if stage.higher_is_better else -1.0
            at.latest = scores
            if not at.best or sign * scores[stage.metric] > sign * at.best[stage.metric]:
                at.best, at.best_step = scores, at.step
                if stage.keep == "best":
                    self.best_state = on_cpu(module_tensors(stage.objective.student))
        at.evaluated_step = at.step

    def _save(self, lines: RunLog, *, is_last: bool) -> None:
        """is_last: the process ends after it, or the stage: it has to succeed, and to be whole when this returns."""
        if not self._succeeds(self.writer.wait, is_last=False):
            self.saved_step = -1
        if self.saved_step == self.at.step:
            return
        tensors = {
            **{name: module_tensors(module) for name, module in self._changing().items()},
            "optimizer": optimizer_tensors(self.optimizer, self.names),
        }
        if self.best_state:
            tensors["best"] = self.best_state
        self.at.log_bytes = lines.size
        progress = asdict(self.at)
        state = {**progress, "scaler": self.scaler.state_dict(), "made_by": self._made_by(), "rows": self.stage.fingerprint}
        keep = self.arguments.save_total_limit
        if self._succeeds(lambda: self.writer.save(keep, self.folder, self.at.step, tensors, state), is_last=is_last):
            self.saved_step = self.at.step
        if is_last:
            self.writer.wait()

    def _succeeds(self, work: Callable[[], None], *, is_last: bool) -> bool:
        """Whether a part of saving does; where it must, what it raises goes on."""
        try:
            work()
        except Exception as error:
            if is_last or self.arguments.save_failure == "stop":
                raise
            log.warning("At step %d no checkpoint could be written: %s. Training goes on, and those before stay.", self.at.step, error)
            return False
        return True

    def _changing(self) -> dict[str, nn.Module]:
        """What a checkpoint holds: the student, unless it is frozen throughout, and what is kept beside it."""
        objective = self.stage.objective
        student = {"model": objective.student} if any(p.requires_grad for p in objective.student.parameters()) else {}
        return {**student, **objective.auxiliary()}

    def _made_by(self) -> dict[str, Any]:
        """What bit-for-bit resuming depends on beside the configuration."""
        return {
            "torch": torch.__version__,
            "device": _device_name(self.ranks.device),
            "world_size": self.ranks.world_size,
            "threads": torch.get_num_threads(),
            "arithmetic": arithmetic(self.ranks.device),
        }

    def _resume(self) -> None:
        """Load the newest checkpoint that the first rank can verify, if there is one."""
        newest = self.ranks.on_main(lambda: newest_checkpoint(self.folder))
        name = self.ranks.gather(None if newest is None else newest.name)[0]
        if name is None:
            return
        path = self.folder / name
        if checkpoint_identity(path) != self.identity:
            raise ValueError(f"{path} is of a run with other settings, models or rows. Move it away, or choose another output_dir.")
        tensors, state = load_checkpoint(path)
        if (rows := state.pop("rows")) != self.stage.fingerprint:
            raise ValueError(
                f"{path} was trained on other rows ({rows[:12]} there, {self.stage.fingerprint[:12]} here): the data of stage "
                f"{self.stage.name} have changed. Put back what they were, or choose another output_dir."
            )
        made_by, here = state.pop("made_by"), self._made_by()
        differing = [f"{key} {made_by.get(key)} there, {here[key]} here" for key in here if here[key] != made_by.get(key)]
        if differing and self.ranks.is_main:
            log.warning("%s was written elsewhere (%s): training goes on, but not bit for bit.", path, "; ".join(differing))
        self.scaler.load_state_dict(state.pop("scaler"))
        for key, module in self._changing().items():
            set_module_tensors(module, own_tensors(module, tensors[key]))
        load_optimizer_tensors(self.optimizer, self.names, tensors["optimizer"])
        if "best" in tensors:
            self.best_state = on_cpu(own_tensors(self.stage.objective.student, tensors["best"]))
        self.at = Progressed(**state)
        self.saved_step = self.at.step
        if self.ranks.is_main:
            log.info("Stage %s goes on from %s.", self.stage.name, path)


def _adamw(names: dict[nn.Parameter, str], arguments: StageArguments) -> torch.optim.AdamW:
    """AdamW over two groups: matrices and embeddings are decayed, biases and norms are not."""
    groups = [
        {"params": [p for p in names if p.dim() >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in names if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=True,
    )
    if not arguments.bias_correction:
        # At step infinity both moments are divided by 1 - beta^infinity, which is 1.
        for p in names:
            step = torch.full((), math.inf, device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
