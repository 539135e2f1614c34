"""Floor 5, train: checkpoints that are whole or absent.

A checkpoint is a folder `checkpoint-<step>`: safetensors files, `state.json`, and `MANIFEST.json` with the size and SHA-256
of each. It is written under a temporary name, every file is synced, the manifest comes last, and one rename makes it
visible. So a folder named `checkpoint-<step>` whose manifest verifies is complete, whenever its writer was killed.

Where tensors are in pieces every rank writes a file of its own, `model-00002-of-00004.safetensors`, into the one folder. They are put
together again for any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from fastkd.files import commit_folder, file_sha256, json_bytes, remove_folder, start_folder, sync
from fastkd.train.ranks import RankError, Ranks

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
MANIFEST_FILE = "MANIFEST.json"
STATE_FILE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or would be overwritten; the message names the file and the reason."""


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
    output_dir: str | Path, step: int, tensors: Mapping[str, Entries], state: Mapping[str, Any], ranks: Ranks | None = None
) -> Path:
    """Write `output_dir/checkpoint-<step>` and return its path.

    `tensors` holds one safetensors file per entry ("model", "optimizer", ...), each a flat mapping of names to tensors; if there are
    pieces among them, one file per entry and rank. `state` is anything JSON can hold. Tensors that share memory (a tied embedding and
    head) are each stored in full, so every name is there when the file is read; loading both into tied parameters writes the same
    values twice. All `ranks` call; what is not in pieces is written by the first one.

    A failed save removes what it wrote and raises, on every rank; checkpoints that existed stay. A checkpoint that verifies is never
    overwritten (`CheckpointError`): see `discard_checkpoints_after`. One that does not verify is replaced.
    """
    ranks = ranks or Ranks()
    final = Path(output_dir) / f"checkpoint-{step}"
    started = ranks.on_main(lambda: _start(final))
    folder = Path(ranks.gather(None if started is None else str(started))[0])
    error: Exception | None = None
    described: dict[str, Any] = {}
    try:
        described = _write(folder, tensors, ranks)
    except Exception as caught:
        error = caught
    outcomes = ranks.gather([described, None if error is None else str(error)])
    failed = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(outcomes) if message is not None]
    if failed:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise error or RankError(f"{final} was not written, {'; '.join(failed)}")
    ranks.on_main(lambda: _finish(folder, final, step, state, {k: v for files, _ in outcomes for k, v in files.items()}))
    return final


def _start(final: Path) -> Path:
    if final.exists():
        try:
            verify_checkpoint(final)
        except CheckpointError as damage:
            logger.warning("replacing %s, which does not verify: %s", final.name, damage)
            remove_folder(final)
        else:
            raise CheckpointError(
                f"{final} exists and verifies, and is not overwritten: save each step once, and call "
                f"discard_checkpoints_after when going back to an earlier step."
            )
    return start_folder(final)


def _write(folder: Path, tensors: Mapping[str, Entries], ranks: Ranks) -> dict[str, Any]:
    """This rank's files, by name with size and hash."""
    described = {}
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
            described[file.name] = _described(file)
    return described


