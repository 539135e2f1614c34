"""MixUp of embeddings: trap 4 of the authors' code (a folded mix, pairs by reversal) and the union of masks."""

from __future__ import annotations

import numpy as np
import torch

from fastkd.methods.mixup import MixedBatch, partners
from fastkd.models.capture import Captured, Projections
from fastkd.tasks.text import TextBatch
from fastkd.train.batches import counter_torch_generator


def batch_of(lengths: tuple[int, ...]) -> TextBatch:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return TextBatch(mask * 7, mask, mask)


def test_the_mix_is_the_larger_of_a_uniform_number_and_its_rest_and_follows_from_the_generator():
    batch, before = batch_of((3, 2)), torch.get_rng_state()
    mixes = np.array([MixedBatch.draw(batch, counter_torch_generator(3, i)).mix for i in range(2000)])
    assert mixes.min() >= 0.5 and mixes.max() <= 1 and abs(mixes.mean() - 0.75) < 0.01 and abs(mixes.std() - 0.5 / 12**0.5) < 0.01
    assert MixedBatch.draw(batch, counter_torch_generator(3, 17)).mix == mixes[17]
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_paired_by_reversal_and_attend_to_the_tokens_of_both():
    batch, x = batch_of((4, 2, 3, 1, 2)), torch.arange(5.0).view(5, 1, 1)
    mixed = MixedBatch(batch, 0.75).to("cpu")
    assert mixed.embed(x).flatten().tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert mixed.tokens.sum(-1).tolist() == [4, 2, 3, 2, 4] == mixed.inputs.attention_mask.sum(-1).tolist()
    assert mixed.inputs.attention_mask.dtype == torch.int64 and torch.equal(mixed.inputs.input_ids, batch.input_ids)
    assert mixed.attention_mask is batch.attention_mask and mixed.input_ids is batch.input_ids
    seen = partners(Captured({2: x}, {2: Projections(x, x + 1, x + 2)}))
    assert seen.hidden[2].flatten().tolist() == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert [int(y[0]) for y in (seen.attention[2].q, seen.attention[2].k, seen.attention[2].v)] == [4, 5, 6]


def test_without_a_mix_rows_stay_as_they_are():
    batch, x = batch_of((4, 2, 3)), torch.arange(3.0).view(3, 1, 1)
    unmixed = MixedBatch(batch, None)
    assert unmixed.embed(x) is x and torch.equal(unmixed.inputs.attention_mask, batch.attention_mask)
