"""Checkpoints that are whole or absent.

A checkpoint is a sealed folder `checkpoint-<step>`: safetensors files, `state.json`, and `MANIFEST.json` with the size and SHA-256
of each. It is written under a temporary name, every file is synced, the manifest comes last, and one rename makes it
visible. So a folder named `checkpoint-<step>` whose manifest verifies is complete, whenever its writer was killed.

Where tensors are in pieces every rank writes a file of its own, `model-00002-of-00004.safetensors`, into the one folder. They are put
together again for any number of ranks.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastkd import __version__
from fastkd.sealed import MANIFEST_FILE, Damaged, described, read_bytes, read_manifest, remove_sealed, seal, verify
from fastkd.store import commit_folder, json_bytes, start_folder, sync, write_bytes_synced
from fastkd.train.ranks import RankError, Ranks

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
STATE_FILE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or would be overwritten; the message names the file and the reason."""


class UnreadableCheckpoint(CheckpointError):
    """A checkpoint may be whole and cannot be read: the system does not let it, or another fastkd wrote it."""


@dataclass(frozen=True)
class Piece:
    """This rank's rows of a tensor that is split along its first dimension, in the order of the ranks."""

    rows: Tensor


Entries = Mapping[str, Tensor | Piece]


def on_cpu(entries: Entries) -> dict[str, Tensor | Piece]:
    """A copy that nothing changes."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    return {name: Piece(copied(value.rows)) if isinstance(value, Piece) else copied(value) for name, value in entries.items()}


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    tensors: Mapping[str, Entries],
    state: Mapping[str, Any],
    ranks: Ranks | None = None,
    *,
    identity: str = "",
) -> Path:
    """Write `output_dir/checkpoint-<step>` and return its path.

    `tensors` holds one safetensors file per entry ("model", "optimizer", ...), each a flat mapping of names to tensors; if there are
    pieces among them, one file per entry and rank. `state` is anything JSON can hold. Tensors that share memory (a tied embedding and
    head) are each stored in full, so every name is there when the file is read; loading both into tied parameters writes the same
    values twice. All `ranks` call; what is not in pieces is written by the first one. `identity` names the run; see
    `checkpoint_identity`.

    A failed save removes what it wrote and raises, on every rank; checkpoints that existed stay. A checkpoint that verifies is never
    overwritten (`CheckpointError`). One that is damaged is set aside as `checkpoint-<step>.damaged`, and nothing of it is deleted.
    """
    ranks = ranks or Ranks()
    final = Path(output_dir) / f"checkpoint-{step}"
    started = ranks.on_main(lambda: _start(final, identity), patient=False)
    folder = Path(ranks.gather(None if started is None else str(started))[0])
    error: Exception | None = None
    written: dict[str, Any] = {}
    try:
        written = _write(folder, tensors, ranks)
    except Exception as caught:
        error = caught
    outcomes = ranks.gather([written, None if error is None else str(error)])
    failed = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(outcomes) if message is not None]
    if failed:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise error or RankError(f"{final} was not written, {'; '.join(failed)}")
    files = {name: entry for theirs, _ in outcomes for name, entry in theirs.items()}
    ranks.on_main(lambda: _finish(folder, final, {"step": step, "identity": identity}, state, files), patient=False)
    return final


def _start(final: Path, identity: str) -> Path:
    if os.path.lexists(final):
        try:
            verify_checkpoint(final)
        except UnreadableCheckpoint:
            raise
        except CheckpointError as damage:
            has_manifest = (final / MANIFEST_FILE).is_file() and not final.is_symlink()
            if not has_manifest or not (_is_of(final, identity) or _is_of(final, None)):
                raise CheckpointError(f"{final} is damaged, and not known to be of this run; move it away: {damage}") from damage
            logger.warning("%s does not verify and is set aside: %s", final.name, damage)
            _set_aside(final)
        else:
            raise CheckpointError(f"{final} exists and verifies, and is not overwritten: save each step once.")
    return start_folder(final)


def _set_aside(path: Path) -> None:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged{'' if number == 1 else f'-{number}'}")):
        number += 1
    os.rename(path, aside)


def _write(folder: Path, tensors: Mapping[str, Entries], ranks: Ranks) -> dict[str, Any]:
    """This rank's files, by name with size and hash."""
    described_files = {}
    for name, entries in tensors.items():
        is_split = any(isinstance(value, Piece) for value in entries.values())
        own = {key: value.rows if isinstance(value, Piece) else value for key, value in entries.items()}
        if not ranks.is_main:
            own = {key: value for key, value in own.items() if isinstance(entries[key], Piece)}
        if is_split or ranks.is_main:
            part = f"-{ranks.rank + 1:05d}-of-{ranks.world_size:05d}" if is_split else ""
            file = folder / f"{name}{part}.safetensors"
            try:
                safetensors.torch.save_file(_separate(own), file)
            except safetensors.SafetensorError as error:
                raise OSError(f"{file} could not be written: {error}") from error
            if not ranks.is_main:  # perhaps another machine; the first rank syncs the whole folder at the end
                sync(file)
            described_files[file.name] = described(file)
    return described_files


