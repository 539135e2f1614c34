"""Models pruned to a kept vocabulary: tables by id are gathered, ids become slots, all else is copied, and the logits are compared."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..vocab.map import VocabMap
from .language_model import LanguageModel
from .load import longest_row

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

_ID = re.compile(r"(\w+_token_(id|index)|(pad|bos|eos|unk|mask)_index|(begin_)?suppress_tokens)$")
_VOCABULARY = re.compile(r"(decoder_)?vocab_size")  # and its longer names, such as Gemma's vocab_size_per_layer_input
_ID_SEQUENCES = ("bad_words_ids", "force_words_ids", "sequence_bias")
_LONGEST_COMPARED = 512


def prune_model(model: PreTrainedModel | LanguageModel, vocab_map: VocabMap) -> LanguageModel:
    """`model` on the kept ids alone, with the logits that it had.

    The rows of every table by id are gathered: the input embedding, the head, its bias, and what else grows with the vocabulary. All
    other parameters and buffers are copied bit for bit, in their own dtypes, and so are both configurations, where ids become slots. A
    slot that stays keeps its `slot_bias`, and the model its mode, training or evaluation.

    Args:
        model: a masked or causal language model; a `LanguageModel` may itself have a map, which the new one then replaces.
        vocab_map: over the ids that `model` is called with.

    Raises:
        ValueError: an id without a row, or a model whose logits on kept ids would be others; the sentence names what stands against it.
    """
    whole = model if isinstance(model, LanguageModel) else LanguageModel(model)
    source, before = whole.model, whole.vocab_map
    rows = _rows_behind(vocab_map, before)
    tables = _tables_by_id(source, int(rows.max()))
    slot_of = torch.full((_vocabulary(source.config),), -1).index_copy(0, rows, torch.arange(len(rows)))
    config = copy.deepcopy(source.config)
    set_vocabulary(config, len(rows))
    set_slots(config, slot_of)
    name, reason = f"{type(source).__name__} on {len(rows)} ids", _reason(source, slot_of, before, len(rows))
    try:
        pruned = _without_weights(type(source), config, source.dtype)
        _fill(pruned, source, tables, rows)
        if getattr(source, "generation_config", None) is not None:
            pruned.generation_config = _in_slots(source.generation_config, slot_of)
        student = LanguageModel(pruned, vocab_map)
        difference, rounding = _compare(whole, student, rows)
    except Exception as error:  # a library's, of any kind: the model runs on all of its ids
        raise ValueError(f"{name} does not run ({type(error).__name__}: {error}): {reason}") from error
    if not difference <= rounding:
        raise ValueError(f"{name} has other logits than before (by {difference:.2g}): {reason}")
    if whole.slot_bias is not None:
        student.slot_bias = whole.slot_bias[rows.to(whole.slot_bias.device)]
    return student.train(source.training)


def padding_ids(model: nn.Module) -> list[int]:
    """The ids that modules know as padding. Some architectures count positions from theirs, so that it must be its own slot."""
    ids = {getattr(module, "padding_idx", None) for module in model.modules()}
    return sorted(id for id in ids if isinstance(id, int) and id >= 0)


def is_id_setting(name: str) -> bool:
    """Whether a setting of this name holds an id, or a list of ids."""
    return _ID.match(name) is not None


def set_vocabulary(config: PretrainedConfig, size: int) -> None:
    """Give every table by id of the model that `config` describes `size` rows."""
    for part in _parts(config):
        for name in {"vocab_size", *filter(_VOCABULARY.match, part.to_dict())}:
            if hasattr(part, name):
                setattr(part, name, size)


def set_slots(config: PretrainedConfig, slot_of: Tensor) -> None:
    """Replace every id of `config` by its slot.

    Args:
        config: changed in place; an id without a slot becomes None, and is left out of a list.
        slot_of: (V,) int64, the slot of every id, -1 where it has none.
    """
    for part in _parts(config):
        for name, value in part.to_dict().items():
            if not is_id_setting(name) or value is None:
                continue
            try:
                setattr(part, name, _slots(value, slot_of))
            except Exception as error:  # a library's: this configuration has to name a token
                if isinstance(value, int) and 0 <= value < len(slot_of):
                    raise ValueError(f"{name}={value} of {type(part).__name__} is not kept; name it in protected.") from error


def _parts(config: PretrainedConfig) -> Iterator[Any]:
    yield config
    if config.get_text_config() is not config:
        yield config.get_text_config()


def _vocabulary(config: PretrainedConfig) -> int:
    size: int = config.get_text_config().vocab_size
    return size


def _in_slots(generation: GenerationConfig, slot_of: Tensor) -> GenerationConfig:
    """A copy with slots for ids. A sequence of which a token is dropped can not be generated, and goes."""
    changed = copy.deepcopy(generation)
    for name, value in vars(generation).items():
        if value is not None and (is_id_setting(name) or name in _ID_SEQUENCES):
            value = list(value.items()) if isinstance(value, dict) else value
            setattr(changed, name, _slots(value, slot_of, whole=name in _ID_SEQUENCES))
    # transformers saves a configuration that it finds fault with only if it is as it was loaded.
    if getattr(generation, "_original_object_hash", None) == hash(generation):
        changed._original_object_hash = hash(changed)
    return changed


def _slots(ids: Any, slot_of: Tensor, *, whole: bool = False) -> Any:
    """An id's slot, or the slots of a list; None if there are none, with `whole` also if a sequence lacks one."""
    if isinstance(ids, float):
        return ids  # the bias of a sequence
    if isinstance(ids, int):
        return int(slot_of[ids]) if 0 <= ids < len(slot_of) and slot_of[ids] >= 0 else None
    found = [_slots(each, slot_of, whole=whole) for each in ids]
    kept = [each for each in found if each is not None]
    is_sequence = any(isinstance(each, (int, float)) for each in ids)
    return None if not kept or (whole and is_sequence and len(kept) < len(found)) else kept


