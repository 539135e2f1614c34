"""The fused loss in place of the one that a transformers language model computes from its labels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Set
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.nn import functional

from ..models.behaviour import base_model, uncompiled
from ..models.language_model import LanguageModel, loss_head
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.row_call import LogitTransform
from ..tasks.text import IGNORE_INDEX, shifted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound="PreTrainedModel")
_LOSS_KEYWORDS = inspect.signature(functional.cross_entropy).parameters.keys() - {"ignore_index"}
"""They change a cross-entropy, and transformers' own losses leave them out without a word."""


def patch_head(model: M) -> M:
    """Let `model` compute its loss without its logits when it is called with labels in training mode; `unpatch_head` undoes it.

    loss = sum over labelled positions of -log softmax(z)[label] / num_items_in_batch, by default over the number of such positions. A
    causal model's labels are shifted as transformers does, unless they come as `shift_labels`; labels equal to `ignore_index` (-100)
    do not count. `output.logits` is None then; in evaluation mode, and without labels, the logits are there. num_items_in_batch and
    ignore_index count also where the model itself leaves them out, as BERT and others do, whose means are then added up by Trainer's
    gradient accumulation. Called with another keyword of a cross-entropy, such as label_smoothing, a patched model raises ValueError.

    The model is changed in place and returned. It keeps the name of its class, its parameters, its hooks and all else that it does.
    Copies of it, also pickled ones, are patched too; what `save_pretrained` writes is the plain model.

    Raises:
        TypeError: No masked or causal language model of transformers, one inside of a compiled or PEFT model, or a head that is no
            plain nn.Linear.
        ValueError: The model changes its logits after the head in an unknown way, or its own loss is another one.
    """
    if _unpatched(model) is not None:
        return model
    if not hasattr(uncompiled(model), "config"):
        raise TypeError(f"patch_head was given a {type(model).__name__}; give a masked or causal language model of transformers.")
    if uncompiled(model) is not model or base_model(model) is not model:
        raise TypeError(f"The model is wrapped in a {type(model).__name__}; patch the model inside, and wrap it then.")
    language_model = LanguageModel(model)
    language_model.check_own_loss()
    own: Any = type(model)
    model.__class__ = _with_fused_loss(own, language_model.causal, language_model.transform)
    return model


def unpatch_head(model: M) -> M:
    """Let `model` compute its own loss again. Its head stays a `LossHead`, which is an nn.Linear in all that it does."""
    own = _unpatched(model)
    if own is not None:
        model.__class__ = own
    return model


def _unpatched(model: PreTrainedModel) -> Any:
    """The class that a patched model had before; None for others."""
    return getattr(type(model), "unpatched_class", None)


@functools.cache  # copies are of one class
def _with_fused_loss(own: type, causal: bool, transform: LogitTransform) -> type:
    """A class like `own` but for what its forward does with labels."""
    forward: Any = own.forward  # type: ignore[attr-defined]
    signature = inspect.signature(forward)
    names = list(signature.parameters)[1:]

    def with_fused_loss(self: Any, *positional: Any, **named: Any) -> Any:
        inputs = {**dict(zip(names, positional, strict=False)), **named}
        labels, targets, count, as_dict = (
            inputs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch", "return_dict")
        )
        if labels is None and targets is None:
            return forward(self, *positional, **named)
        ignore_index = inputs.pop("ignore_index", IGNORE_INDEX)
        _refuse_loss_keywords(self, inputs.keys() - set(names))
        if targets is None:
            targets = shifted(labels, ignore_index) if causal else labels
        if count is not None:  # a step may be without labels; its sums are zero, whatever they are divided by
            count = count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
        head = loss_head(self)  # another one after resize_token_embeddings

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_cross_entropy(
                hidden,
                weight,
                targets.to(hidden.device),
                bias=bias,
                ignore_index=ignore_index,
                softcap=transform.softcap,
                logit_scale=transform.scale,
                denominator=count,
            )

        head.at_head = at_head if self.training else None
        try:
            output = forward(self, return_dict=True, **inputs)
        finally:
            head.at_head = None
        if self.training:
            loss, head.result, logits = head.result, None, None
        else:
            loss, logits = _loss_of_logits(output.logits, targets, ignore_index, count), output.logits
        output = type(output)(**{**output, "loss": loss, "logits": logits})
        return output.to_tuple() if as_dict is False or (as_dict is None and not self.config.return_dict) else output

    # Trainer and others read from it what the model can be given. No __wrapped__: what accelerate unwraps must end here.
    with_fused_loss.__signature__ = signature  # type: ignore[attr-defined]
    same = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    changed = {
        "forward": with_fused_loss,
        "accepts_loss_kwargs": True,
        "unpatched_class": own,
        # By its name pickle would find the model's own class.
        "__reduce__": lambda self: (_new_patched, (own, causal, transform), self.__getstate__()),
    }
    return type(own.__name__, (own,), {**same, **changed})


def _new_patched(own: type, causal: bool, transform: LogitTransform) -> Any:
    """A patched model that is still without its state."""
    patched: Any = _with_fused_loss(own, causal, transform)
    return patched.__new__(patched)


def _refuse_loss_keywords(model: Any, others: Set[str]) -> None:
    """Refuse what the loss alone could mean of the keywords that the model's forward does not name."""
    if others and (found := sorted(others & (_LOSS_KEYWORDS | inspect.signature(model.loss_function).parameters.keys()))):
        raise ValueError(
            f"{type(model).__name__} was called with {', '.join(found)}, and its patched loss is the mean cross-entropy of its labels, "
            "which takes num_items_in_batch and ignore_index; leave the others out, or `unpatch_head` the model and compute that loss "
            "of its logits."
        )


def _loss_of_logits(logits: Tensor, targets: Tensor, ignore_index: int, count: float | Tensor | None) -> Tensor:
    """The same value where the logits are wanted anyway."""
    targets = targets.to(logits.device)
    total = functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return total / ((targets != ignore_index).sum().clamp_min(1) if count is None else count)
