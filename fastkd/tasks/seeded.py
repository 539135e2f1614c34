"""Random choices that follow from a key alone, the same on every platform and version of Python and NumPy."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def draw(*key: int | str) -> float:
    """A number uniform in [0, 1) that depends on `key` alone: the first 53 bits of the key's SHA-256."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / 2**53


def shuffled(items: Sequence[T], *key: int | str) -> list[T]:
    """`items` in a uniformly random order that depends on their number and on `key` alone."""
    return [items[index] for index in sorted(range(len(items)), key=lambda index: draw(*key, index))]
