"""What the compiled backends share: where their libraries lie, and how a call's options travel to them."""

from __future__ import annotations

import os
from pathlib import Path

from .divergence import Divergence
from .rows import LogitTransform

_KINDS = {"forward_kl": 1, "reverse_kl": 2, "tvd": 3, "jsd": 4, "skew_kl": 5, "skew_rkl": 6}


def cache_folder() -> Path:
    """Where compiled libraries are kept between processes; their names carry a hash of all that they were made from."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastkd"


def kind_and_mixing(divergence: Divergence | None) -> tuple[int, float]:
    """The sources' `Kind`, 0 without a divergence, and the mixing weight, which is ignored where there is none."""
    if divergence is None:
        return 0, 0.5
    return _KINDS[divergence.kind], 0.5 if divergence.mixing is None else divergence.mixing


def scale_and_softcap(transform: LogitTransform) -> tuple[float, float]:
    """The sources' `Transform`: a soft-cap of 0 is none."""
    return transform.scale, transform.softcap or 0.0
