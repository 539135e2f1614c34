"""The processes of one run, as torchrun starts them; without torchrun there is one.

What ranks tell each other on the host goes through gloo as numbers and JSON, never as pickled objects.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # how long ranks wait for the first one to tokenise a corpus or count a vocabulary
_ROLL_CALL_SECONDS = 5.0


class RankError(RuntimeError):
    """Another rank failed, or did not come to a collective."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    host: Any = None
    """The gloo group of all ranks, with the run's timeout."""
    patient: Any = None
    """The same, for work that one rank does while the others wait."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    @contextmanager
    def join(cls, *, use_cpu: bool = False, timeout_seconds: float = 1800.0) -> Iterator[Ranks]:
        """The ranks of the run that torchrun's environment describes; a process group that exists already is used and left alone."""
        cuda = torch.cuda.is_available() and not use_cpu
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1 and not (dist.is_initialized() and dist.get_world_size() > 1):
            yield cls(device=torch.device("cuda" if cuda else "cpu"))
            return
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        timeout, is_ours = timedelta(seconds=timeout_seconds), not dist.is_initialized()
        if is_ours:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
        groups = [dist.new_group(backend="gloo", timeout=limit) for limit in (timeout, _PATIENCE)]
        try:
            ranks = cls(dist.get_rank(), dist.get_world_size(), device, *groups)
            yield ranks
            with ranks.naming_absentees("the end"):
                ranks.barrier()  # none closes its connections while another one still uses them
        finally:
            for group in groups if not is_ours else [None]:
                dist.destroy_process_group(group)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The elementwise sum over ranks, in float64."""
        if self.world_size == 1:
            return values
        total = torch.from_numpy(np.array(values, dtype=np.float64))
        dist.all_reduce(total, group=self.host)
        return total.numpy()

    def gather(self, value: Any, *, patient: bool = False) -> list[Any]:
        """What every rank gave, by rank; anything that JSON can hold."""
        if self.world_size == 1:
            return [value]
        group = self.patient if patient else self.host
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([len(own)]), group=group)
        width = int(max(lengths))
        texts = [torch.zeros(width, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(texts, torch.nn.functional.pad(own, (0, width - len(own))), group=group)
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]

    def barrier(self) -> None:
        self.gather(None)

    def main_first(self, work: Callable[[], T], *, patient: bool = True) -> T:
        """`work()` on rank 0 and then on the others, which find what it has written. What fails on rank 0 is not tried elsewhere.

        patient: the others wait for days, as for a corpus to be tokenised; False: no longer than for any collective.
        """
        if self.world_size == 1:
            return work()
        error: Exception | None = None
        if self.is_main:
            try:
                result = work()
            except Exception as caught:
                error = caught
        message = self.gather(None if error is None else str(error), patient=patient)[0]
        if error is not None:
            raise error
        if message is not None:
            raise RankError(f"rank 0 stopped: {message}")
        return result if self.is_main else work()

    def on_main(self, work: Callable[[], T], *, patient: bool = True) -> T | None:
        """`work()` on rank 0 alone; the others wait, and fail if it does."""
        return self.main_first(lambda: work() if self.is_main else None, patient=patient)

    @contextmanager
    def naming_absentees(self, doing: str) -> Iterator[None]:
        """A collective that fails in this block, because a rank died or did not come in time, ends in a sentence with its number."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not _is_of_a_collective(error):
                raise
            absent = self._roll_call(doing)
            who = f"rank {', '.join(map(str, absent))} did not answer" if absent else "all ranks still answer"
            raise RankError(f"A collective failed in {doing}, and {who}: {str(error).splitlines()[0]}") from error

    def _roll_call(self, doing: str) -> list[int]:
        """The ranks that do not come here within some seconds, through the store, which needs no group."""
        store = dist.distributed_c10d._get_default_store()
        keys = [f"fastkd/roll call/{doing}/{rank}" for rank in range(self.world_size)]
        absent: list[int] = [0]  # who holds the store, unless torchrun does: without an answer from there, it is the one

        def call() -> None:
            store.set(keys[self.rank], "here")
            deadline = time.monotonic() + _ROLL_CALL_SECONDS
            while time.monotonic() < deadline and not store.check(keys):
                time.sleep(0.1)
            absent[:] = [rank for rank, key in enumerate(keys) if not store.check([key])]

        asking = threading.Thread(target=call, daemon=True)
        asking.start()
        asking.join(2 * _ROLL_CALL_SECONDS)
        return absent


def _is_of_a_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "timed out waiting" in text or "connection closed by peer" in text
