import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.vocab.stand_ins import Similarity, nearest_kept

SIMILARITIES: list[Similarity] = ["dot", "cosine", "euclidean"]


def oracle_scores(embedding: Tensor, dropped_ids: Tensor, kept_ids: Tensor, similarity: Similarity) -> Tensor:
    """Dense float64 (D, K) similarities."""
    dropped, kept = embedding[dropped_ids].double(), embedding[kept_ids].double()
    if similarity == "dot":
        return dropped @ kept.T
    if similarity == "cosine":
        return torch.nn.functional.cosine_similarity(dropped[:, None], kept[None], dim=-1)
    return -(dropped[:, None] - kept[None]).square().sum(-1)


def make_ids(vocab_size: int, num_kept: int) -> tuple[Tensor, Tensor]:
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    return ids[num_kept:], ids[:num_kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("memory_budget", [2_000, 40_000, 2**26])
def test_equals_the_dense_float64_oracle(similarity: Similarity, dtype: torch.dtype, memory_budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = 0.2 + 2 * torch.rand(301, 1, generator=generator)  # different norms, so that the similarities disagree
    embedding = (torch.randn(301, 24, generator=generator) * scale + 0.1).to(dtype)
    dropped_ids, kept_ids = make_ids(301, 130)
    scores = oracle_scores(embedding, dropped_ids, kept_ids, similarity)
    nearest = nearest_kept(embedding, dropped_ids, kept_ids, similarity, memory_budget)
    assert nearest.dtype == torch.int64
    assert torch.equal(nearest, scores.argmax(dim=1))


def test_similarities_differ() -> None:
    embedding = torch.tensor([[1.0, 0.1], [9.0, 9.0], [5.0, 0.0], [1.5, 0.6]])  # id 0 is dropped
    ids = torch.tensor([0]), torch.tensor([1, 2, 3])
    assert [nearest_kept(embedding, *ids, similarity).item() for similarity in SIMILARITIES] == [0, 1, 2]


@pytest.mark.parametrize("memory_budget", [100, 1_000, 5_000, 2**26])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_ties_go_to_the_lowest_position(similarity: Similarity, memory_budget: int) -> None:
    kept = torch.tensor([[0.0, 2.0], [2.0, 0.0]]).repeat(50, 1)  # exact in every chunking
    embedding = torch.cat([torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), kept])
    nearest = nearest_kept(embedding, torch.arange(4), torch.arange(4, 104), similarity, memory_budget)
    assert nearest.tolist() == [1, 0, 0, 0]


def test_low_precision_scores_are_not_rounded() -> None:
    # In bfloat16 both products round to 256; the second is larger by 1/2.
    embedding = torch.tensor([[16.0, 0.5], [16.0, 0.0], [16.0, 1.0]], dtype=torch.bfloat16)
    assert (embedding[:1] @ embedding[1:].T).unique().numel() == 1
    assert nearest_kept(embedding, torch.tensor([0]), torch.tensor([1, 2]), "dot").item() == 1


def test_a_parameter_and_no_dropped_ids_are_fine() -> None:
    embedding = torch.nn.Parameter(torch.eye(3))
    assert not nearest_kept(embedding, torch.tensor([0]), torch.tensor([1, 2]), "dot").requires_grad
    assert nearest_kept(embedding, torch.tensor([], dtype=torch.int64), torch.arange(3), "dot").shape == (0,)


@pytest.mark.parametrize(("bad_id", "named"), [(3, 3), (7, 2)])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_values_that_are_not_finite_are_refused(similarity: Similarity, bad_id: int, named: int) -> None:
    embedding = torch.ones(8, 4)
    embedding[bad_id, 1] = torch.nan
    with pytest.raises(ValueError, match=f"similarity of id {named} to the kept ids is not finite"):
        nearest_kept(embedding, torch.tensor([2, 3]), torch.arange(4, 8), similarity, memory_budget=500)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made under this mode held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._tensors: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [tensor for tensor in (out if isinstance(out, tuple | list) else [out]) if isinstance(tensor, Tensor)]
        borrowed = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        self._tensors += [weakref.ref(x) for x in made if x.untyped_storage().data_ptr() not in borrowed]
        alive = [tensor for tensor in (reference() for reference in self._tensors) if tensor is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
        self.peak = max(self.peak, sum(storages.values()))
        return out


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("hidden_size", "memory_budget"), [(16, 100_000), (256, 400_000)])
def test_memory_stays_within_the_budget(similarity: Similarity, hidden_size: int, memory_budget: int) -> None:
    embedding = torch.randn(1000, hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    dropped_ids, kept_ids = make_ids(1000, 500)
    with PeakMemory() as memory:
        nearest = nearest_kept(embedding, dropped_ids, kept_ids, similarity, memory_budget)
    per_row_vectors = 10 * 8 * 500  # the result and the best scores, far below the blocks
    assert memory_budget / 3 < memory.peak < memory_budget + per_row_vectors
    assert torch.equal(nearest, oracle_scores(embedding, dropped_ids, kept_ids, similarity).argmax(dim=1))
