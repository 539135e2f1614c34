"""Batches of text: labels line up with the positions that predict them, and masking is BERT's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastkd.tasks.text import Masking, collate_text
from tests import tiny

ROWS = [np.arange(10, 19), np.arange(30, 33)]


def test_a_decoders_positions_predict_their_successors():
    batch = collate_text(ROWS, pad_id=7, masking=None, generator=torch.Generator())
    assert batch.input_ids.shape == (2, 16)
    assert batch.input_ids[1].tolist() == [30, 31, 32] + [7] * 13
    assert batch.attention_mask.sum(-1).tolist() == [9, 3]
    assert batch.labels[0].tolist() == [*range(11, 19)] + [-100] * 8
    assert batch.labels[1].tolist() == [31, 32] + [-100] * 14


def test_masking_has_berts_proportions_and_spares_special_tokens():
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 1000, 400) for _ in range(100)]
    masking = Masking(mask_id=4, special_ids=(0, 1, 2, 3, 4), vocabulary=1000, probability=0.15)
    batch = collate_text(rows, pad_id=0, masking=masking, generator=torch.Generator().manual_seed(1))
    original = torch.from_numpy(np.stack(rows))
    chosen = batch.labels != -100
    assert abs(chosen.float().mean() - 0.15) < 0.01
    assert torch.equal(batch.labels[chosen], original[chosen])
    assert not chosen[original < 5].any()
    assert torch.equal(batch.input_ids[~chosen], original[~chosen])
    inputs = batch.input_ids[chosen]
    assert abs((inputs == 4).float().mean() - 0.8) < 0.02
    assert abs((inputs == original[chosen]).float().mean() - 0.1) < 0.02


def test_masking_draws_ids_that_a_token_has():
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), tiny.SPECIAL, strict=True))
    ids = {**{token: id for id, token in enumerate(tiny.SPECIAL)}, "a": 6, "b": 508, "c": 511}
    words = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    masking = Masking.of(PreTrainedTokenizerFast(tokenizer_object=words, **special), 0.5)
    assert masking.vocabulary == 512 and masking.gaps == (5, *range(7, 508), 509, 510)
    rows = [np.full(400, 6) for _ in range(20)]
    drawn = collate_text(rows, pad_id=0, masking=masking, generator=torch.Generator().manual_seed(0)).input_ids.unique()
    assert drawn.tolist() == sorted(ids.values())


def test_masking_depends_on_its_generator_alone():
    masking = Masking(mask_id=4, special_ids=(0,), vocabulary=50, probability=0.5)

    def inputs(seed: int) -> torch.Tensor:
        torch.rand(3)  # the global generator plays no part
        return collate_text(ROWS, pad_id=0, masking=masking, generator=torch.Generator().manual_seed(seed)).input_ids

    assert torch.equal(inputs(1), inputs(1)) and not torch.equal(inputs(1), inputs(2))


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match="no mask token"):
        Masking.of(tiny.byte_level(), 0.15)
    masking = Masking.of(tiny.wordpiece(), 0.15)
    assert (masking.mask_id, masking.vocabulary) == (4, 600)
