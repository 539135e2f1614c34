"""Floor 5, train: checkpoints that are whole or absent.

A checkpoint is a folder `checkpoint-<step>`: safetensors files, `state.json`, and `MANIFEST.json` with the size and SHA-256
of each. It is written under a temporary name, every file is synced, the manifest comes last, and one rename makes it
visible. So a folder named `checkpoint-<step>` whose manifest verifies is complete, whenever its writer was killed.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastkd import __version__
from fastkd.files import file_sha256, json_bytes, new_folder, remove_folder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_FILE = "MANIFEST.json"
STATE_FILE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or would be overwritten; the message names the file and the reason."""


def save_checkpoint(output_dir: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write `output_dir/checkpoint-<step>` and return its path.

    `tensors` holds one safetensors file per entry ("model", "optimizer", ...), each a flat mapping of names to tensors;
    `state` is anything JSON can hold. Tensors that share memory (a tied embedding and head) are each stored in full, so
    every name is there when the file is read; loading both into tied parameters writes the same values twice.

    A failed save removes what it wrote and raises; checkpoints that existed stay. A checkpoint that verifies is never
    overwritten (`CheckpointError`): see `discard_checkpoints_after`. One that does not verify is replaced.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
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
    with new_folder(final) as folder:
        for name, entries in tensors.items():
            safetensors.torch.save_file(_separate(entries), folder / f"{name}.safetensors")
        (folder / STATE_FILE).write_bytes(json_bytes(state))
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "fastkd": __version__,
            "torch": torch.__version__,
            "files": {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(folder.iterdir())},
        }
        (folder / MANIFEST_FILE).write_bytes(_sealed(manifest))
    return final


def verify_checkpoint(path: str | Path) -> None:
    """Return if every file that the manifest of checkpoint `path` lists has its size and SHA-256, and the manifest its own.

    Raises `CheckpointError`, naming the file and what is wrong with it, otherwise.
    """
    _read_manifest(Path(path))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Verify checkpoint `path` and return its `(tensors, state)` as given to `save_checkpoint`, tensors on `device`."""
    path = Path(path)
    files = [path / name for name in _read_manifest(path)["files"]]
    tensors = {file.stem: safetensors.torch.load_file(file, device=str(device)) for file in files if file.suffix == ".safetensors"}
    return tensors, json.loads((path / STATE_FILE).read_bytes())


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
