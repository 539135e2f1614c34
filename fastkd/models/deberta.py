"""What DeBERTa's attention makes of pads, which depends on the version of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def zero_context_at_pads(*models: nn.Module) -> Iterator[None]:
    """Give pads an attention context of zero in the DeBERTa layers of `models` that run inside the with-block.

    So it is in transformers 4.28, on which TED is published: a query row without a key has no attention weights. transformers 5 gives
    such a row the mean of all values. Token rows are the same in both. Other architectures stay as they are, and so does every model
    after the block.
    """
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention as FirstAttention
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    with ExitStack() as hooks:
        for module in (module for model in models for module in model.modules()):
            if isinstance(module, FirstAttention | DisentangledSelfAttention):
                hooks.enter_context(module.register_forward_hook(_zero_without_keys))
        yield


def _zero_without_keys(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(B, S, H) context -> zero where the mask (B, 1, S, S) leaves a query row no key."""
    context, *others = output
    has_key = inputs[1].bool().any(-1).squeeze(1)
    return context.masked_fill(~has_key[..., None], 0.0), *others
