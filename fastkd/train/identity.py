"""What decides the result of a run: its settings, and the content of its models and rows, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models.folder import SLOT_BIAS_FILE, VOCAB_MAP_FOLDER, model_folder, weight_files
from ..sealed import content_sha256
from ..vocab.count import TokenCounts, tokenizer_fingerprint
from .config import STAGE_KEYS, RunConfig, StageArguments, Vocabulary
from .paths import PATHS

# These change what is kept or shown of a run, not what it computes.
COSMETIC = frozenset(
    {
        *("output_dir", "overwrite_output_dir", "cache_dir", "logging_steps", "report_to", "profile_steps"),
        *("save_steps", "save_total_limit", "async_save", "save_failure"),
        *("fsdp", "fsdp_teacher", "ddp_timeout", "backend"),
    }
)
_BESIDE_WEIGHTS = ("config.json", "filters.json", SLOT_BIAS_FILE, f"{VOCAB_MAP_FOLDER}/*.safetensors")


def run_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that all stages of a run share."""
    return _decisive({key: value for key, value in asdict(config).items() if key not in STAGE_KEYS and key != "stages"})


def stage_settings(arguments: StageArguments, options: Mapping[str, Any], data: str, *, world_size: int) -> dict[str, Any]:
    """The settings of a stage whose rows are of the kind `data`: of accumulation and ranks, how many micro-batches a step has.

    options: the method's, with its defaults.
    """
    unread = {"text", "task", "dataset"} - {data}
    kept = {key: value for key, value in asdict(arguments).items() if key in STAGE_KEYS - unread}
    steps = arguments.gradient_accumulation_steps * world_size
    return _decisive({**kept, "options": options, "gradient_accumulation_steps": steps})


def vocabulary_settings(vocabulary: Vocabulary) -> dict[str, Any]:
    """How the kept vocabulary is chosen; counts that are named, by their content."""
    counts = None if vocabulary.counts is None else TokenCounts.load(vocabulary.counts).counts
    digest = None if counts is None else hashlib.sha256(counts.numpy().tobytes()).hexdigest()
    return {**_decisive(asdict(vocabulary)), "counts_sha256": digest}


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex SHA-256 of how a tokenizer cuts text, and of its special tokens."""
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return hashlib.sha256(f"{tokenizer_fingerprint(tokenizer)} {special}".encode()).hexdigest()


def model_digest(name_or_path: str) -> str:
    """Hex SHA-256 of the configuration, weights and vocabulary map of a model, or of filters, in a folder or of the hub."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        if folder.is_absolute():
            raise FileNotFoundError(f"{folder} does not exist.")
        folder = model_folder(name_or_path, weights=True)
    files = sorted({*weight_files(folder), *(file for pattern in _BESIDE_WEIGHTS for file in folder.glob(pattern))})
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
        hashes = list(pool.map(content_sha256, files))
    lines = [f"{file.relative_to(folder).as_posix()} {sha256}\n" for file, sha256 in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _decisive(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in COSMETIC and key not in PATHS  # what lies there is in the identity by its content
    }
