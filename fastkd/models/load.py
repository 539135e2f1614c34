"""Models and tokenizers from a folder or a hub name: plain transformers folders, and students saved with their vocabulary map."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import doing
from ..store import write_bytes_atomic
from ..tasks.token_rows import num_ids
from ..vocab.map import VocabMap
from .folder import (
    MAPPED_MODEL_TYPE,
    RELU_HEAD_MODEL_TYPE,
    SLOT_BIAS_FILE,
    VOCAB_MAP_FOLDER,
    close_folder,
    closed_by,
    model_folder,
    own_settings,
)
from .language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .task_model import TaskModel
    from .teacher_cache import CachedTeacher

log = logging.getLogger("fastkd")
_WORDS = "words"
_GIVE_WORDS_HEAD = "Give a masked or causal language model."
_FINE_TUNE = "Fine-tune it first: by a stage that trains the teacher, or by method finetune."
# Heads read these, and a configuration that leaves them to the backbone's dropout does not name them.
_HEAD_DROPOUTS = ("cls_dropout", "classifier_dropout")
_POOLER = re.compile(r"(^|\.)pooler\.")
_WRAPPER = re.compile(r"(^|\.)(module|_orig_mod)\.")


def load_config(name_or_path: str, dropout: Mapping[str, float] | None = None) -> PretrainedConfig:
    """The transformers configuration at a folder or hub name, with other dropout probabilities; never runs code from there."""
    with loading("model", name_or_path):
        config = _read_config(model_folder(name_or_path))
    for name, probability in (dropout or {}).items():
        if not hasattr(config, name) and name not in _HEAD_DROPOUTS:
            known = ", ".join(key for key in config.to_dict() if "drop" in key)
            raise ValueError(f"dropout.{name} is not a setting of {type(config).__name__}, which has {known or 'no dropout'}.")
        setattr(config, name, probability)
    return config


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer at a folder or hub name; ValueError if it is a slow one."""
    from transformers import AutoTokenizer

    with loading("tokenizer", name_or_path):
        folder = model_folder(name_or_path, "tokenizer_config.json", "a tokenizer")
        config = _read_config(folder) if closed_by(folder) else None  # its class may depend on the model's type
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer at {name_or_path} is a slow one; fastkd needs a fast tokenizer (tokenizer.json).")
    return tokenizer


def load_language_model(
    name_or_path: str, dtype: torch.dtype = torch.float32, *, dropout: Mapping[str, float] | None = None
) -> LanguageModel:
    """A masked or causal language model, with the vocabulary map beside it if there is one, and with these dropout probabilities.

    Raises:
        ValueError: there is no such model, or its files do not hold every weight of it, those of a head for words among them.
    """
    config = load_config(name_or_path, dropout)
    _check_words_head(name_or_path, config)
    model = load_weights(auto_class(config), name_or_path, config, dtype, head=_WORDS)
    return LanguageModel(model, load_map(name_or_path))


def load_weights(
    kind: Any, name_or_path: str, config: PretrainedConfig, dtype: torch.dtype, *, head: str, new_head: bool = False
) -> PreTrainedModel:
    """The transformers model of class `kind`, every weight of which is read from the files at `name_or_path`.

    Args:
        kind: one of transformers' AutoModelFor... classes.
        name_or_path: a folder or a hub name.
        config: the model's.
        dtype: of the weights.
        head: what the model's head is for, as a refusal calls it: words, or a kind of task.
        new_head: what is not part of the backbone may be missing, or of other shapes: it is drawn at random, as is a pooler.

    Raises:
        ValueError: weights are missing, have other shapes, or belong to layers that the configuration does not count.
    """
    with loading("model", name_or_path):
        loaded: tuple[PreTrainedModel, dict[str, Any]] = kind.from_pretrained(
            model_folder(name_or_path, weights=True),
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by their names
            output_loading_info=True,
        )
    model, found = loaded
    lost = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    pooler = {name for name in lost if _POOLER.search(name)}
    if head == _WORDS:
        lost -= pooler  # nobody reads it
    backbone = {name for name in lost - pooler if name.startswith(f"{model.base_model_prefix}.")}
    _check_lost(model, name_or_path, backbone if new_head else lost, backbone, found["unexpected_keys"], head)
    shapes = {_unnumbered(name) for name in model.state_dict()}
    if extra := [name for name in found["unexpected_keys"] if _unnumbered(name) in shapes]:
        raise ValueError(
            f"The model {name_or_path} holds the weights {_listed(extra)} of layers that its config.json does not count, and they "
            "would be left out. Put back its own config.json; for a student of fewer layers, set student_layers."
        )
    return model


