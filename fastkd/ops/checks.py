"""Checks of the losses' arguments, before any work. Errors say what was given and what would do.

Shapes, dtypes and devices are checked where the public function runs, which `torch.compile` traces; values (`check_..._values`) inside
the operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from .divergence import Divergence
    from .options import LossOptions

# What a stored distribution's mass may be above one: 16-bit logarithms that were cast to float32 are off by so much.
_MASS_ROUNDING = 0.01
TAILS = ("bucket", "renormalize", "zero")
"""What stands for the tokens that a top-k teacher does not list; `topk_kl_div` has the formulas."""
SUPPORTS = ("full", "listed")
"""Where the student's softmax is taken beside a renormalised list: over its vocabulary, or over the list."""
_INFINITE_WHERE_P_IS_ZERO = ("reverse_kl", "mixed")
SMALLEST_TEMPERATURE = 1e-6
LARGEST_TEMPERATURE = 32.0
"""Up to here every backend's float32 holds the KL divergence of models whose logits are some nats apart to 1e-4 of its value."""


def leading_shape(name: str, tensor: Tensor, *, may_be_empty: bool = False) -> torch.Size:
    """Check that `tensor` is a plain floating tensor of at least two dims, the last not empty; return all of its dims but the last."""
    check_plain(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs at least one leading dim: (..., features).")
    if not may_be_empty and tensor.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, nothing in its last dim; it needs at least one feature (or logit).")
    return tensor.shape[:-1]


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuse (TypeError) a tensor of no floating dtype, and what `check_tensor` does."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; give a floating tensor.")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse (TypeError) what is no tensor, or a DTensor, and (NotImplementedError) forward-mode AD and torch.func transforms.

    The operators have no forward-mode derivative, and torch would take theirs for zero.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor.")
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        raise TypeError(
            f"{name} is a DTensor. Call the loss inside the head module's own forward, where FSDP has gathered the weight into a "
            "plain tensor, or pass tensor.full_tensor() with grad_placements=[Partial()]."
        )
    # Of torch.func's transforms a compiler can trace but whether there is one.
    if torch.compiler.is_compiling():
        is_transformed = torch._C._functorch.maybe_current_level() is not None
    else:
        is_transformed = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if is_transformed or forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(
            f"{name} is inside a transform that fastkd's losses do not support: forward-mode AD (torch.func.jvp, "
            "torch.autograd.forward_ad), torch.func.grad or torch.vmap. Take reverse mode (loss.backward(), torch.autograd.grad), or "
            "the plain function of the same name in fastkd.reference."
        )


def check_teacher(name: str, tensor: Tensor | None) -> None:
    """A teacher is a constant; one that asks for a gradient it would never get is a mistake to be told of."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, and no gradient ever flows to the teacher. Run the teacher under torch.no_grad() with "
            f"requires_grad_(False) on its parameters, or pass {name}.detach()."
        )


def check_token_tensors(
    leading: torch.Size, device: torch.device, options: LossOptions, mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check mask and labels against the leading dims; return them flat."""
    for name, tensor in (("mask", mask), ("labels", labels)):
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.shape != leading:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must match the leading dims {tuple(leading)}.")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and the student is on {device}; move it there.")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask has dtype {mask.dtype}; give torch.bool (of an attention mask: mask.bool()), or float weights >= 0.")
    if options.grad_filter is not None and device.type != "cpu":
        raise ValueError(f"grad_filter={options.grad_filter} works on the CPU alone, and the tensors are on {device}; leave it out.")
    if labels is None:
        if options.label_weight > 0:
            raise ValueError(f"label_weight={options.label_weight} needs labels=; pass them or leave label_weight at 0.")
    elif labels.dtype != torch.int64:
        raise TypeError(
            f"labels has dtype {labels.dtype}; give torch.int64 ids, by labels.long() (ignore_index={options.ignore_index} for none)."
        )
    elif options.label_weight == 0 and not options.statistics:
        raise ValueError("labels is given with label_weight=0, so that it would not be read; pass label_weight=1.0, or leave it out.")
    return None if mask is None else mask.detach().reshape(-1), None if labels is None else labels.reshape(-1)


def check_denominators(
    denominator: float | Tensor | None, label_denominator: float | Tensor | None, reduction: str, device: torch.device
) -> Tensor | None:
    """Check both; return the first alone as a 0-dim tensor on `device`, or with the second (2,), zero for one that is not given."""
    first = check_denominator(denominator, reduction, device)
    second = check_denominator(label_denominator, reduction, device, "label_denominator")
    if second is None:
        return first
    return torch.stack([torch.zeros_like(second) if first is None else first, second])


