"""The oracles: obvious torch, any float dtype including float64, the same names and arguments as the fast ops they check."""

from .ops.kl import kl_div_reference as kl_div
from .ops.linear_cross_entropy import linear_cross_entropy_reference as linear_cross_entropy
from .ops.linear_kl import linear_kl_div_reference as linear_kl_div
from .ops.projected_mse import projected_mse_reference as projected_mse
from .ops.relation_kl import relation_kl_reference as relation_kl
from .ops.topk_kl import topk_kl_div_reference as topk_kl_div

__all__ = ["kl_div", "linear_cross_entropy", "linear_kl_div", "projected_mse", "relation_kl", "topk_kl_div"]