def _check_lost(model: PreTrainedModel, source: str, lost: set[str], backbone: set[str], left: Iterable[str], head: str) -> None:
    """Refuse a model of which `lost` weights, those of its `backbone` among them, would be random; `left`: its files' other tensors."""
    if not lost:
        return
    kind = type(model).__name__
    if wrapped := [name for name in left if _WRAPPER.search(name)]:
        raise ValueError(
            f"The model {source} was saved inside a wrapper: its weights are called {_listed(wrapped)}, so those of {kind} are "
            "missing. Save the model that is wrapped: `module` of DistributedDataParallel, `_orig_mod` of torch.compile."
        )
    if not backbone:
        remedy = _GIVE_WORDS_HEAD if head == _WORDS else _FINE_TUNE
        raise ValueError(f"{_headless(source, model.config, head)}: {_listed(lost)} are missing and would be random. {remedy}")
    raise ValueError(
        f"The model {source} lacks the weights {_listed(lost)} of {kind}, or has them in other shapes, and they would be random: its "
        "files are not whole, or its config.json is another model's. Copy or save it again."
    )


def _headless(source: str, config: PretrainedConfig, head: str) -> str:
    saved = ", ".join(config.architectures or ()) or "no known class"
    return f"The model {source} was saved as {saved}, which has no trained head for {head}"


