"""fastkd: exact, fast and small knowledge distillation for language models.

The public names load what they need when they are first used: `fastkd --help` stays instant, and nothing heavier than torch is pulled
in by the losses (transformers, datasets and triton are imported where they are used).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference
    from .ops.divergence import Divergence
    from .ops.fused_loss import LossStats
    from .ops.kl import kl_div
    from .ops.linear_cross_entropy import linear_cross_entropy
    from .ops.linear_kl import LinearKLDivLoss, linear_kl_div
    from .ops.projected_mse import ProjectedMSELoss, projected_mse
    from .ops.relation_kl import RelationKLLoss, RelationTarget, relation_kl
    from .ops.topk_kl import topk_kl_div
    from .train.run import distill
    from .vocab.map import VocabMap

__version__ = "0.2.0"

_HOME = {
    "Divergence": ".ops.divergence",
    "LinearKLDivLoss": ".ops.linear_kl",
    "LossStats": ".ops.fused_loss",
    "ProjectedMSELoss": ".ops.projected_mse",
    "RelationKLLoss": ".ops.relation_kl",
    "RelationTarget": ".ops.relation_kl",
    "VocabMap": ".vocab.map",
    "distill": ".train.run",
    "kl_div": ".ops.kl",
    "linear_cross_entropy": ".ops.linear_cross_entropy",
    "linear_kl_div": ".ops.linear_kl",
    "projected_mse": ".ops.projected_mse",
    "relation_kl": ".ops.relation_kl",
    "topk_kl_div": ".ops.topk_kl",
}

__all__ = [
    "Divergence",
    "LinearKLDivLoss",
    "LossStats",
    "ProjectedMSELoss",
    "RelationKLLoss",
    "RelationTarget",
    "VocabMap",
    "distill",
    "kl_div",
    "linear_cross_entropy",
    "linear_kl_div",
    "projected_mse",
    "reference",
    "relation_kl",
    "topk_kl_div",
]


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module(".reference", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
