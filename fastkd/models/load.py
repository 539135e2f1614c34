"""Models and tokenizers from a folder or a hub name: plain transformers folders, and students saved with their vocabulary map."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ..errors import doing
from ..sealed import read_json
from ..store import write_bytes_atomic
from ..vocab.map import VocabMap
from .language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from .task_model import TaskModel

log = logging.getLogger("fastkd")
VOCAB_MAP_FOLDER = "vocab_map"
SLOT_BIAS_FILE = "slot_bias.safetensors"
# Heads read these, and a configuration that leaves them to the backbone's dropout does not name them.
_HEAD_DROPOUTS = ("cls_dropout", "classifier_dropout")
_LFS_POINTER = b"version https://git-lfs.github.com/spec"


def load_config(name_or_path: str, dropout: Mapping[str, float] | None = None) -> PretrainedConfig:
    """The transformers configuration at a folder or hub name, with other dropout probabilities; never runs code from there."""
    from transformers import AutoConfig

    _check_folder(name_or_path, "config.json", "a transformers model")
    with loading("model", name_or_path):
        config: PretrainedConfig = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    for name, probability in (dropout or {}).items():
        if not hasattr(config, name) and name not in _HEAD_DROPOUTS:
            known = ", ".join(key for key in config.to_dict() if "drop" in key)
            raise ValueError(f"dropout.{name} is not a setting of {type(config).__name__}, which has {known or 'no dropout'}.")
        setattr(config, name, probability)
    return config


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer at a folder or hub name; ValueError if it is a slow one."""
    from transformers import AutoTokenizer

    _check_folder(name_or_path, "tokenizer_config.json", "a tokenizer")
    with loading("tokenizer", name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer at {name_or_path} is a slow one; fastkd needs a fast tokenizer (tokenizer.json).")
    return tokenizer


def load_language_model(
    name_or_path: str, dtype: torch.dtype = torch.float32, *, dropout: Mapping[str, float] | None = None
) -> LanguageModel:
    """A masked or causal language model, with the vocabulary map beside it if there is one, and with these dropout probabilities."""
    config = load_config(name_or_path, dropout)
    with loading("model", name_or_path):
        model = auto_class(config).from_pretrained(
            name_or_path, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    folder = Path(name_or_path) / VOCAB_MAP_FOLDER
    return LanguageModel(model, VocabMap.load(folder) if folder.is_dir() else None)


def save_model(model: LanguageModel | TaskModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The mapped form: the transformers model on the kept rows, the teacher's tokenizer, and the map between them."""
    model.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_vocabulary(model, folder)


def save_vocabulary(model: LanguageModel | TaskModel, folder: Path) -> None:
    """What the mapped form has beside the transformers model, in place of what is there: the map, and the slots' bias if it has one."""
    if model.vocab_map is not None:
        model.vocab_map.save(folder / VOCAB_MAP_FOLDER)
    if isinstance(model, LanguageModel) and model.slot_bias is not None:
        write_bytes_atomic(folder / SLOT_BIAS_FILE, safetensors.torch.save({"slot_bias": model.slot_bias}))
    else:
        (folder / SLOT_BIAS_FILE).unlink(missing_ok=True)


def load_frozen(name_or_path: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model that is asked and not trained: in evaluation mode, no parameter takes a gradient. One that is trained on has no
    `slot_bias` but what its next objective gives it."""
    model = load_language_model(name_or_path, dtype)
    bias = Path(name_or_path) / SLOT_BIAS_FILE
    if bias.is_file():
        model.slot_bias = safetensors.torch.load_file(bias)["slot_bias"]
    return model.eval().requires_grad_(False)


def auto_class(config: PretrainedConfig) -> Any:
    """AutoModelForMaskedLM or AutoModelForCausalLM: what the checkpoint's own architecture says, else what the model type can be."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kinds = ((MODEL_FOR_MASKED_LM_MAPPING_NAMES, AutoModelForMaskedLM), (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM))
    for architecture in config.architectures or ():
        for names, kind in kinds:
            if architecture in names.values():
                return kind
    for names, kind in kinds:
        if config.model_type in names:
            return kind
    raise ValueError(
        f"Model type {config.model_type!r} has neither a masked nor a causal language-modelling head in transformers; "
        "give an encoder with an MLM head or a decoder."
    )


def is_decoder(model: str | PretrainedConfig) -> bool:
    """Whether the model (a folder, hub name or configuration) predicts the next token rather than a masked one."""
    kind: type = auto_class(load_config(model) if isinstance(model, str) else model)
    return kind.__name__ == "AutoModelForCausalLM"


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Teacher and student must give every token the same id; the first ids that differ are shown."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    by_id = [{index: token for token, index in vocabulary.items()} for vocabulary in (theirs, ours)]
    differing = [i for i in sorted({*by_id[0], *by_id[1]}) if by_id[0].get(i) != by_id[1].get(i)][:3]
    shown = "; ".join(f"id {i} is {by_id[0].get(i)!r} for the teacher and {by_id[1].get(i)!r} for the student" for i in differing)
    raise ValueError(
        f"Teacher and student tokenizers differ ({len(theirs)} and {len(ours)} tokens): {shown}. Word prediction needs one "
        "tokenizer; start the student from the teacher's, or use a method made for different tokenizers (such as TRL's GOLD)."
    )


def check_padded_vocabulary(model: LanguageModel | TaskModel, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
    """A model with fewer rows than its tokenizer has ids is refused; one with more (padding) is sliced, with one log line."""
    own_rows = model.model.get_input_embeddings().weight.shape[0]
    rows, tokens = own_rows if model.vocab_map is None else model.vocab_map.vocab_size, len(tokenizer)
    if rows < tokens:
        raise ValueError(
            f"The {role} has {rows} vocabulary rows and its tokenizer {tokens} ids: ids from {rows} on have no row. "
            "Use the tokenizer the model was trained with, or resize the model's embeddings."
        )
    if rows > tokens:
        log.info("The %s's vocabulary is padded: %d rows for %d tokens; rows from %d on are left out.", role, rows, tokens, tokens)


def longest_row(model: torch.nn.Module) -> int | None:
    """The most tokens a row may have: the model's learned positions; None for rotary and relative ones, which have no such end."""
    limits = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)  # RoBERTa counts from its pad on
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and re.search(r"(position_embeddings|embed_positions|wpe)$", name)
    ]
    return min(limits, default=None)


def check_row_length(
    model: LanguageModel | TaskModel, longest: int, role: str, key: str = "the max_length of text or task.cloze"
) -> None:
    """Rows longer than the model's learned positions are refused; key: what makes them shorter."""
    limit = longest_row(model)
    if limit is not None and longest > limit:
        raise ValueError(f"The longest row takes {longest} positions and the {role} has {limit}; lower {key}.")


@contextmanager
def loading(what: str, name_or_path: str) -> Iterator[None]:
    """Name the model or tokenizer in what transformers raises in the block of a folder, or of a hub, that it cannot load."""
    try:
        with doing(f"loading the {what} {name_or_path}"):
            yield
    except (OSError, ValueError, SafetensorError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"The {what} {name_or_path} cannot be loaded: {error}") from error


def _check_folder(name_or_path: str, needed: str, what: str) -> None:
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / needed).is_file():
            raise ValueError(f"The folder {name_or_path} holds no {needed}, so it is not {what}; give one made by save_pretrained.")
        for file in sorted([*path.glob("*.json"), *weight_files(path)]):
            _check_whole(file)
    elif path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise ValueError(f"{name_or_path} does not exist; give a folder made by save_pretrained, or a hub name such as org/model.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder that transformers reads: those of the index, or the one of its name, or all."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if index.is_file():
        names = sorted({*read_json(index, "weight_map")["weight_map"].values()})
        return [folder / name for name in names if (folder / name).is_file()]
    return sorted(folder.glob("*.safetensors"))


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