def check_denominator(
    denominator: float | Tensor | None, reduction: str, device: torch.device, name: str = "denominator"
) -> Tensor | None:
    """Check it; return it as a 0-dim tensor on `device`, made there without a copy from the host."""
    if denominator is None:
        return None
    if reduction != "mean":
        raise ValueError(f"{name} replaces the mean's denominator, but reduction={reduction!r}; use reduction='mean'.")
    if isinstance(denominator, Tensor):
        check_tensor(name, denominator)
        if denominator.dim() != 0 or denominator.dtype == torch.bool or denominator.is_complex():
            given = f"shape {tuple(denominator.shape)} and dtype {denominator.dtype}"
            raise ValueError(f"{name} has {given}; give a number, or one in a 0-dim tensor.")
        if not torch.compiler.is_compiling():
            _check_denominator_value(name, denominator)
        return denominator.detach().to(device, torch.float64)
    check_number(name, denominator)
    return torch.full((), float(denominator), dtype=torch.float64, device=device)


def _check_denominator_value(name: str, denominator: Tensor) -> None:
    if denominator.device.type == "cpu":
        check_number(name, float(denominator))


def check_vocab_index(vocab_index: Tensor | None, student_vocabulary: int, teacher_vocabulary: int, device: torch.device) -> None:
    """The teacher row behind every student row; without it the same ids are meant, and a longer teacher is sliced."""
    if vocab_index is None:
        if teacher_vocabulary < student_vocabulary:
            raise ValueError(
                f"The student has {student_vocabulary} vocabulary rows and the teacher only {teacher_vocabulary}: student ids "
                "without a teacher row have no target. Pass vocab_index (the teacher row of every student row) or slice the student."
            )
        return
    _check_rows("vocab_index", vocab_index, student_vocabulary, "one teacher row for every student row", device)


def _check_rows(name: str, rows: Tensor, count: int, meaning: str, device: torch.device) -> None:
    """Check that `rows` is int64 of shape (count,) on `device`."""
    check_tensor(name, rows)
    if rows.dtype != torch.int64 or rows.shape != (count,):
        given = f"dtype {rows.dtype} and shape {tuple(rows.shape)}"
        raise ValueError(f"{name} has {given}; give torch.int64 of shape ({count},), {meaning}.")
    if rows.device != device:
        raise ValueError(f"{name} is on {rows.device} and the student is on {device}; move it there.")


def check_teacher_mass(
    teacher_mass: str,
    vocab_index: Tensor | None,
    vocab_slots: Tensor | None,
    student_vocabulary: int,
    teacher_vocabulary: int,
    device: torch.device,
    *,
    has_head: bool,
) -> None:
    """Check what relates the vocabularies: `check_vocab_index`, or with teacher_mass="slots" the slot of every row of the teacher.

    has_head: whether the teacher's logits are made here, of all rows that it has.
    """
    if teacher_mass != "slots":
        if vocab_slots is not None:
            raise ValueError(
                f"vocab_slots was given with teacher_mass={teacher_mass!r}, and only 'slots' reads it; pass that, or leave it out."
            )
        check_vocab_index(vocab_index, student_vocabulary, teacher_vocabulary, device)
        if teacher_mass == "full" and not has_head and vocab_index is None and teacher_vocabulary == student_vocabulary:
            raise ValueError(
                f"teacher_mass='full' needs the logits of the tokens that were dropped, and the teacher's have {teacher_vocabulary} "
                "columns as the student's: give them over its whole vocabulary, with vocab_index, or the teacher's head."
            )
        return
    if vocab_slots is None or vocab_index is not None:
        raise ValueError(
            "teacher_mass='slots' needs vocab_slots, the student's row of every row of the teacher (of a fastkd.VocabMap: id_to_slot), "
            "and no vocab_index."
        )
    _check_rows("vocab_slots", vocab_slots, teacher_vocabulary, "the student's row of every row of the teacher, or -1", device)


def check_token_values(
    options: LossOptions, vocabulary: int, mask: Tensor | None, labels: Tensor | None, denominator: Tensor | None = None
) -> None:
    """What only the numbers tell. On the CPU alone, here and below: a GPU's would make the host wait for them."""
    if denominator is not None:
        for name, value in zip(("denominator", "label_denominator"), denominator.view(-1), strict=False):
            if denominator.dim() == 0 or name == "label_denominator":
                _check_denominator_value(name, value)
    if mask is not None and not mask.is_cuda and mask.is_floating_point() and not bool(((mask >= 0) & mask.isfinite()).all()):
        raise ValueError("mask holds negative or non-finite weights; float token weights must be finite and >= 0.")
    if labels is not None and not labels.is_cuda:
        outside = ((labels != options.ignore_index) & ((labels < 0) | (labels >= vocabulary))).nonzero()
        if outside.numel():
            row = int(outside[0, 0])
            raise ValueError(
                f"labels holds {int(labels[row])} at row {row}, outside the vocabulary of {vocabulary}. Map the labels to the "
                f"student's ids, or mark rows without one by ignore_index={options.ignore_index}."
            )


