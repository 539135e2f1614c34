"""The folder of a model: the one that is named, or where the files of a hub name lie on this machine; only whole ones are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..sealed import read_json

VOCAB_MAP_FOLDER = "vocab_map"
SLOT_BIAS_FILE = "slot_bias.safetensors"
_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_pinned: dict[str, str] | None = None
"""Within `one_revision`, the revision that every hub name stands for."""
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", f"{VOCAB_MAP_FOLDER}/*", SLOT_BIAS_FILE]


def model_folder(name_or_path: str, needed: str = "config.json", what: str = "a transformers model", *, weights: bool = False) -> Path:
    """The folder of a model or tokenizer: the one that is named, or a hub name's, of which what is missing here is downloaded.

    Args:
        name_or_path: a folder or a hub name.
        needed: the file without which a folder is refused.
        what: that is looked for, as a refusal calls it.
        weights: also the weights, which have to be safetensors.

    Raises:
        ValueError, OSError: there is nothing of the kind, or one of its files is not whole.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / needed).is_file():
            raise ValueError(f"The folder {name_or_path} holds no {needed}, so it is not {what}; give one made by save_pretrained.")
    elif folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise ValueError(f"{name_or_path} does not exist; give a folder made by save_pretrained, or a hub name such as org/model.")
    else:
        folder = _snapshot(name_or_path, weights)
    if weights and not ((folder / _WEIGHTS).is_file() or (folder / _INDEX).is_file()):
        raise ValueError(_without_safetensors(name_or_path, folder))
    for file in sorted([*folder.glob("*.json"), *weight_files(folder)]):
        _check_whole(file)
    return folder


@contextmanager
def one_revision() -> Iterator[None]:
    """Within the block a hub name stands for one revision, whatever is uploaded meanwhile."""
    global _pinned
    before, _pinned = _pinned, {}
    try:
        yield
    finally:
        _pinned = before


def _snapshot(name: str, weights: bool) -> Path:
    """The folder of the hub's newest revision of a model, or of the newest one that is here if the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=(_pinned or {}).get(name), allow_patterns=_HUB_FILES))
    if _pinned is not None:
        _pinned[name] = folder.name
    if not weights:
        return folder
    files = _indexed(folder) if (folder / _INDEX).is_file() else [_WEIGHTS]
    return Path(snapshot_download(name, revision=folder.name, allow_patterns=files))


def _without_safetensors(name: str, folder: Path) -> str:
    import transformers

    saved = next(iter(read_json(folder / "config.json").get("architectures") or ()), "AutoModel")
    kinds = (saved if hasattr(transformers, saved) else "AutoModel", "AutoTokenizer")
    made = f"{Path(name).name}-safetensors"
    steps = "; ".join(f"{kind}.from_pretrained({name!r}).save_pretrained({made!r})" for kind in kinds)
    return (
        f"The model {name} has no {_WEIGHTS}, and fastkd reads no pickles such as pytorch_model.bin, which can run code. Convert it, "
        f'where you trust it, and give {made}: python -c "from transformers import {", ".join(kinds)}; {steps}"'
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder that transformers reads: those of the index, or the one of its name, or all."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        return [folder / name for name in _indexed(folder) if (folder / name).is_file()]
    return sorted(folder.glob("*.safetensors"))


def _indexed(folder: Path) -> list[str]:
    """The names of a model's shards."""
    return sorted({*read_json(folder / _INDEX, "weight_map")["weight_map"].values()})


def _check_whole(file: Path) -> None:
    """Refuse what stands for a file that was never fetched, and tensors of which a part is missing; no tensor is read."""
    with file.open("rb") as content:
        if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{file} is a pointer of git-lfs, not the file itself; fetch it by `git lfs pull` there.")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            size = file.stat().st_size
            raise ValueError(f"{file}, of {size} bytes, is no whole safetensors file ({error}); copy or download it again.") from error
