"""The learning rate of a step, as a pure function of the step."""

import math


def resolve_warmup(warmup_steps: int | float, total_steps: int) -> int:
    """Warm-up in steps: a value below 1 is a fraction of `total_steps`, rounded up (as in transformers 5)."""
    if warmup_steps < 0 or (warmup_steps >= 1 and warmup_steps != int(warmup_steps)):
        raise ValueError(f"warmup_steps={warmup_steps} is neither a fraction in [0, 1) of the steps nor a whole number of steps.")
    return math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)


def learning_rate_factor(
    kind: str,
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int | None = None,
    final_ratio: float = 0.0,
) -> float:
    """What to multiply the peak learning rate by for the optimizer step `step`, about to be taken, counted from 0.

    With w = `warmup_steps`, D = `decay_steps` (`total_steps` when None), r = `final_ratio`:

        step <  w:   step / w                     the very first step has rate 0 if w > 0, as in transformers
        step >= w:   r + (1 - r) * shape(t),      t = min(1, (step - w) / max(1, D - w))

        kind                     shape(t)
        "linear"                 1 - t
        "cosine"                 (1 + cos(pi t)) / 2
        "constant_with_warmup"   1
        "constant"               1, and w must be 0

    so "linear" and "cosine" reach r at step D > w and stay there. At r = 0 and D = `total_steps` they are
    transformers' `get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup`. The GLMD authors use "cosine"
    with D = 0.8 `total_steps`, w = 0.05 D, r = 0.05 to pre-train, and "linear" with r = 0.1, w = 0.1 D to fine-tune.
    """
    shapes = {
        "linear": lambda t: 1.0 - t,
        "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
        "constant_with_warmup": lambda t: 1.0,
        "constant": lambda t: 1.0,
    }
    if kind not in shapes:
        raise ValueError(f"lr_scheduler_type={kind!r} is not known; use one of {', '.join(shapes)}.")
    if kind == "constant" and warmup_steps:
        raise ValueError(
            f"lr_scheduler_type='constant' has no warm-up, and warmup_steps is {warmup_steps}: "
            f"use 'constant_with_warmup', or warmup_steps 0."
        )
    if not 0.0 <= final_ratio <= 1.0:
        raise ValueError(f"final_ratio={final_ratio} must be in [0, 1]: the last learning rate over the peak one.")
    if step < warmup_steps:
        return step / warmup_steps
    end = total_steps if decay_steps is None else decay_steps
    progress = min(1.0, (step - warmup_steps) / max(1, end - warmup_steps))
    return final_ratio + (1.0 - final_ratio) * shapes[kind](progress)