def check_token_weight(token_weight: object, reduction: str) -> None:
    """Refuse what is no function, and a reduction under which it would have no place."""
    if token_weight is None:
        return
    if not callable(token_weight):
        raise TypeError(
            f"token_weight is {type(token_weight).__name__}; give a function of (losses, statistics). Weights that are known before "
            "the losses are a float mask."
        )
    if reduction == "none":
        raise ValueError("token_weight goes with reduction='mean' or 'sum'; with 'none' multiply the losses yourself.")


def check_function_weights(weights: object, losses: Tensor) -> None:
    """Refuse what a `token_weight` has returned unless it is like `losses` (C,)."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"token_weight returned {type(weights).__name__}; it must return a tensor of shape {tuple(losses.shape)}.")
    if weights.shape != losses.shape or weights.device != losses.device or not weights.is_floating_point():
        raise ValueError(
            f"token_weight returned {weights.dtype} of shape {tuple(weights.shape)} on {weights.device}; it must return floats of "
            f"shape {tuple(losses.shape)}, one for each token that it was shown, on {losses.device}."
        )
    if not weights.is_cuda and not bool(weights.isfinite().all()):
        raise ValueError("token_weight returned weights that are not finite; limit them, for example by torch.clamp.")


def check_index_values(vocab_index: Tensor | None, teacher_vocabulary: int) -> None:
    """Refuse (ValueError) a `vocab_index` (V_s,) with ids outside of the teacher's rows, or with one of them twice."""
    if vocab_index is not None and not vocab_index.is_cuda and vocab_index.numel():
        outside = ((vocab_index < 0) | (vocab_index >= teacher_vocabulary)).nonzero()
        if outside.numel():
            place = int(outside[0, 0])
            raise ValueError(
                f"vocab_index names row {int(vocab_index[place])} at place {place}, outside the teacher's {teacher_vocabulary} rows; "
                f"give ids in [0, {teacher_vocabulary})."
            )
        uses = torch.bincount(vocab_index, minlength=teacher_vocabulary)
        if int(uses.max()) > 1:
            row = int(uses.argmax())
            raise ValueError(
                f"vocab_index names teacher row {row} {int(uses[row])} times; the teacher's softmax would count its probability as "
                "often. Give every student row a teacher row of its own."
            )


def check_slot_values(vocab_slots: Tensor, vocabulary: int) -> None:
    """Refuse (ValueError) `vocab_slots` (V_t,) outside of [-1, vocabulary), or that leave a row of the student without a token."""
    if vocab_slots.is_cuda:
        return
    outside = ((vocab_slots < -1) | (vocab_slots >= vocabulary)).nonzero()
    if outside.numel():
        place = int(outside[0, 0])
        raise ValueError(
            f"vocab_slots holds {int(vocab_slots[place])} at place {place}, outside the student's {vocabulary} rows; give rows in "
            f"[0, {vocabulary}), or -1 for a token that has none."
        )
    empty = (torch.bincount(vocab_slots + 1, minlength=vocabulary + 1)[1:] == 0).nonzero()
    if empty.numel():
        raise ValueError(f"vocab_slots gives no token to row {int(empty[0, 0])} of the student, so that it has no target; give it one.")


