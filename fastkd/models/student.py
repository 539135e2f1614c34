"""Students: built new on a kept vocabulary, pruned from a model with all rows, and exported so that plain transformers opens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..tasks.labelled import Kind
from ..vocab.map import VocabMap
from ..vocab.tokenizer import prune_tokenizer
from .folder import VOCAB_MAP_FOLDER
from .language_model import LanguageModel
from .load import auto_class, class_names, has_relu_head, load_config, load_frozen, longest_row, vocabulary_rows
from .prune import is_id_setting, set_slots, set_vocabulary
from .settings import building, changed_config, check_builds, new_config
from .task_model import TaskHead, TaskModel, build_task_model, load_task_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


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
    with building(overrides):
        return LanguageModel(_initialised(config, seed), vocab_map)


def student_config(
    base: PretrainedConfig,
    overrides: Mapping[str, Any],
    vocab_map: VocabMap | None,
    vocabulary: int | None = None,
    head: TaskHead | None = None,
) -> PretrainedConfig:
    """`base` with `overrides`, the kept vocabulary's size, and special ids as slots; what is derived from other settings follows them.

    Args:
        base, overrides, vocab_map, vocabulary: as of `build_student`.
        head: that of the student's task; None: it predicts words.

    Raises:
        ValueError: naming the key, for what is no setting of the architecture, has no effect, or makes no model that runs and opens.
    """
    base, overrides = base.get_text_config(), dict(overrides)
    kind = overrides.pop("model_type", base.model_type)
    if kind != base.model_type:
        special = {name: value for name, value in base.to_dict().items() if name.endswith("_token_id") and value is not None}
        base = new_config(kind, {"vocab_size": base.vocab_size, **special})
    config = changed_config(base, overrides)
    rows = vocabulary or config.vocab_size
    _check_ids(overrides, rows)
    set_vocabulary(config, rows if vocab_map is None else vocab_map.num_kept)
    # Ids beyond the rows are a library's defaults for a model that never uses them.
    set_slots(config, torch.arange(rows) if vocab_map is None else torch.where(vocab_map.is_kept, vocab_map.id_to_slot, -1))

    if "max_position_embeddings" not in overrides:
        _keep_positions(config, base)

    def make(config: Any) -> Any:
        return auto_class(config).from_config(config) if head is None else build_task_model(config, head, seed=0).model

    check_builds(config, base, overrides, make)
    return config


def load_student(name_or_path: str) -> LanguageModel | TaskModel:
    """A finished model with the head that it was saved with, whatever that is, in evaluation mode. A file's other tensors, such as
    filters, are left there."""
    config: Any = load_config(name_or_path)
    saved = next(iter(config.architectures or ()), None)
    if has_relu_head(config):
        raise ValueError(
            f"The model {name_or_path} has the head of relu_head, which no class of transformers has, so it cannot be exported: fastkd "
            "alone loads it. Train with relu_head: false for a model that plain transformers opens."
        )
    if saved in class_names("MASKED_LM", "CAUSAL_LM", "PRETRAINING"):
        return load_frozen(name_or_path)
    kinds: tuple[tuple[str, Kind, int], ...] = (
        ("SEQUENCE_CLASSIFICATION", "classification", config.num_labels),
        ("QUESTION_ANSWERING", "question_answering", 2),
    )
    for task, kind, outputs in kinds:
        if saved in class_names(task):
            model = load_task_model(name_or_path, TaskHead(kind, outputs), seed=0, needs_head=True)
            return model.eval().requires_grad_(False)
    raise ValueError(
        f"The model {name_or_path} was saved as {saved or 'no architecture'}, which has no head for words, classes or answers; give a "
        "student as a finished stage leaves it."
    )


def export_student(student: LanguageModel | TaskModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The exported form: `tokenizer` (the teacher's) is rewritten to the kept vocabulary, so that ids are slots and plain
    `AutoTokenizer` and `AutoModel...` open the folder with no fastkd installed. Returns the exported tokenizer.

    Raises `ValueError` where tokens of text have no row in the model.
    """
    rows = vocabulary_rows(student)
    # Added tokens may have none: some tokenizers have a few that no text holds.
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    if without := sum(id >= rows for id in vocabulary.values()):
        raise ValueError(
            f"The model {student.model.name_or_path} has {rows} vocabulary rows, and {without} tokens of its tokenizer have ids beyond "
            f"them. Give it the tokenizer that it was trained with, or the {VOCAB_MAP_FOLDER}/ that lay beside it."
        )
    student.model.save_pretrained(folder)
    kept = (
        tokenizer
        if student.vocab_map is None
        else prune_tokenizer(tokenizer, student.vocab_map.kept_ids, rows=student.vocab_map.vocab_size)
    )
    kept.save_pretrained(folder)
    return kept


def count_parameters(model: torch.nn.Module) -> int:
    """Numbers in all parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def _check_ids(overrides: Mapping[str, Any], count: int) -> None:
    """Refuse an override that names an id beyond the `count` that there are; None names none."""
    for name, value in overrides.items():
        ids = value if isinstance(value, list | tuple) else [value]
        if is_id_setting(name) and any(isinstance(id, int) and not 0 <= id < count for id in ids):
            raise ValueError(
                f"student.{name}={value!r} names no token: ids are from 0 to {count - 1}. Give one of the tokenizer's, or leave it out."
            )


def _keep_positions(config: Any, base: Any) -> None:
    """Give `config` the usable positions of `base` where they begin behind the padding id, as RoBERTa's do, and that has moved."""
    from transformers import AutoModel

    pad, slot = (getattr(each, "pad_token_id", None) for each in (base, config))
    positions = getattr(base, "max_position_embeddings", None) or 0
    if pad is None or slot is None or pad == slot or pad + 1 >= positions:
        return
    with torch.device("meta"):
        usable = longest_row(AutoModel.from_config(base))
    if usable == positions - (pad + 1):
        config.max_position_embeddings += slot - pad


def _initialised(config: PretrainedConfig, seed: int) -> Any:
    """A model with random float32 weights from `seed`, leaving the global generator as it was. The dtype in a configuration is that of
    the weights it was saved with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class(config).from_config(config, dtype=torch.float32)
