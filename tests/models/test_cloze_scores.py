"""Answers that a kept vocabulary has not: label words are refused, candidates that become one are refused or told of."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from fastkd.methods.glmd import GLMDOptions, TaskScores
from fastkd.models.cloze_scores import check_candidates
from fastkd.models.language_model import LanguageModel
from fastkd.tasks.cloze import Example
from fastkd.tasks.cloze_task import ClozeTask
from fastkd.vocab.map import VocabMap
from tests import tiny

ROWS = 90
KEPT = VocabMap(torch.arange(60), torch.tensor([*range(60), *[7] * 20, *[8] * 10]))
"""Ids 60 to 79 are read as 7, and 80 to 89 as 8."""
TASK = ClozeTask(kind="verbalizer", template="{text} {mask}", label_words=("no", "perhaps", "yes"))


def models(student_map: VocabMap | None, teacher_map: VocabMap | None = None) -> tuple[LanguageModel, LanguageModel]:
    student, teacher = (LanguageModel(tiny.bert(ROWS if kept is None else 60), kept) for kept in (student_map, teacher_map))
    return student, teacher.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("ids", "named"),
    [([60, 61, 2], "without 'no', 'perhaps' of"), ([1, 2, 85], "without 'yes' of"), ([7, 8, 60], "without 'yes' of")],
    ids=["one slot for two", "a slot of its own", "the slot of a kept one"],
)
def test_label_words_that_a_vocabulary_has_not_are_refused(ids: list[int], named: str) -> None:
    words, sentence = torch.tensor(ids), rf"{named} label_words \['no', 'perhaps', 'yes'\].*vocabulary\.protected: \['no'"
    with pytest.raises(ValueError, match=sentence):
        TaskScores(*models(KEPT), GLMDOptions(), TASK, words)
    with pytest.raises(ValueError, match=sentence):
        TaskScores(*models(None, KEPT), GLMDOptions(), TASK, words)
    TaskScores(*models(None), GLMDOptions(), TASK, words)
    TaskScores(*models(KEPT), GLMDOptions(), TASK, torch.tensor([7, 8, 59]))


def example(*candidates: list[int]) -> Example:
    """The text 5 6 with every candidate behind it, as an encoder reads it: its tokens are masked, and are the targets."""
    sequences = tuple(np.array([5, 6, *[4] * len(candidate)], np.int32) for candidate in candidates)
    return Example(sequences, ((2,),) * len(candidates), tuple(map(tuple, candidates)), label=0)


FIXED = ClozeTask(kind="choices", template="{text} {choice}", choices=("a", "b"))
OF_A_ROW = ClozeTask(kind="choices", template="{text} {choice}", choices_column="c")


def test_candidates_of_every_row_that_become_one_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"pruned without tokens by which choices \['a', 'b'\] differ.*vocabulary\.protected: \['a', 'b'\]"
    ):
        check_candidates(FIXED, [example([60, 3], [7, 3])], KEPT)
    check_candidates(FIXED, [example([60, 3], [8, 3]), example([60], [60, 3])], KEPT)  # dropped tokens, and yet different


def test_candidates_of_a_row_that_become_one_are_counted_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    different, same, twice = example([1], [60], [80]), example([1], [60], [61]), example([60], [60], [1])
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        check_candidates(OF_A_ROW, [different, twice], KEPT)  # what is twice in the data is not the vocabulary's doing
        assert not caplog.messages
        check_candidates(OF_A_ROW, [different, same, twice, same], KEPT)
    assert "2 of 4 examples have candidates that the student's vocabulary makes one" in caplog.text and "first is 1 " in caplog.text


def test_candidates_that_a_decoder_reads_are_compared_in_its_input(caplog: pytest.LogCaptureFixture) -> None:
    def decoders(*candidates: list[int]) -> Example:
        sequences = tuple(np.array([5, 6, *candidate], np.int32) for candidate in candidates)
        return Example(sequences, ((1,),) * len(candidates), tuple(map(tuple, candidates)), label=0)

    check_candidates(OF_A_ROW, [decoders([1], [60])], KEPT)
    assert not caplog.messages
    check_candidates(OF_A_ROW, [decoders([7], [60])], KEPT)
    assert "1 of 1 examples" in caplog.text