def _finish(folder: Path, final: Path, about: Mapping[str, Any], state: Mapping[str, Any], files: dict[str, Any]) -> None:
    try:
        write_bytes_synced(folder / STATE_FILE, json_bytes(state))
        files[STATE_FILE] = described(folder / STATE_FILE)
        seal(folder, {"format_version": FORMAT_VERSION, **about, "fastkd": __version__, "torch": torch.__version__}, files)
        commit_folder(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class CheckpointWriter:
    """Saves one checkpoint at a time, at once or, with `in_background`, while training goes on. All ranks call its methods.

    A save in the background has its own copy of the tensors and keeps the promise of `save_checkpoint`; `wait` returns when it is
    whole, and raises what it raised. It is the first rank's alone: pieces, which need all ranks, are always saved at once.
    """

    def __init__(self, ranks: Ranks, *, in_background: bool = False, identity: str = "") -> None:
        self.ranks, self.in_background, self.identity = ranks, in_background, identity
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None

    def save(self, keep: int, output_dir: Path, step: int, tensors: Mapping[str, Entries], state: Mapping[str, Any]) -> None:
        """Save, then prune to `keep` checkpoints. `wait` has been called."""
        is_split = any(isinstance(value, Piece) for entries in tensors.values() for value in entries.values())
        if is_split or not self.in_background:
            save_checkpoint(output_dir, step, tensors, state, self.ranks, identity=self.identity)
            self.ranks.on_main(lambda: prune_checkpoints(output_dir, keep, self.identity), patient=False)
        elif self.ranks.is_main:
            copies = {group: on_cpu(entries) for group, entries in tensors.items()}

            def work() -> None:
                save_checkpoint(output_dir, step, copies, state, identity=self.identity)
                prune_checkpoints(output_dir, keep, self.identity)

            self._running = self._pool.submit(work)

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.in_background:
            running, self._running = self._running, None
            self.ranks.on_main(lambda: None if running is None else running.result(), patient=False)

    def close(self) -> None:
        self._pool.shutdown()


def verify_checkpoint(path: str | Path) -> dict[str, Any]:
    """The manifest of checkpoint `path`, every file of which has the size and SHA-256 that it says.

    Raises `CheckpointError`, naming the file and what is wrong with it, otherwise; `UnreadableCheckpoint` where it may be whole.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise UnreadableCheckpoint(
                f"{path} has format_version {version}, and fastkd {__version__} reads {FORMAT_VERSION}: use the fastkd that wrote it "
                f"({manifest.get('fastkd', 'it does not say which')})."
            )
        return verify(path)
    except Damaged as damage:
        raise CheckpointError(str(damage)) from damage
    except OSError as error:
        kind = CheckpointError
        if not isinstance(error, FileNotFoundError | NotADirectoryError) or (path.is_symlink() and not path.exists()):
            kind = UnreadableCheckpoint
        what = "is not a complete checkpoint" if kind is CheckpointError else "cannot be read"
        raise kind(f"{path} {what}: {error.filename or MANIFEST_FILE}: {error.strerror}.") from error


def checkpoint_identity(path: Path) -> str:
    """The run that checkpoint `path`, which verifies, says it is of."""
    return str(read_manifest(path).get("identity"))


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one entry of a checkpoint, read from its file or files when they are asked for."""

    def __init__(self, files: list[Path], device: torch.device | str) -> None:
        self._files = [safetensors.safe_open(file, framework="pt", device=str(device)) for file in files]
        self._names = list(dict.fromkeys(name for file in self._files for name in file.keys()))  # noqa: SIM118 (no mapping)

    def __getitem__(self, name: str) -> Tensor:
        pieces = [file.get_tensor(name) for file in self._files if name in file.keys()]  # noqa: SIM118
        if not pieces:
            raise KeyError(name)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of the whole tensor; no other is read."""
        parts, at = [], 0
        for file in self._files:
            if name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                length = piece.get_shape()[0]
                parts.append(piece[min(max(start - at, 0), length) : min(max(stop - at, 0), length)])
                at += length
        return torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, StoredTensors], dict[str, Any]]:
    """Verify checkpoint `path` and return its `(tensors, state)` as given to `save_checkpoint`, tensors on `device`."""
    path = Path(path)
    files: dict[str, list[Path]] = {}
    for name in sorted(verify_checkpoint(path)["files"]):
        if name.endswith(".safetensors"):
            files.setdefault(re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", name), []).append(path / name)
    return {name: StoredTensors(parts, device) for name, parts in files.items()}, json.loads(read_bytes(path / STATE_FILE))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders named `checkpoint-<step>`, largest step first."""
    return sorted(
        (path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)),
        key=_step,
        reverse=True,
    )


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of the largest step that verifies, or None where there is no checkpoint; damaged ones are logged with the reason.

    Raises `UnreadableCheckpoint` for one that may be whole and cannot be read, and `CheckpointError` where all that there are are
    damaged: a run that started over would lose what they hold.
    """
    damages = []
    for path in list_checkpoints(output_dir):
        try:
            verify_checkpoint(path)
        except UnreadableCheckpoint as error:
            raise UnreadableCheckpoint(f"{error} Mend that, or move it away to go on from the one before.") from error
        except CheckpointError as damage:
            logger.warning("skipping %s: %s", path.name, damage)
            damages.append(str(damage))
        else:
            return path
    if damages:
        raise CheckpointError(
            f"None of the checkpoints in {output_dir} verifies, and training does not start over beside them: {' '.join(damages)} "
            f"Put back a copy of one, or move them away to start this stage anew."
        )
    return None


def prune_checkpoints(output_dir: str | Path, keep: int, identity: str = "") -> None:
    """Delete all of a run's checkpoints but the newest verified one and the `keep - 1` before it; nothing when none verifies.

    Links, and what fastkd did not write into a checkpoint, stay, and so does what cannot be deleted: a warning names it.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete every checkpoint; at least 1 is needed.")
    own = [path for path in list_checkpoints(output_dir) if _is_of(path, identity)]
    newest = next((number for number, path in enumerate(own) if _verifies(path)), len(own))
    for path in own[newest + keep :]:
        try:
            remove_sealed(path)
        except (OSError, Damaged) as error:
            logger.warning("%s stays: %s", path, error)


def _is_of(path: Path, identity: str | None) -> bool:
    """Whether a checkpoint says that this run made it; None: whether it does not say which, its manifest being damaged."""
    try:
        return checkpoint_identity(path) == identity
    except (OSError, Damaged):
        return identity is None


def _verifies(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _separate(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU, contiguous tensors of which no two share a storage, as safetensors requires."""
    separate, storages = {}, set()
    for name, tensor in entries.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate
