"""Durable records of the vocabulary: counts, maps and stand-ins as sealed files.

A record is named tensors plus a little JSON-able metadata, kept in one directory as two files: `<kind>.json`, the manifest,
and `<kind>-<sha256>.safetensors`. The tensors file has its own hash in its name and the manifest is renamed into place
after it, so a reader sees the previous record or the new one, never a mixture, whenever the writer is killed. Two
processes that may write the same record at once need a lock around it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fastkd.sealed import Damaged, file_sha256, read_bytes, read_json
from fastkd.store import sweep, write_bytes_atomic, write_json_atomic


def record_exists(directory: str | Path, kind: str) -> bool:
    """Whether `directory` holds a record `kind`, whole or not."""
    return _manifest_path(directory, kind).exists()


def save_record(directory: str | Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write the record `kind`, atomically replacing the one that `directory` may already hold.

    What is deleted are the tensors files of that one and of killed saves: those whose names carry the hash of their own content.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    tensors_sha256 = hashlib.sha256(data).hexdigest()
    manifest = {
        "kind": kind,
        "tensors_sha256": tensors_sha256,
        "metadata_sha256": _metadata_sha256(metadata),
        "metadata": metadata,
    }
    tensors_path = _tensors_path(directory, kind, tensors_sha256)
    write_bytes_atomic(tensors_path, data)
    write_json_atomic(_manifest_path(directory, kind), manifest)
    tensors_name = re.compile(rf"{kind}-([0-9a-f]{{16}})\.safetensors")
    sweep(directory, lambda name: name == f"{kind}.json" or bool(tensors_name.fullmatch(name)))
    for stale in directory.iterdir():
        match = tensors_name.fullmatch(stale.name)
        if match and stale != tensors_path and stale.is_file() and not stale.is_symlink() and file_sha256(stale).startswith(match[1]):
            stale.unlink(missing_ok=True)


def load_record(directory: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back (tensors, metadata); a missing, unreadable or changed file is refused by name."""
    manifest_path = _manifest_path(directory, kind)
    while True:
        try:
            manifest = read_json(manifest_path, "tensors_sha256", "metadata_sha256", "metadata")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"There is no {kind} in {directory}: {manifest_path.name} is missing.") from error
        except Damaged as error:
            raise ValueError(f"{error} It is not a readable {kind} manifest; delete it and create it again.") from error
        tensors_path = _tensors_path(directory, kind, str(manifest["tensors_sha256"]))
        try:
            data = read_bytes(tensors_path)
            break
        except FileNotFoundError as error:
            with suppress(Damaged):
                if read_json(manifest_path) != manifest:  # another process has replaced the record meanwhile
                    continue
            raise FileNotFoundError(
                f"{manifest_path} belongs to {tensors_path.name}, which is missing beside it; copy both files, or create the {kind} "
                "again."
            ) from error
    metadata: dict[str, Any] = manifest["metadata"]
    for path, expected, found in (
        (manifest_path, manifest["metadata_sha256"], _metadata_sha256(metadata)),
        (tensors_path, manifest["tensors_sha256"], hashlib.sha256(data).hexdigest()),
    ):
        if expected != found:
            raise ValueError(
                f"{path} was changed after it was written: its sha256 is {found}, {manifest_path.name} says "
                f"{expected}; restore the original, or delete both files and create the {kind} again."
            )
    return safetensors.torch.load(data), metadata


def _manifest_path(directory: str | Path, kind: str) -> Path:
    return Path(directory) / f"{kind}.json"


def _tensors_path(directory: str | Path, kind: str, sha256: str) -> Path:
    return Path(directory) / f"{kind}-{sha256[:16]}.safetensors"


def _metadata_sha256(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
