"""Choose the kept token that stands in for a dropped one; in GLMD, the one with the most similar embedding."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Similarity = Literal["dot", "cosine", "euclidean"]


@torch.no_grad()
def nearest_kept(
    embedding: Tensor,
    dropped_ids: Tensor,
    kept_ids: Tensor,
    similarity: Similarity,
    memory_budget: int = 64 * 2**20,
) -> Tensor:
    """For every dropped id, the position in `kept_ids` of the kept id with the most similar embedding row.

    With rows o (dropped) and k (kept): "dot" <o, k>, the logit that a tied output head gives k for the hidden state o;
    "cosine" <o, k> / (|o| |k|), 0 where a row is zero; "euclidean" -|o - k|^2. Scores are float32 whatever the dtype of
    the embedding; equal scores go to the lowest position.

    Args:
        embedding: (V, H), floating point, on any device; the ids lie there too, and so does the result.
        dropped_ids: (D,) int64 ids.
        kept_ids: (K,) int64 ids, K >= 1.
        similarity: "dot", "cosine" or "euclidean".
        memory_budget: bytes that may be alive at once beside the arguments and the result.

    Returns:
        (D,) int64 positions in `kept_ids`.

    Raises:
        ValueError: a score that is not finite.
    """
    hidden_size = embedding.shape[1]
    # With c rows of each side at a time, 4 (c^2 + 3 c H) bytes are alive at most: the scores and two blocks of float32
    # rows, one of which needs as much again while it is made.
    chunk = max(1, (math.isqrt(9 * hidden_size**2 + memory_budget) - 3 * hidden_size) // 2)
    nearest = torch.zeros_like(dropped_ids)
    for block_ids, block_nearest in zip(torch.split(dropped_ids, chunk), torch.split(nearest, chunk), strict=True):
        dropped = _rows(embedding, block_ids, similarity)
        best = torch.full(block_ids.shape, -torch.inf, dtype=torch.float32, device=embedding.device)
        for start in range(0, kept_ids.numel(), chunk):
            kept = _rows(embedding, kept_ids[start : start + chunk], similarity)
            score, position = _most_similar(dropped, kept, similarity)
            del kept  # before the next block is made
            finite = score.isfinite()
            if not bool(finite.all()):
                raise ValueError(
                    f"The {similarity} similarity of id {int(block_ids[~finite][0])} to the kept ids is not finite: the "
                    "embedding has NaN, infinite or huge values. Repair it, or use similarity='unk'."
                )
            better = score > best  # strict: an equal score further on does not win
            best = torch.where(better, score, best)
            block_nearest.copy_(torch.where(better, position + start, block_nearest))
    return nearest


def _rows(embedding: Tensor, ids: Tensor, similarity: Similarity) -> Tensor:
    rows = embedding[ids].float()
    return F.normalize(rows) if similarity == "cosine" else rows


def _most_similar(dropped: Tensor, kept: Tensor, similarity: Similarity) -> tuple[Tensor, Tensor]:
    """(score, position) of the first best row of `kept` (c, H) for every row of `dropped` (d, H)."""
    scores = dropped @ kept.T
    if similarity == "euclidean":  # -|o - k|^2 / 2, less the |o|^2 / 2 that all k share
        scores -= torch.linalg.vector_norm(kept, dim=1).square() / 2
    score, position = scores.max(dim=1)
    return score, position