def check_topk_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse (ValueError) `ids` (N, K) outside of [-1, vocabulary), or a token that a row lists twice."""
    if ids.is_cuda or not ids.numel():
        return
    outside = ((ids < -1) | (ids >= vocabulary)).nonzero()
    if outside.numel():
        row, entry = outside[0].tolist()
        raise ValueError(
            f"topk_ids holds {int(ids[row, entry])} at row {row}, outside the student's {vocabulary} rows; give ids in "
            f"[0, {vocabulary}), or -1 for no entry."
        )
    ordered = ids.sort(dim=-1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1).nonzero()
    if twice.numel():
        raise ValueError(f"topk_ids lists a token twice at row {int(twice[0, 0])}; its probability would be counted twice.")


def check_topk_masses(ids: Tensor, log_probabilities: Tensor, log_tail: Tensor | None = None) -> None:
    """Refuse (ValueError) logarithms above zero and rows of more mass than one, by more than rounding.

    ids, log_probabilities: (N, K); those of id -1 are ignored. log_tail: (N,). NaN passes, and shows in the loss. A logarithm's
    rounding in its dtype is taken off before the sum, which may be above one by `_MASS_ROUNDING`.
    """
    if ids.is_cuda or not ids.numel():
        return
    parts = [("topk_logprobs", log_probabilities.masked_fill(ids < 0, -math.inf))]
    if log_tail is not None:
        parts.append(("tail_logprob", log_tail[:, None]))
    mass = torch.zeros(len(ids), dtype=torch.float64)
    for name, logs in parts:
        above = (logs > _MASS_ROUNDING).nonzero()
        if above.numel():
            row, entry = above[0].tolist()
            raise ValueError(f"{name} holds {float(logs[row, entry])} at row {row}; give logarithms of probabilities, <= 0.")
        mass += (logs.double() * (1 + torch.finfo(logs.dtype).eps)).exp().sum(-1)
    heavy = (mass > 1 + _MASS_ROUNDING).nonzero()
    if heavy.numel():
        row = int(heavy[0, 0])
        names = " and ".join(name for name, _ in parts)
        raise ValueError(
            f"{names} hold probabilities that sum to {float(mass[row]):.6g} at row {row}; a distribution has 1. Give the "
            "teacher's log_softmax of all its logits, and for the tail the mass of the others alone."
        )


def check_temperature(temperature: float) -> None:
    """Refuse (ValueError) what is no number in [SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE]."""
    check_number("temperature", temperature)
    if not SMALLEST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature!r} must be from {SMALLEST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g}: beyond, float32 does not "
            "hold T^2 times the divergence. The limit for large T is half the mean squared distance of the centred logits."
        )


def check_transform(prefix: str, logit_scale: float, softcap: float | None) -> None:
    """Check what a model does to its logits; `prefix` begins the arguments' names."""
    check_number(f"{prefix}logit_scale", logit_scale, may_be_negative=True)
    if softcap is not None:
        check_number(f"{prefix}softcap", softcap)


def check_number(name: str, value: Any, *, may_be_zero: bool = False, may_be_negative: bool = False) -> None:
    """Refuse (ValueError) what is no finite number > 0; or >= 0; or, with `may_be_negative`, other than 0."""
    if not isinstance(value, bool) and isinstance(value, Real):
        size: Any = abs(value) if may_be_negative else value
        if 0 < size < math.inf or (may_be_zero and size == 0):
            return
    wanted = "other than 0" if may_be_negative else ">= 0" if may_be_zero else "> 0"
    raise ValueError(f"{name}={value!r} must be a finite number {wanted}.")


def check_whole(name: str, value: Any, *, least: int | None = None, unit: str = "") -> None:
    """Refuse (ValueError) what is no int, or one below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        raise ValueError(f"{name}={value!r} must be a whole number" + ("." if least is None else f" >= {least} ({unit})."))


def check_flag(name: str, value: Any) -> None:
    """Refuse (ValueError) what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse (ValueError) what is none of the `known` names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, known))}.")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: logits are never rounded to 16 bits."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_tail(
    tail: str, has_log_tail: bool, divergence: Divergence, student_support: str, temperature: float, topk_temperature: float | None
) -> None:
    """Refuse (ValueError) an unknown `tail`, "bucket" without the log of the tail's mass, and what a tail has no loss for."""
    check_choice("tail", tail, TAILS)
    check_choice("student_support", student_support, SUPPORTS)
    if student_support == "listed" and tail != "renormalize":
        raise ValueError(
            f"student_support='listed' compares two distributions over the list, and tail={tail!r} does not renormalize the teacher's; "
            "pass tail='renormalize'."
        )
    if topk_temperature is not None:
        check_number("topk_temperature", topk_temperature)
        if topk_temperature != temperature and tail != "renormalize":
            raise ValueError(
                f"topk_temperature={topk_temperature!r} is not temperature={temperature!r}, and the mass of a list at one temperature "
                f"does not follow from that at another, which tail={tail!r} needs; use tail='renormalize', or make the lists anew."
            )
    if tail == "zero" and divergence.kind != "forward_kl":
        raise ValueError(
            f"divergence={str(divergence)!r} needs all of the teacher's mass, and tail='zero' leaves some out; use tail='bucket'."
        )
    if tail == "renormalize" and student_support == "full" and divergence.kind in _INFINITE_WHERE_P_IS_ZERO:
        raise ValueError(
            f"divergence={str(divergence)!r} is infinite where tail='renormalize' gives the ids that are not listed no mass; use "
            "tail='bucket', or student_support='listed'."
        )
    if tail == "bucket" and not has_log_tail:
        raise ValueError(
            "tail='bucket' needs tail_logprob, the log of the mass that the teacher does not list; or use tail='renormalize'."
        )
