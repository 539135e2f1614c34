"""fastkd: exact, fast and small knowledge distillation for language models.

Importing it pulls in torch and nothing heavier: transformers, datasets and triton are imported where they are used.
"""

from . import reference
from .ops.chunked import LossStats
from .ops.divergence import Divergence
from .ops.kl import kl_div
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.linear_kl import LinearKLDivLoss, linear_kl_div

__version__ = "0.1.0"

__all__ = [
    "Divergence",
    "LinearKLDivLoss",
    "LossStats",
    "kl_div",
    "linear_cross_entropy",
    "linear_kl_div",
    "reference",
]
