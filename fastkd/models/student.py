"""Students: built new on a kept vocabulary, pruned from a model with all rows, and exported so that plain transformers opens them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..tasks.labelled import Kind
from ..vocab.map import VocabMap
from ..vocab.tokenizer import prune_tokenizer
from .language_model import LanguageModel
from .load import auto_class, load_config, load_frozen
from .settings import check_builds, new_config, set_all
from .task_model import TaskHead, TaskModel, load_task_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKEN_ID = re.compile(r".*_token_id$")


def build_student(
    base: PretrainedConfig, overrides: Mapping[str, Any], vocab_map: VocabMap | None, *, seed: int, vocabulary: int | None = None
) -> LanguageModel:
    """A student with random weights (the architecture's own initialisation, N(0, 0.02) for most) in float32, drawn from `seed`.

    Args:
        base: the teacher's configuration.
        overrides: what is changed of it; with another `model_type` among them the student is of that architecture and takes nothing but
            the vocabulary and special ids from the teacher.
        vocab_map: the vocabulary that it keeps; None: all of it.
        seed: of the weights; the global generator is left as it was.
        vocabulary: rows of its head without a map; None: the base's.

    Raises:
        ValueError: an override that the configuration has not, or that makes no model.
    """
    config = student_config(base, overrides, vocab_map, vocabulary)
    try:
        return LanguageModel(_initialised(config, auto_class(_named(base, overrides)), seed), vocab_map)
    except RuntimeError as error:
        settings = ", ".join(f"student.{name}={value!r}" for name, value in overrides.items())
        raise ValueError(f"{settings} makes a model that does not run: {error}") from error


def student_config(
    base: PretrainedConfig, overrides: Mapping[str, Any], vocab_map: VocabMap | None, vocabulary: int | None = None
) -> PretrainedConfig:
    """`base` with `overrides`, the kept vocabulary's size, and special ids as slots.

    Raises `ValueError`, naming the key, for what is no setting of the architecture, has no effect, or makes no model.
    """
    overrides = dict(overrides)
    special = {name: value for name, value in base.to_dict().items() if _TOKEN_ID.match(name) and value is not None}
    kind = overrides.pop("model_type", base.model_type)
    config = copy.deepcopy(base) if kind == base.model_type else new_config(kind, {"vocab_size": base.vocab_size, **special})
    set_all(config, overrides)
    if vocabulary is not None:
        config.vocab_size = vocabulary
    if vocab_map is not None:
        config.vocab_size = vocab_map.num_kept
        _map_special_ids(config, vocab_map)
    layers, types = getattr(config, "num_hidden_layers", None), getattr(config, "layer_types", None)
    if types is not None and layers is not None and len(types) != layers and "layer_types" not in overrides:
        config.layer_types = [types[i % len(types)] for i in range(layers)]
    check_builds(config, base, overrides)
    return config


def prune_model(model: PreTrainedModel, vocab_map: VocabMap) -> LanguageModel:
    """`model` on the kept rows alone: the rows of its input embedding, head and head bias are gathered, all else is copied."""
    config = copy.deepcopy(model.config)
    config.vocab_size = vocab_map.num_kept
    _map_special_ids(config, vocab_map)
    pruned = _initialised(config, type(model), seed=0).to(model.dtype)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    by_rows = {id(p) for module in embeddings if module is not None for p in module.parameters()}
    targets = dict(pruned.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            targets[name].copy_(parameter[vocab_map.kept_ids] if id(parameter) in by_rows else parameter)
        for name, buffer in pruned.named_buffers():
            source = model.get_buffer(name)
            if source.shape == buffer.shape:
                buffer.copy_(source)
    return LanguageModel(pruned, vocab_map)


def load_student(name_or_path: str) -> LanguageModel | TaskModel:
    """A finished model with the head that it was saved with, whatever that is, in evaluation mode. A file's other tensors, such as
    filters, are left there."""
    from transformers.models.auto import modeling_auto

    def names(*tasks: str) -> set[str]:
        return {name for task in tasks for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()}

    config: Any = load_config(name_or_path)
    saved = next(iter(config.architectures or ()), None)
    if saved in names("MASKED_LM", "CAUSAL_LM", "PRETRAINING"):
        return load_frozen(name_or_path)
    kinds: tuple[tuple[str, Kind, int], ...] = (
        ("SEQUENCE_CLASSIFICATION", "classification", config.num_labels),
        ("QUESTION_ANSWERING", "question_answering", 2),
    )
    for task, kind, outputs in kinds:
        if saved in names(task):
            model = load_task_model(name_or_path, TaskHead(kind, outputs), seed=0, needs_head=True)
            return model.eval().requires_grad_(False)
    raise ValueError(
        f"The model {name_or_path} was saved as {saved or 'no architecture'}, which has no head for words, classes or answers; give a "
        "student as a finished stage leaves it."
    )


def export_student(student: LanguageModel | TaskModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The exported form: `tokenizer` (the teacher's) is rewritten to the kept vocabulary, so that ids are slots and plain
    `AutoTokenizer` and `AutoModel...` open the folder with no fastkd installed. Returns the exported tokenizer."""
    student.model.save_pretrained(folder)
    kept = tokenizer if student.vocab_map is None else prune_tokenizer(tokenizer, student.vocab_map.kept_ids)
    kept.save_pretrained(folder)
    return kept


def count_parameters(model: torch.nn.Module) -> int:
    """Numbers in all parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def _initialised(config: PretrainedConfig, kind: Any, seed: int) -> Any:
    """A model with random float32 weights from `seed`, leaving the global generator as it was. The dtype in a configuration is that of
    the weights it was saved with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = getattr(kind, "from_config", None) or kind._from_config
        return make(config, dtype=torch.float32)


def _named(base: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that says whether the student is an encoder or a decoder."""
    kind = overrides.get("model_type", base.model_type)
    return base if kind == base.model_type else new_config(kind)


def _map_special_ids(config: PretrainedConfig, vocab_map: VocabMap) -> None:
    """Every *_token_id becomes its slot; an id list (several end tokens) becomes a list of slots."""
    for name, value in list(config.to_dict().items()):
        if not _TOKEN_ID.match(name) or value is None:
            continue
        ids = torch.as_tensor(value, dtype=torch.int64)
        # Ids beyond the teacher's rows (a library's default for a model that never uses them) have no slot.
        inside = bool(((ids >= 0) & (ids < vocab_map.vocab_size)).all())
        setattr(config, name, vocab_map.id_to_slot[ids].tolist() if inside else None)