def _rows_behind(vocab_map: VocabMap, before: VocabMap | None) -> Tensor:
    """(V_k,) int64, the model's row behind every slot of the map; `before`: the map that the model already has."""
    ids = vocab_map.kept_ids.cpu()
    if before is None:
        return ids
    before = before.to("cpu")
    lost = ids[(ids >= before.vocab_size) | ~before.is_kept[ids.clamp_max(before.vocab_size - 1)]]
    if len(lost):
        raise ValueError(
            f"The vocabulary map keeps id {int(lost[0])}, which the model has no row of its own for: it keeps {before.num_kept} of "
            f"{before.vocab_size} ids. Choose among those, its vocab_map.kept_ids."
        )
    return before.id_to_slot[ids]


def _tables_by_id(model: PreTrainedModel, highest: int) -> dict[str, list[int]]:
    """Names of the parameters and buffers that grow with the vocabulary, with the dimensions that do.

    Raises `ValueError` for one that has no row for the `highest` id that is kept, or rows for more than ids.
    """
    kind, vocabulary = type(model).__name__, _vocabulary(model.config)
    config = copy.deepcopy(model.config)
    described = dict(_tensors(_without_weights(type(model), config, model.dtype)))
    set_vocabulary(config, vocabulary + 1)
    grown = dict(_tensors(_without_weights(type(model), config, model.dtype)))
    tables = {}
    for name, tensor in _tensors(model):
        if name not in described or (isinstance(tensor, nn.Parameter) and described[name].shape != tensor.shape):
            raise ValueError(
                f"{kind} has {name} of shape {tuple(tensor.shape)}, and the model that its configuration describes has not; prune a "
                "model as from_pretrained opens it."
            )
        dims = [dim for dim, size in enumerate(described[name].shape) if grown[name].shape[dim] != size]
        if any(tensor.shape[dim] > vocabulary for dim in dims):
            raise ValueError(
                f"{name} of {kind} is {tuple(tensor.shape)} for {vocabulary} ids: it has rows that are reached by computing with ids, "
                "which pruning changes. Keep its whole vocabulary."
            )
        if any(tensor.shape[dim] <= highest for dim in dims):
            raise ValueError(
                f"The vocabulary map keeps id {highest}, and {name} of {kind} is {tuple(tensor.shape)}; choose among the ids it has."
            )
        if dims:
            tables[name] = dims
    return tables


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _without_weights(kind: Any, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return kind._from_config(copy.deepcopy(config), dtype=dtype)


def _fill(pruned: nn.Module, model: nn.Module, tables: dict[str, list[int]], rows: Tensor) -> None:
    """Give `pruned`, which has no weights yet, those of `model`; what is tied there is tied here."""
    made: dict[int, Any] = {}
    for path, module in pruned.named_modules():
        source = model.get_submodule(path)
        for own, given in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
            for name, placeholder in own.items():
                tensor = given[name]
                if tensor is None or placeholder is None:
                    continue
                if id(tensor) not in made:
                    gathered = _gathered(tensor, tables.get(f"{path}.{name}".lstrip("."), []), rows)
                    if isinstance(placeholder, nn.Parameter):
                        gathered = nn.Parameter(gathered, requires_grad=placeholder.requires_grad)
                    made[id(tensor)] = gathered
                own[name] = made[id(tensor)]


def _gathered(tensor: Tensor, dims: list[int], rows: Tensor) -> Tensor:
    """A copy with the given rows alone along `dims`."""
    gathered = tensor.detach() if dims else tensor.detach().clone()
    for dim in dims:
        gathered = gathered.index_select(dim, rows.to(tensor.device))
    return gathered


@torch.no_grad()
def _compare(whole: LanguageModel, student: LanguageModel, rows: Tensor) -> tuple[float, float]:
    """The largest difference of their logits for kept ids, and the largest that rounding explains."""
    modes = [(each.model, each.model.training) for each in (whole, student)]
    difference = scale = torch.zeros((), device=whole.device)
    try:
        for slots, mask in _probes(whole.model, student.model.config, len(rows)):
            expected = _logits(whole, rows[slots], mask)[..., rows.to(whole.device)]
            found = _logits(student, slots, mask)
            difference = torch.maximum(difference, torch.where(found == expected, 0.0, (found - expected).abs()).max())
            scale = torch.maximum(scale, expected[expected.isfinite()].abs().max())
    finally:
        for each, training in modes:
            each.train(training)
    return float(difference), float(scale) * max(1e-4, 4 * torch.finfo(whole.model.dtype).eps)


def _logits(model: LanguageModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Logits (B, S, V) in float32 for the model's own rows `ids` (B, S), whatever map it has."""
    inputs: dict[str, Any] = {"use_cache": False} if model.causal else {}
    with torch.random.fork_rng(devices=[]):  # an architecture that hashes draws its hashes
        torch.manual_seed(0)
        mask = None if mask is None else mask.to(model.device)
        logits: Tensor = model.model.eval()(input_ids=ids.to(model.device), attention_mask=mask, **inputs).logits
    return logits.float()


def _probes(model: PreTrainedModel, config: PretrainedConfig, num_kept: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(B, S) slots and their mask: a row up to the last position, special ids among its tokens, and two of which one is padded."""
    generator = torch.Generator().manual_seed(0)
    part: Any = config.get_text_config()
    named = chain.from_iterable(each.to_dict().items() for each in _parts(config))
    special = [value for name, value in named if is_id_setting(name) and isinstance(value, int) and 0 <= value < num_kept]
    positions = getattr(part, "max_position_embeddings", None) or 0
    length = min(positions // 2, 64) if positions > 0 else 64
    if (learned := longest_row(model)) is not None:
        length = min(learned, positions if positions > 0 else learned, _LONGEST_COMPARED)
    slots = torch.cat([torch.tensor(special, dtype=torch.int64), torch.randperm(num_kept, generator=generator)])
    slots = slots.repeat(1 + length // len(slots))[:length]
    yield slots[torch.randperm(length, generator=generator)][None], None
    padded = torch.randint(num_kept, (2, min(8, length)), generator=generator)
    mask = torch.ones_like(padded)
    padded[1, -3:], mask[1, -3:] = getattr(part, "pad_token_id", None) or 0, 0
    yield padded, mask


def _reason(model: PreTrainedModel, slot_of: Tensor, before: VocabMap | None, num_kept: int) -> str:
    """Why the architecture does not go on as before under these slots, and what to do."""
    moved = [row for row in padding_ids(model) if row < len(slot_of) and slot_of[row] != row]
    if not moved:
        return "it computes with the numbers of ids, which pruning changes. Keep its whole vocabulary."
    pins = {row if before is None else int(before.kept_ids[row]): row for row in moved}
    more = "" if max(moved) < num_kept else f", among more than {max(moved)} kept ids"
    return f"it may count from the number of its padding id, {moved[0]}. Let it stay: protect it, and vocab_map.pin({pins}){more}."
