"""A transformers model whose LM head hands its hidden states to a loss, and whose ids may be those of a kept vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops.row_call import LogitTransform
from ..tasks.text import IGNORE_INDEX, shifted
from ..vocab.map import VocabMap
from .behaviour import asked, forward_arguments, is_causal, probe_ids, uncompiled

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")
AtHead = Callable[[Tensor, Tensor, "Tensor | None"], T]


class LossHead(nn.Linear):
    """The model's own output embedding. While `at_head` is set, forward gives it (hidden, weight, bias) and keeps what it returns.

    The loss thus runs inside the head module's forward, after every transform that the model puts before its head, and where FSDP has
    gathered the weight. What the model does after its head then works on a placeholder one column wide.
    """

    at_head: AtHead[Any] | None = None
    result: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> logits (..., V); while `at_head` is set, a placeholder (..., 1)."""
        if self.at_head is None:
            return super().forward(hidden)
        # Not by nn.Module's own __setattr__, which would register a parameter that is handed through.
        object.__setattr__(self, "result", self.at_head(hidden, self.weight, self.bias))
        return hidden[..., :1].detach()


class LanguageModel(nn.Module):
    """An encoder with a masked-LM head or a decoder, called with the teacher's ids whatever vocabulary it keeps.

    With a `vocab_map` the wrapped model has one row per kept id: ids become slots on the way in, generated slots become ids on the way
    out, and logits are over slots. Without one, ids pass unchanged.
    """

    model: Any
    causal: bool
    """Whether no position sees a later one, so that each predicts the next token."""
    id_to_slot: Tensor
    slot_bias: Tensor | None = None
    """(V,) what turns the logits of a student that was trained to answer for all ids into those of its slots, by which it is judged."""

    def __init__(self, model: PreTrainedModel, vocab_map: VocabMap | None = None) -> None:
        """Take `model` as it is, or what `torch.compile` made it of: the loss inside its head changes what would have been compiled.

        Args:
            model: with a plain nn.Linear as its head; PEFT's models too.
            vocab_map: of a model with one row per kept id.

        Raises:
            TypeError: an encoder-decoder, or a head that is no plain nn.Linear or is not called.
            ValueError: logits that are not finite or change after the head in an unknown way, a map of another size, or attention that
                is not what the model's class is for.
        """
        super().__init__()
        model = uncompiled(model)
        if model.config.is_encoder_decoder:
            raise TypeError(f"{type(model).__name__} is an encoder-decoder; give a masked or a causal language model.")
        self.model = model
        self.vocab_map = vocab_map
        self.transform = logit_transform(model.config)
        self._options = {"use_cache": False} if "use_cache" in forward_arguments(model) else {}
        self.head = loss_head(model)
        rows = self.head.out_features
        if vocab_map is not None:
            if rows != vocab_map.num_kept:
                raise ValueError(
                    f"The model has {rows} vocabulary rows and its vocabulary map keeps {vocab_map.num_kept}. Load the map that was "
                    "saved with this model."
                )
            # A buffer, so that it moves with the model; not in the state dict, because the map is saved beside the model with a hash.
            self.register_buffer("id_to_slot", vocab_map.id_to_slot, persistent=False)
        self._check_head()

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.weight.device

    @property
    def vocabulary(self) -> int:
        """Rows of the head: slots with a map, ids without."""
        return self.head.out_features

    @property
    def kept(self) -> slice | Tensor:
        """The teacher's rows behind the rows of this head: the first V, or with a map (V_k,) int64 ids."""
        return slice(self.vocabulary) if self.vocab_map is None else self.vocab_map.kept_ids

    def logit_options(self, role: str) -> dict[str, Any]:
        """What `linear_kl_div` must know of this model's logits, in its `role` of "student" or "teacher"."""
        return {f"{role}_softcap": self.transform.softcap, f"{role}_logit_scale": self.transform.scale}

    def to_slots(self, ids: Tensor, ignore_index: int | None = None) -> Tensor:
        """The model's own row (...) for every id of `ids` (...), int64; entries equal to `ignore_index` stay."""
        if self.vocab_map is None:
            return ids
        if ignore_index is None:
            return self.id_to_slot[ids]
        return torch.where(ids == ignore_index, ids, self.id_to_slot[ids.clamp_min(0)])

    def to_ids(self, slots: Tensor) -> Tensor:
        """The ids (...) behind the model's rows `slots` (...), int64."""
        return slots if self.vocab_map is None else self.vocab_map.kept_ids.to(slots.device)[slots]

    if TYPE_CHECKING:  # nn.Module's own says nothing of what it returns

        @overload
        def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...
        @overload
        def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, at_head: AtHead[T]) -> T: ...
        def __call__(self, *arguments: Any, **named: Any) -> Any: ...

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, at_head: AtHead[Any] | None = None) -> Any:
        """Logits, or what a loss makes of the head and what enters it.

        Args:
            input_ids: (B, S) int64 ids of the teacher.
            attention_mask: (B, S), zero at pads; None: there are none.
            at_head: called with (hidden (B, S, H), weight (V, H), bias (V,) or None) inside the head's own forward.

        Returns:
            Logits (B, S, V) over the model's rows; with `at_head` what that returns.
        """
        self.head.at_head = at_head
        try:
            output = self.model(input_ids=self.to_slots(input_ids), attention_mask=attention_mask, **self._options)
        finally:
            self.head.at_head = None
        if at_head is None:
            return output.logits
        result, self.head.result = self.head.result, None
        return result

    def through_head(self, hidden: Tensor, at_head: AtHead[T]) -> T:
        """What `at_head` makes of (hidden, weight, bias), inside the forward of the head alone; also while the whole model runs.

        Args:
            hidden: (..., H), as it enters the head.
            at_head: as in `forward`.
        """
        before, self.head.at_head = self.head.at_head, at_head
        try:
            self.head(hidden)
        finally:
            self.head.at_head = before
        result: T
        result, self.head.result = self.head.result, None
        return result

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """`transformers` generation with the teacher's ids in and out.

        Args:
            input_ids: (B, S) int64.
            options: of transformers' `generate`.

        Returns:
            (B, S + new) int64.
        """
        return self.to_ids(self.model.generate(input_ids=self.to_slots(input_ids), **options))

    def check_own_loss(self, *, any_alignment: bool = False) -> None:
        """Refuse (ValueError) to train a model whose own loss is not the mean cross-entropy of its labels, which is all that we make.

        It may have a router's term, or smooth its labels. A model whose forward takes no labels has no loss of its own.

        Args:
            any_alignment: a decoder's own loss may leave its labels unshifted, because ours come as what each position predicts.
        """
        model, found = self.model, ""
        if "labels" in forward_arguments(model):
            ids = probe_ids(model.config, self.vocabulary, self.device)
            labels = ids.flip(1)
            with asked(model):
                logits = model(input_ids=ids, **self._options).logits.float().flatten(0, 1)
                theirs = model(input_ids=ids, labels=labels, **self._options).loss
            alignments = [shifted(labels) if self.causal else labels]
            if any_alignment:
                alignments.append(labels)
            ours = [functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX) for targets in alignments]
            if theirs is not None:
                # Nearly all models make it of float32 logits, whatever they are themselves.
                tolerance = 1e-2 if theirs.dtype in (torch.float16, torch.bfloat16) else 1e-5
                if not any(torch.allclose(own, theirs.to(own), rtol=tolerance, atol=0.0) for own in ours):
                    found = f" ({float(theirs):.6g}, which is {float(ours[0]):.6g})"
        if found or getattr(model.config.get_text_config(), "output_router_logits", False):
            raise ValueError(
                f"{type(model).__name__} computes another loss than the mean cross-entropy of its labels{found}: it may add a "
                "router's, or weigh, smooth or not shift its labels. Switch that off in its config (the router's is "
                "output_router_logits), or train it with its own loss."
            )

    def _check_head(self) -> None:
        """The logits we would compute are the logits the model computes: an unknown operation after the head is refused here."""
        ids = probe_ids(self.model.config, self.vocabulary, self.device)
        with asked(self.model):
            expected = self.model(input_ids=ids, **self._options).logits.float()
            self.head.at_head = lambda hidden, weight, bias: functional.linear(hidden, weight, bias).float()
            try:
                self.model(input_ids=ids, **self._options)
                made = self.head.result
            finally:
                self.head.at_head = self.head.result = None
        name = f"{type(self.model).__name__} {self.model.config.name_or_path}".rstrip()
        if expected.shape != (*ids.shape, self.vocabulary):
            raise ValueError(
                f"{name} gives logits of shape {tuple(expected.shape)} for ids of shape {tuple(ids.shape)} and a head of "
                f"{self.vocabulary} rows; give a model with one row of logits a token, without learned prompts."
            )
        if not expected.isfinite().all():
            raise ValueError(
                f"The logits of {name} are not finite: weights hold NaN or infinity, or overflow {self.head.weight.dtype}. Load "
                "weights that are whole, in float32 or bfloat16."
            )
        if made is None:
            raise TypeError(
                f"{type(self.model).__name__} computes its logits without calling its output embedding, which is where the loss runs; "
                "give a model that calls it, as nearly all masked and causal language models do."
            )
        ours = self.transform.apply(made)
        if not torch.allclose(ours, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())):
            raise ValueError(
                f"{type(self.model).__name__} changes its logits after the head in a way that fastkd does not know (largest difference "
                f"{float((ours - expected).abs().max()):.3g}). Known are final_logit_softcapping, logit_scale, logits_scaling and "
                "lm_head_multiplier in the model's config."
            )
        self.causal = is_causal(self.model, expected)