def _listed(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    shown = ", ".join([first, *others[:2]])
    return f"{shown} and {len(others) - 2} more" if len(others) > 2 else shown


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def class_names(*tasks: str) -> set[str]:
    """The names of transformers' classes for `tasks`, which are written as in its tables, such as MASKED_LM."""
    from transformers.models.auto import modeling_auto

    return {name for task in tasks for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()}


def _check_words_head(source: str, config: PretrainedConfig) -> None:
    """Refuse a model that was saved with the head of a task: a tied head for words would be there all the same."""
    heads = class_names("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE")
    saved = config.architectures or ()
    if saved and heads.issuperset(saved):
        raise ValueError(f"{_headless(source, config, _WORDS)}. {_GIVE_WORDS_HEAD}")


def save_model(model: LanguageModel | TaskModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The mapped form: the transformers model on the kept rows, the teacher's tokenizer, and the map between them."""
    model.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_vocabulary(model, folder)


def save_vocabulary(model: LanguageModel | TaskModel, folder: Path) -> None:
    """Make the mapped form of the transformers model saved in `folder`: the map, the slots' bias if it has one, and a configuration
    that plain transformers refuses, as it does that of a head which is fastkd's own. To another model nothing is added."""
    if isinstance(model, LanguageModel) and model.slot_bias is not None:
        write_bytes_atomic(folder / SLOT_BIAS_FILE, safetensors.torch.save({"slot_bias": model.slot_bias}))
    else:
        (folder / SLOT_BIAS_FILE).unlink(missing_ok=True)
    if model.vocab_map is not None:
        model.vocab_map.save(folder / VOCAB_MAP_FOLDER)
        close_folder(folder, MAPPED_MODEL_TYPE)
    elif has_relu_head(model.model.config):
        close_folder(folder, RELU_HEAD_MODEL_TYPE)


def has_relu_head(config: Any) -> bool:
    """Whether a model was saved as `BertWithReLUHead`, which no class of transformers is."""
    return "BertWithReLUHead" in (config.architectures or ())


def load_frozen(name_or_path: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model that is asked and not trained: in evaluation mode, no parameter takes a gradient. One that is trained on has no
    `slot_bias` but what its next objective gives it."""
    model = load_language_model(name_or_path, dtype)
    bias = model_folder(name_or_path) / SLOT_BIAS_FILE
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
    """Whether the model (a folder, hub name or configuration) predicts the next token rather than a masked one.

    For where there are no weights; with them `LanguageModel.causal` says it, and refuses a model that is not what its class is for.
    A class for both, such as XLM's, is asked with weights drawn at random.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = load_config(model) if isinstance(model, str) else model
    kind = auto_class(config)
    if kind.__name__ == "AutoModelForCausalLM":
        return True
    if MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type) not in class_names("CAUSAL_LM"):
        return False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LanguageModel(kind.from_config(config, dtype=torch.float32)).causal


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


def known_ids(model: LanguageModel | TaskModel | CachedTeacher, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids, from 0 on, both the tokenizer and the model have."""
    return min(num_ids(tokenizer), vocabulary_rows(model))


def vocabulary_rows(model: LanguageModel | TaskModel | CachedTeacher) -> int:
    """How many ids the model has a row for: slots count for all ids behind them."""
    if model.vocab_map is not None:
        return model.vocab_map.vocab_size
    embeddings: Any = model.model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def check_padded_vocabulary(model: LanguageModel | TaskModel, tokenizer: PreTrainedTokenizerBase, role: str, largest_id: int) -> None:
    """Refuse a model without a row for an id that it reads; one with more rows than ids (padding) is sliced, with one log line.

    largest_id: the highest id of the rows of text. A tokenizer may have more ids than the model has rows, if they never occur.
    """
    rows, ids = vocabulary_rows(model), num_ids(tokenizer)
    if rows <= largest_id:
        raise ValueError(
            f"The {role} has {rows} vocabulary rows and its tokenizer {ids} ids, and the id {largest_id} occurs in what it reads. Use "
            "the tokenizer that the model was trained with, or resize the model's embeddings."
        )
    tell_padding(role, rows, ids)


def tell_padding(role: str, rows: int, ids: int) -> None:
    """Log, if there are any, the vocabulary rows of a model that are beyond all ids and are left out."""
    if rows > ids:
        log.info("The %s's vocabulary is padded: %d rows for %d ids; rows from %d on are left out.", role, rows, ids, ids)


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
    """Rows longer than the model's positions, learned ones or those that it was made to rotate, are refused; key: what makes them
    shorter."""
    limit = longest_row(model) or _most_rotated(model)
    if limit is not None and longest > limit:
        raise ValueError(f"The longest row takes {longest} positions and the {role} has {limit}; lower {key}.")


def _most_rotated(model: torch.nn.Module) -> int | None:
    """The most tokens that the configuration of a model with rotary positions allows, with its scaling; None without rotary ones."""
    config: Any = next(module.config for module in model.modules() if hasattr(module, "config"))
    config = config.get_text_config()
    rope, most = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
    if not rope or most is None:
        return None
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # some have one for each type of layer
    return int(most * max(1.0, *(float(part.get("factor") or 1.0) for part in kinds)))


@contextmanager
def loading(what: str, name_or_path: str) -> Iterator[None]:
    """Name the model or tokenizer in what transformers raises in the block of a folder, or of a hub, that it cannot load."""
    try:
        with doing(f"loading the {what} {name_or_path}"):
            yield
    except (OSError, ValueError, SafetensorError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"The {what} {name_or_path} cannot be loaded: {error}") from error


def load_map(name_or_path: str) -> VocabMap | None:
    """The vocabulary map beside a model, None where it has all of its vocabulary; ValueError where it is missing."""
    folder = model_folder(name_or_path)
    if (folder / VOCAB_MAP_FOLDER).is_dir():
        return VocabMap.load(folder / VOCAB_MAP_FOLDER)
    if closed_by(folder) == MAPPED_MODEL_TYPE:
        raise ValueError(
            f"The model {name_or_path} was saved with a vocabulary map and holds no {VOCAB_MAP_FOLDER}/ now: copy that folder too, or "
            "`fastkd export` the student where it is whole, and copy that."
        )
    return None


def _read_config(folder: Path) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    if closed_by(folder) is None:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config
    settings = own_settings(folder)
    kind = settings["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{folder / 'config.json'} is of a {kind!r} model, which transformers does not know; put it back.")
    return CONFIG_MAPPING[kind].from_dict(settings)