def _finish(folder: Path, final: Path, step: int, state: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    try:
        (folder / STATE_FILE).write_bytes(json_bytes(state))
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "fastkd": __version__,
            "torch": torch.__version__,
            "files": {**files, STATE_FILE: _described(folder / STATE_FILE)},
        }
        (folder / MANIFEST_FILE).write_bytes(_sealed(manifest))
        commit_folder(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _described(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": file_sha256(file)}


class CheckpointWriter:
    """Saves one checkpoint at a time, at once or, with `in_background`, while training goes on. All ranks call its methods.

    A save in the background has its own copy of the tensors and keeps the promise of `save_checkpoint`; `wait` returns when it is
    whole, and raises what it raised. It is the first rank's alone: pieces, which need all ranks, are always saved at once.
    """

    def __init__(self, ranks: Ranks, *, in_background: bool = False) -> None:
        self.ranks, self.in_background = ranks, in_background
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None

    def save(self, keep: int, output_dir: Path, step: int, tensors: Mapping[str, Entries], state: Mapping[str, Any]) -> None:
        """Save, then prune to `keep` checkpoints. `wait` has been called."""
        is_split = any(isinstance(value, Piece) for entries in tensors.values() for value in entries.values())
        if is_split or not self.in_background:
            save_checkpoint(output_dir, step, tensors, state, self.ranks)
            self.ranks.on_main(lambda: prune_checkpoints(output_dir, keep))
        elif self.ranks.is_main:
            copies = {group: on_cpu(entries) for group, entries in tensors.items()}

            def work() -> None:
                save_checkpoint(output_dir, step, copies, state)
                prune_checkpoints(output_dir, keep)

            self._running = self._pool.submit(work)

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.in_background:
            running, self._running = self._running, None
            self.ranks.on_main(lambda: None if running is None else running.result())

    def close(self) -> None:
        self._pool.shutdown()


def verify_checkpoint(path: str | Path) -> None:
    """Return if every file that the manifest of checkpoint `path` lists has its size and SHA-256, and the manifest its own.

    Raises `CheckpointError`, naming the file and what is wrong with it, otherwise.
    """
    _read_manifest(Path(path))


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
    for name in sorted(_read_manifest(path)["files"]):
        if name.endswith(".safetensors"):
            files.setdefault(re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", name), []).append(path / name)
    return {name: StoredTensors(parts, device) for name, parts in files.items()}, json.loads((path / STATE_FILE).read_bytes())


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders named `checkpoint-<step>`, largest step first."""
    return sorted(
        (path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)),
        key=_step,
        reverse=True,
    )


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of the largest step that verifies, or None; those passed over are logged with the reason.

    Temporary folders are never considered; `prepare_output_dir` removes those that a killed process left.
    """
    for path in list_checkpoints(output_dir):
        try:
            verify_checkpoint(path)
        except CheckpointError as damage:
            logger.warning("skipping %s: %s", path.name, damage)
        else:
            return path
    return None


def prune_checkpoints(output_dir: str | Path, keep: int) -> None:
    """Delete all but the newest verified checkpoint and the `keep - 1` before it; nothing when none verifies."""
    if keep < 1:
        raise ValueError(f"keep={keep} would delete every checkpoint; at least 1 is needed.")
    newest = newest_checkpoint(output_dir)
    if newest is not None:
        for path in [path for path in list_checkpoints(output_dir) if _step(path) < _step(newest)][keep - 1 :]:
            remove_folder(path)


def discard_checkpoints_after(output_dir: str | Path, step: int) -> None:
    """Delete the checkpoints beyond `step`: a run that goes back to `step` leaves no later history to resume from."""
    for path in list_checkpoints(output_dir):
        if _step(path) > step:
            logger.warning("discarding %s: the run goes on from step %d", path.name, step)
            remove_folder(path)


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


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's exact bytes, its own hash included, so that a changed byte shows anywhere in it."""
    return json_bytes({**manifest, "sha256": hashlib.sha256(json_bytes(manifest)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, Any]:
    """The verified manifest of checkpoint `path`; see `verify_checkpoint`."""
    file = path / MANIFEST_FILE
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {MANIFEST_FILE}: {error.strerror}.") from error
    try:
        manifest = json.loads(content)
        intact = content == _sealed({key: value for key, value in manifest.items() if key != "sha256"})
    except (ValueError, AttributeError):  # not JSON, or JSON that is no object
        intact = False
    if not intact:
        raise CheckpointError(f"{file} is damaged: its content does not match its own sha256.")
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version {manifest['format_version']}, and fastkd {__version__} reads {FORMAT_VERSION}: "
            f"use the fastkd that wrote it ({manifest['fastkd']})."
        )
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            size, digest = file.stat().st_size, file_sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
        if size != expected["size"]:
            raise CheckpointError(f"{file} has {size} bytes, and {expected['size']} were written.")
        if digest != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: its sha256 is not the one in {MANIFEST_FILE}.")
    return manifest