def head_rows(teacher: LanguageModel, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight (n, H) and bias (n,) of these rows of the teacher's head, gathered once.

    Args:
        teacher: a language model.
        rows: the first n, as a slice, or (n,) int64 ids.

    Raises:
        ValueError: the head has fewer rows than n, or the teacher's own vocabulary map drops some of the ids.
    """
    weight, bias = teacher.head.weight, teacher.head.bias
    count = rows.stop if isinstance(rows, slice) else len(rows)
    if (own := teacher.vocab_map) is not None:
        ids = torch.arange(own.vocab_size)[:count] if isinstance(rows, slice) else rows.cpu()
        if len(ids) < count or not own.is_kept.cpu()[ids].all():
            raise ValueError(
                f"The teacher keeps {own.num_kept} of {own.vocab_size} ids, and the student compares others too, of which it says "
                "nothing. Let the student keep ids of the teacher's alone, or take a teacher with the whole vocabulary."
            )
        rows = own.id_to_slot.cpu()[ids]
    elif len(weight) < count:
        raise ValueError(f"The teacher has {len(weight)} vocabulary rows, the student {count}; give the student a map.")
    index: Any = rows.to(weight.device) if isinstance(rows, Tensor) else rows
    return weight[index], None if bias is None else bias[index]


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the model does after its head, by the names that transformers' configurations use for it."""
    config = config.get_text_config()
    scale = 1.0
    for name, divides in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
        factor = getattr(config, name, None)
        if factor is not None:
            scale = scale / factor if divides else scale * factor
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def loss_head(model: PreTrainedModel) -> LossHead:
    """The model's output embedding as one that hands over what enters it; TypeError if it is no plain nn.Linear."""
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        return head
    if type(head) is not nn.Linear:
        raise TypeError(
            f"{type(model).__name__} has a {type(head).__name__} as its output embedding, and fastkd needs a plain nn.Linear. Load it "
            "as a masked or causal language model, unquantised and without adapters on the head."
        )
    # The class changes, the module stays: its name, its (tied) parameters and its hooks are untouched.
    head.__class__ = LossHead
    assert isinstance(head, LossHead)
    return head
