"""A frozen teacher's outputs on disk: written once by `fastkd cache`, read in place of the teacher.

A cache is a folder. Shard n, `shard-<n>-<sha256>.safetensors`, holds rows in rising order: their `numbers` and `lengths` (R,), tensors
`token.*` with one entry a token, row after row and without padding, and tensors `row.*` with one entry a row. A row is what a model
reads as one: a text, or one candidate of an example. Shards are renamed into place when they are whole, with their own hash in the
name, so one that is there is finished. `header.json` says what the cache is of; it is sealed by its own hash, and lists the shards when
all are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..sealed import Damaged, content_sha256, file_sha256, read_json
from ..store import write_bytes_atomic, write_json_atomic
from .folder import model_folder, weight_files
from .load import is_decoder, load_config, load_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 3
HEADER = "header.json"
_TOKEN = "token."
_LENGTHS, _NUMBERS = "lengths", "numbers"
_ANEW = "Delete the folder and write the cache again."
_GO_ON = "Run the `fastkd cache` command that wrote it again: it writes what is missing."


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    file: str
    bytes: int
    sha256: str
    rows: int
    tokens: int


class CachedTeacher:
    """Stands where a frozen teacher would: its architecture without weights. What it says is in `folder`."""

    def __init__(self, name_or_path: str, folder: str | Path) -> None:
        from transformers import AutoModel

        self.name_or_path, self.folder = name_or_path, Path(folder)
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModel.from_config(load_config(name_or_path))
        self.causal = is_decoder(self.model.config)
        self.vocab_map = load_map(name_or_path)


def model_hashes(name_or_path: str) -> tuple[str | None, str]:
    """(the hub's revision, None for a folder; sha256 of the configuration and the weights that are on this machine)."""
    folder, digest = model_folder(name_or_path), hashlib.sha256()
    for path in sorted([folder / "config.json", *weight_files(folder)]):
        digest.update(f"{path.name} {content_sha256(path)}\n".encode())
    return None if Path(name_or_path).is_dir() else folder.name, digest.hexdigest()


def read_header(folder: Path) -> dict[str, Any]:
    """What is recorded of a cache, finished or not; a header that is missing, damaged or of another format is refused."""
    path = folder / HEADER
    if not path.exists():
        raise ValueError(f"{folder} holds no {HEADER}, so it is no teacher cache; write one with `fastkd cache`.")
    try:
        header = read_json(path, "sha256", "format")
        seal, version = header.pop("sha256"), header["format"]
    except Damaged as error:
        raise ValueError(f"{error} {_ANEW}") from error
    if version != FORMAT:
        older = " fastkd 0.1 reads it, which knew rows by the names of their files." if version == 1 else ""
        raise ValueError(f"{path} has format {version} and this fastkd reads format {FORMAT}.{older} {_ANEW}")
    if seal != _seal(header) or not header.keys() >= {"contents", "shards"}:
        raise ValueError(f"{path} was changed after it was written: its sha256 is {_seal(header)}, and it says {seal}. {_ANEW}")
    return header


def write_header(folder: Path, contents: Mapping[str, Any], shards: Sequence[Shard] | None) -> None:
    """Write `header.json`, sealed by its own hash.

    Args:
        folder: the cache's.
        contents: JSON-able; what the cache is of.
        shards: all of them, when they are written; None before.
    """
    header = {"format": FORMAT, "contents": contents, "shards": None if shards is None else [asdict(shard) for shard in shards]}
    header = json.loads(json.dumps(header))  # as it will be read back
    write_json_atomic(folder / HEADER, {**header, "sha256": _seal(header)})


def write_shard(folder: Path, number: int, numbers: np.ndarray, lengths: np.ndarray, tensors: Mapping[str, Tensor]) -> Shard:
    """Write shard `number` whole or not at all. It replaces only a file whose name claims to be of this very content.

    Args:
        folder: the cache's.
        number: of the shard.
        numbers: (R,) int64 of its rows, rising, and above those of the shard before.
        lengths: (R,) tokens of its rows, T in all.
        tensors: `token.*` (T, ...) and `row.*` (R, ...).
    """
    rows = {_NUMBERS: torch.from_numpy(numbers), _LENGTHS: torch.from_numpy(lengths.astype(np.int32))}
    data = safetensors.torch.save({**rows, **tensors})
    sha256 = hashlib.sha256(data).hexdigest()
    file = f"{_shard_name(number)}-{sha256[:16]}.safetensors"
    write_bytes_atomic(folder / file, data)
    return Shard(file, len(data), sha256, len(lengths), int(lengths.sum()))


def finished_shard(folder: Path, number: int, lengths: np.ndarray) -> Shard | None:
    """Shard `number` if it was written before and has the content that its name says; what has not is left alone."""
    for path in sorted(folder.glob(f"{_shard_name(number)}-*.safetensors")):
        if path.is_file() and path.stem.endswith((sha256 := file_sha256(path))[:16]):
            return Shard(path.name, path.stat().st_size, sha256, len(lengths), int(lengths.sum()))
    return None


class TeacherCache:
    """A finished cache, memory-mapped: what a teacher said of some rows, which have their numbers."""

    def __init__(self, folder: str | Path, *, check_hashes: bool = True) -> None:
        """Open a cache; ValueError if it is not finished, or names the shard that is missing or damaged.

        check_hashes: read all of it once and compare the shards' hashes. Their sizes are compared in any case.
        """
        self.folder = Path(folder)
        header = read_header(self.folder)
        self.contents: dict[str, Any] = header["contents"]
        if header["shards"] is None:
            raise ValueError(f"The teacher cache {folder} is not finished. {_GO_ON}")
        self.shards = [Shard(**shard) for shard in header["shards"]]
        for shard in self.shards:
            _check_shard(self.folder / shard.file, shard, check_hashes)
        self.ends = np.cumsum([shard.rows for shard in self.shards])
        self._open: dict[int, tuple[dict[str, Tensor], np.ndarray]] = {}
        self._numbers = np.concatenate([self._read(number, _NUMBERS).numpy() for number in range(len(self.shards))])

    @property
    def names(self) -> list[str]:
        """Names of the tensors that hold what the teacher said."""
        return sorted(self._shard(0)[0])

    def has(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(B,) bool, whether it has the rows of these numbers."""
        positions = np.searchsorted(self._numbers, rows).clip(max=len(self._numbers) - 1)
        has: np.ndarray = self._numbers[positions] == rows
        return has

    def outputs(self, names: Iterable[str], rows: Sequence[int] | np.ndarray, width: int) -> dict[str, Tensor]:
        """What the cache holds of some rows.

        Args:
            names: of tensors.
            rows: (B,) numbers, of rows that it has.
            width: tokens that each row is padded to.

        Returns:
            By name, in the dtypes they are stored in: `token.*` (B, width, ...), padded by zeros, integers by -1; `row.*` (B, ...).
        """
        if not (has := self.has(rows)).all():
            raise ValueError(f"The teacher cache {self.folder} has no row {np.asarray(rows)[~has][0]}.")
        positions = np.searchsorted(self._numbers, rows)
        shards = np.searchsorted(self.ends, positions, side="right")
        found = []
        for position, number in zip(positions, shards, strict=True):
            tensors, offsets = self._shard(int(number))
            found.append((tensors, offsets, int(position - self.ends[number] + self.shards[number].rows)))
        result = {}
        for name in names:
            first = found[0][0][name]
            if not name.startswith(_TOKEN):
                result[name] = torch.stack([tensors[name][place] for tensors, _, place in found])
                continue
            fill = 0 if first.is_floating_point() else -1
            padded = torch.full((len(found), width, *first.shape[1:]), fill, dtype=first.dtype)
            for line, (tensors, offsets, place) in zip(padded, found, strict=True):
                start, end = int(offsets[place]), int(offsets[place + 1])
                line[: end - start] = tensors[name][start:end]
            result[name] = padded
        return result

    def _read(self, number: int, name: str) -> Tensor:
        """One tensor of a shard."""
        with safetensors.safe_open(self.folder / self.shards[number].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _shard(self, number: int) -> tuple[dict[str, Tensor], np.ndarray]:
        """A shard's tensors, which are views of its file, and where each of its rows begins."""
        if number not in self._open:
            with safetensors.safe_open(self.folder / self.shards[number].file, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            del tensors[_NUMBERS]
            lengths = tensors.pop(_LENGTHS).numpy()
            self._open[number] = tensors, np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
        return self._open[number]


def _check_shard(path: Path, shard: Shard, check_hash: bool) -> None:
    if not path.exists():
        raise ValueError(f"Shard {path} of the teacher cache is missing. {_GO_ON}")
    if not path.is_file():
        raise ValueError(f"Shard {path} of the teacher cache is no regular file. Remove it. {_GO_ON}")
    damaged = f"Shard {path} of the teacher cache is damaged:"
    if (size := path.stat().st_size) != shard.bytes:
        raise ValueError(f"{damaged} it has {size} bytes, the header says {shard.bytes}. {_GO_ON}")
    if check_hash and (found := file_sha256(path)) != shard.sha256:
        raise ValueError(f"{damaged} its sha256 is {found}, the header says {shard.sha256}. {_GO_ON}")


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _seal(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
