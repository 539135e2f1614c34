"""What a transformers language model does, found by asking it: its class's name is anybody's choice."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HALF = 4
"""Tokens of either half of a probe's rows: the shortest rows serve every architecture."""
_CANDIDATES = 64
# Later tokens move earlier logits 0.6 to 2.4 times as far as the other way round in 27 bidirectional architectures; in causal ones by
# rounding at most, where a router's choices change the shapes of matrix products.
_LEAST_INFLUENCE = 0.1


def uncompiled(model: Any) -> Any:
    """The module inside of what `torch.compile` returns; any other model as it is."""
    return getattr(model, "_orig_mod", model)


def base_model(model: Any) -> Any:
    """The transformers model inside of a PEFT model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def forward_arguments(model: Any) -> set[str]:
    """The names that the model's forward takes, also by the keywords that a subclass or PEFT passes on."""
    names: set[str] = set()
    for kind in (type(model), *type(base_model(model)).__mro__):
        if "forward" in vars(kind):
            parameters = inspect.signature(vars(kind)["forward"]).parameters
            names |= parameters.keys()
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names


@contextmanager
def asked(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients, as the block needs it; the model's mode is then what it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def probe_ids(config: PretrainedConfig, vocabulary: int, device: torch.device) -> Tensor:
    """(3, S) int64 ids: rows of two halves, where the second row has another second half, and the third another first one.

    Ids to which the configuration gives a meaning are left out: a pad's embedding may be zero and its position masked.
    """
    named = {**config.to_dict(), **config.get_text_config().to_dict()}
    special = {x for name, value in named.items() if "_token_i" in name for x in (value if isinstance(value, list) else [value])}
    spread = torch.linspace(0, vocabulary - 1, min(_CANDIDATES, vocabulary)).long().tolist()
    ordinary = [index for index in spread if index not in special] or spread
    stride = max(1, len(ordinary) // (4 * _HALF))
    ids = torch.tensor([ordinary[i * stride % len(ordinary)] for i in range(4 * _HALF)], device=device)
    first, other_first, second, other_second = ids.view(_HALF, 4).T
    return torch.stack([torch.cat(halves) for halves in ((first, second), (first, other_second), (other_first, second))])


def is_causal(model: Any, logits: Tensor) -> bool:
    """Whether no position sees a later one, by what the other halves of `probe_ids` change.

    Args:
        model: whose logits they are.
        logits: (3, S, V) of `probe_ids`.

    Raises:
        ValueError: no position sees another one, or the model is not what its class is for.
    """
    row, other_second, other_first = logits.float()
    earlier, later = (row - other_second)[:_HALF].norm(), (row - other_first)[_HALF:].norm()
    name = type(model).__name__
    if not earlier and not later:
        raise ValueError(
            f"No position of {name} has an influence on the logits of another one, so it cannot be told whether it is a decoder. Give "
            "weights that are trained or drawn at random, without layers that are zero."
        )
    causal = bool(earlier < _LEAST_INFLUENCE * later)
    kinds = _kinds(base_model(model))
    if kinds and causal not in kinds:
        is_for, sees = ("masked tokens", "no later tokens") if causal else ("next tokens", "later tokens too")
        raise ValueError(
            f"{name} is for predicting {is_for}, and its attention sees {sees}. Set is_decoder={not causal} in its config, or load it "
            f"by AutoModelFor{'CausalLM' if causal else 'MaskedLM'}."
        )
    return causal


def _kinds(model: Any) -> set[bool]:
    """Whether transformers lists the model's class, or the first of its bases that it knows, as causal (True), masked (False), both."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    lists = ((True, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), (False, MODEL_FOR_MASKED_LM_MAPPING_NAMES))
    found = ({causal for causal, names in lists if kind.__name__ in names.values()} for kind in type(model).__mro__)
    return next(filter(None, found), set())
