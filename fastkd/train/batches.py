"""Order of training rows in micro-batches, and random generators, both pure functions of counters.

Nothing here has a state to save: a run that resumes asks for the next micro-batch's number.
"""

import hashlib
import math

import numpy as np
import torch

WINDOW_BATCHES = 64  # rows are sorted by length within so many batches: little padding, and still well mixed


class BatchOrder:
    """The rows of every micro-batch of a run, by its number; each epoch visits every row exactly once.

    An epoch's rows are permuted, cut into windows of `WINDOW_BATCHES` batches, sorted by length inside each window and
    cut into batches, and the batches are permuted. Both permutations come from `counter_generator(seed, epoch)`.

    Args:
        lengths: (rows,) the length of every row, in tokens.
        batch_size: rows per micro-batch; the one with the rows left over is smaller.
        seed: decides the permutations, together with the epoch.
        bucket: sort by length inside windows; False leaves the rows as permuted.
        shuffle: permute; False keeps the given order of rows (outside the windows' sorting) in every epoch.
        drop_last: leave the rows of a smaller batch out of the epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        bucket: bool = True,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        lengths = np.asarray(lengths)
        if lengths.ndim != 1 or len(lengths) == 0:
            raise ValueError(f"lengths must be one number per row and at least one row, and has shape {lengths.shape}.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        if drop_last and len(lengths) < batch_size:
            raise ValueError(
                f"drop_last leaves no batch: there are {len(lengths)} rows and batch_size is {batch_size}. "
                f"Use a smaller batch_size or drop_last=False."
            )
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.bucket, self.shuffle = bucket, shuffle
        self.batches_per_epoch = len(lengths) // batch_size if drop_last else -(-len(lengths) // batch_size)
        self._cached = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def batch(self, index: int) -> np.ndarray:
        """Row indices (int64) of micro-batch `index`, counted from 0 over all epochs."""
        if index < 0:
            raise IndexError(f"index={index}: micro-batches are counted from 0.")
        epoch, position = divmod(index, self.batches_per_epoch)
        cached = self._cached  # read once: another thread may ask for another epoch meanwhile
        if cached[0] != epoch:
            cached = self._cached = (epoch, *self._epoch_order(epoch))
        _, rows, batches = cached
        start = batches[position] * self.batch_size
        return rows[start : start + self.batch_size].copy()

    def rows_of_first(self, batches: int) -> np.ndarray:
        """(n,) int64, rising: the rows of the first so many micro-batches."""
        if batches >= self.batches_per_epoch:
            return np.arange(len(self.lengths))
        return np.sort(np.concatenate([self.batch(index) for index in range(batches)]))

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's rows, which are cut into batches as they stand, and the order in which those batches come."""
        generator = counter_generator(self.seed, epoch)
        rows, batches = np.arange(len(self.lengths)), np.arange(self.batches_per_epoch)
        if self.shuffle:
            rows, batches = generator.permutation(rows), generator.permutation(batches)
        rows = rows[: self.batches_per_epoch * self.batch_size]  # before the sort: drop_last leaves out no length's rows
        if self.bucket:
            windows = np.arange(len(rows)) // (WINDOW_BATCHES * self.batch_size)
            rows = rows[np.lexsort((self.lengths[rows], windows))]
        return rows, batches


def total_steps(max_steps: int, epochs: float, batches_per_epoch: int, micro_batches: int) -> int:
    """Optimizer steps of a stage, each of `micro_batches`: `max_steps` if it is positive, else those of `epochs`."""
    return max_steps if max_steps > 0 else math.ceil(epochs * max(1, batches_per_epoch // micro_batches))


def counter_generator(*keys: int) -> np.random.Generator:
    """A NumPy generator that depends on `keys` alone, such as (seed, step, micro-batch, rank): the same on every platform.

    It is Philox keyed by a hash of the keys, so that streams of different keys, or of different numbers of keys, are
    unrelated.
    """
    return np.random.Generator(np.random.Philox(key=_hash(keys, size=16)))


def counter_torch_generator(*keys: int) -> torch.Generator:
    """`counter_generator` as a torch CPU generator, for draws that are tensors."""
    return torch.Generator().manual_seed(_hash(keys, size=7))  # 7 bytes always fit a seed


def seed_global_generators(*keys: int) -> None:
    """Let torch's own generators, of which dropout draws, begin a stream that depends on `keys` alone."""
    torch.manual_seed(_hash(keys, size=7))


def _hash(keys: tuple[int, ...], *, size: int) -> int:
    text = ",".join(str(int(key)) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest())
