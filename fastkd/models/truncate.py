"""A student made of some of a model's layers."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from .capture import transformer_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def parse_layers(setting: str | Sequence[int], model: "PreTrainedModel") -> tuple[int, ...]:
    """The model's layers, counted from 1, that the configuration's `student_layers` names: "first:6" is 1 to 6, "every:2" is 2, 4,
    6, ... as in TED's map, and a list is of their numbers.

    Raises:
        TypeError: a model whose layers are not known here.
        ValueError: another form, a layer that the model does not have, no layer at all, or layers that do not go up.
    """
    num_layers = len(transformer_layers(model))
    if isinstance(setting, str):
        kind, _, number = setting.partition(":")
        if kind not in ("first", "every") or not number.isdecimal() or not 1 <= int(number) <= num_layers:
            raise ValueError(
                f'student_layers={setting!r}: use "first:N" or "every:N" with N from 1 to {num_layers} (the model\'s layers), or a '
                "list."
            )
        return tuple(range(1, int(number) + 1) if kind == "first" else range(int(number), num_layers + 1, int(number)))
    layers = tuple(setting)
    if not layers:
        raise ValueError(f"student_layers is empty: name at least one of the layers 1 to {num_layers}.")
    if outside := [layer for layer in layers if layer not in range(1, num_layers + 1)]:
        raise ValueError(f"student_layers={outside}: the model has layers 1 to {num_layers}.")
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise ValueError(f"student_layers={list(layers)}: write each layer once, in ascending order.")
    return layers


def keep_layers(model: Model, layers: str | Sequence[int]) -> Model:
    """A copy of `model` with only the given layers (see `parse_layers`) and all its other weights; no tensor is shared with `model`.

    Its config says how many layers and of which types, so `from_pretrained` gives the same model back. DeBERTa-v2's convolution follows
    the first layer that is kept.

    Raises:
        TypeError, ValueError: see `parse_layers`; or a choice that the model's config cannot express.
    """
    old, kept = transformer_layers(model), parse_layers(layers, model)
    if model.config.model_type == "modernbert" and kept[0] != 1:
        raise ValueError(
            f"student_layers={list(kept)}: the first layer of a ModernBERT has no norm before its attention, and only layer 1 is "
            "without one. Keep layer 1."
        )
    if getattr(model.config.get_text_config(), "scale_attn_by_inverse_layer_idx", False) and kept != tuple(range(1, len(kept) + 1)):
        raise ValueError(
            f"student_layers={list(kept)}: this GPT-2 divides attention scores by the layer's number "
            f'(scale_attn_by_inverse_layer_idx), which moving a layer would change. Use "first:{len(kept)}".'
        )
    # The memo makes deepcopy put a placeholder where a dropped layer was, so that layer is never copied.
    student = copy.deepcopy(model, {id(layer): nn.Identity() for number, layer in enumerate(old, 1) if number not in kept})
    new: Any = transformer_layers(student)
    for number in range(len(old), 0, -1):
        if number not in kept:
            del new[number - 1]
    for index, layer in enumerate(new):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # its place in a cache of keys and values
    config = student.config.get_text_config()
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[number - 1] for number in kept]
    return student
