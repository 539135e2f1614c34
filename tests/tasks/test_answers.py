"""Windows of contexts, and the answers that their scores stand for, against all pairs of positions tried one by one."""

from __future__ import annotations

import itertools
import logging
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastkd.tasks.answers import AnswerSearch
from fastkd.tasks.encoded import EncodedTask, encode_task
from fastkd.tasks.labelled import Answer, LabelledExample, TaskDataset
from tests import tiny
from tests.tasks.test_encoded import with_token_types


def roberta() -> Any:
    """Byte-level with RoBERTa's special tokens, which trims the spaces off the offsets."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<eos>")


TOKENIZERS = {"wordpiece": with_token_types, "byte_level": roberta}


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def squad(answerable_only: bool = False) -> TaskDataset:
    """Questions about the words of long and short contexts; every third of them without an answer."""
    # No answer is longer than what two windows share.
    text = [word for word in " ".join(tiny.lines()).split() if len(word) < 9]
    examples = []
    for number in range(24):
        words = text[number * 60 : number * 60 + (60 if number % 2 else 8)]
        place = (number * 7) % len(words)
        start = len(" ".join(words[:place])) + (place > 0)
        answer = Answer(" ".join(words[place : place + 1 + number % 2]), start)
        answers = (answer,) if answerable_only or number % 3 else ()
        examples.append(LabelledExample(f"what is in {number}?", " ".join(words), answers=answers))
    return TaskDataset("toy", "question_answering", {"train": examples, "validation": examples[:2]}, ("exact_match", "token_f1"))


def encode(dataset: TaskDataset, tokenizer: Any, **options: Any) -> EncodedTask:
    return encode_task(dataset, "train", tokenizer, **{"max_length": 48, "doc_stride": 12, **options})


def windows_of(task: EncodedTask) -> AnswerSearch:
    assert task.search is not None
    return task.search


def test_windows_are_the_tokenizers_own(tokenizer: Any) -> None:
    dataset = squad()
    task, window = encode(dataset, tokenizer), 0
    for number, example in enumerate(dataset.split("train")):
        own = tokenizer(
            example.text,
            example.second_text,
            truncation="only_second",
            max_length=48,
            stride=12,
            return_overflowing_tokens=True,
            return_token_type_ids=True,
            return_offsets_mapping=True,
        )
        for ids, types, offsets, encoding in zip(
            own["input_ids"], own["token_type_ids"], own["offset_mapping"], own.encodings, strict=True
        ):
            found = windows_of(task).windows[window]
            assert found.question == number and task.ids[window].tolist() == ids
            assert found.token_types.tolist() == types
            context = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
            assert found.first == context[0]
            assert found.offsets.tolist() == [list(offsets[place]) for place in context]
            window += 1
    assert window == len(task) > 2 * len(dataset.split("train"))
    assert task.lengths.max() == 48
    assert (task.token_types is not None) == ("token_type_ids" in tokenizer.model_input_names)


def test_windows_share_doc_stride_tokens_and_miss_none(tokenizer: Any) -> None:
    for _, group in itertools.groupby(windows_of(encode(squad(), tokenizer)).windows, lambda window: window.question):
        windows = list(group)
        for before, after in itertools.pairwise(windows):
            assert np.array_equal(before.offsets[-12:], after.offsets[:12])


def test_gold_labels_cover_the_answer_and_nothing_more(tokenizer: Any) -> None:
    dataset = squad()
    task = encode(dataset, tokenizer)
    held = 0
    for window, (first, last) in zip(windows_of(task).windows, task.labels.tolist(), strict=True):
        example = dataset.split("train")[window.question]
        places = range(window.first, window.first + len(window.offsets))
        if not example.answers:
            assert (first, last) == (0, 0)
            continue
        answer = example.answers[0]
        end = answer.start + len(answer.text)
        if window.offsets[0, 0] <= answer.start and end <= window.offsets[-1, 1]:
            assert first in places and last in places and first <= last
            span = (window.offsets[first - window.first, 0], window.offsets[last - window.first, 1])
            assert (example.second_text or "")[slice(*span)].strip() == answer.text
            held += 1
        else:
            assert (first, last) == (0, 0)
    assert held >= 16  # every answer is in a window, some in two
    assert (task.labels[:, 0] == 0).sum() >= 20


@pytest.mark.parametrize("answerable_only", [True, False])
def test_the_gold_logits_give_the_gold_answers(tokenizer: Any, answerable_only: bool) -> None:
    dataset = squad(answerable_only)
    task = encode(dataset, tokenizer)
    batch = task.collate(range(len(task)))
    scores = torch.nn.functional.one_hot(batch.labels, batch.input_ids.shape[1]).float()
    # A window that does not hold the answer is sure of nothing, so that it does not outbid the one that does.
    scores[(batch.labels == 0).all(1)] *= 0.5
    predicted = task.predictions(list(scores))
    assert predicted == [example.answers[0].text if example.answers else "" for example in dataset.split("train")]
    assert len(set(predicted)) > 10
    assert dataset.score("train", predicted) == {"exact_match": 1.0, "token_f1": 1.0}


def brute_force(task: EncodedTask, scores: list[Tensor], dataset: TaskDataset, n_best: int, longest: int, has_null: bool) -> list[str]:
    """Every pair of positions of every window, one by one."""
    answers = []
    for number, example in enumerate(dataset.split("train")):
        best, text, null = -math.inf, "", math.inf
        for window, logits in zip(windows_of(task).windows, scores, strict=True):
            if window.question != number:
                continue
            start, end = logits.double().tolist()
            null = min(null, start[0] + end[0])
            places = range(window.first, window.first + len(window.offsets))
            firsts, lasts = ([p for p in places if sum(values[q] > values[p] for q in places) < n_best] for values in (start, end))
            for first, last in itertools.product(firsts, lasts):
                if first <= last < first + longest and start[first] + end[last] > best:
                    best = start[first] + end[last]
                    begin, stop = window.offsets[first - window.first, 0], window.offsets[last - window.first, 1]
                    text = (example.second_text or "")[begin:stop].strip()
        answers.append("" if has_null and null > best else text)
    return answers


@pytest.mark.parametrize(("n_best", "longest"), [(1_000, 1_000), (20, 30), (20, 3), (3, 30), (2, 10)])
@pytest.mark.parametrize("answerable_only", [True, False])
def test_answers_equal_brute_force(tokenizer: Any, n_best: int, longest: int, answerable_only: bool) -> None:
    dataset = squad(answerable_only)
    task = encode(dataset, tokenizer, n_best=n_best, max_answer_length=longest)
    generator = torch.Generator().manual_seed(n_best + longest)
    # Rows are wider than their windows, and the best logits are there and in the question: neither may be chosen.
    scores = [torch.randn(2, len(ids) + 5, generator=generator) for ids in task.ids]
    for window, logits in zip(windows_of(task).windows, scores, strict=True):
        logits[:, 1 : window.first] += 10
        logits[:, window.first + len(window.offsets) :] += 10
        logits[:, 0] += 1.5
    predicted = task.predictions(scores)
    assert predicted == brute_force(task, scores, dataset, n_best, longest, has_null=not answerable_only)
    assert len(set(predicted)) > 3
    if n_best >= 20 and longest >= 30:
        assert ("" in predicted) == (not answerable_only)


def test_scores_must_be_the_windows_own() -> None:
    task = encode(squad(), with_token_types())
    good = [torch.zeros(2, 48)] * len(task)
    for wrong in (torch.zeros(48), torch.zeros(3, 48), torch.zeros(2, len(task.ids[1]) - 1)):
        with pytest.raises(ValueError, match=r"A window of \d+ tokens has scores \(.*\); they must be \(2, tokens or more\)"):
            task.predictions([good[0], wrong, *good[2:]])
    with pytest.raises(ValueError, match="give one for each"):
        task.predictions(good[:-1])


def test_only_questions_that_leave_too_little_room_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    words = [word for word in " ".join(tiny.lines()).split() if word.isalpha()]
    random.Random(0).shuffle(words)
    long, answer = " ".join(words[:60]), Answer(words[100], len(" ".join(words[60:100])) + 1)
    examples = [
        LabelledExample(long, " ".join(words[60:140]), answers=(answer,)),
        LabelledExample(" ".join(words[:9]), "yes", answers=(Answer("yes", 0),)),
    ]
    dataset = TaskDataset("toy", "question_answering", {"train": examples, "validation": examples}, ("exact_match",))
    tokenizer = with_token_types()
    with caplog.at_level(logging.WARNING):
        task = encode(dataset, tokenizer, max_length=40, doc_stride=17)
    assert "1 of 2 rows of split 'train' were cut to max_length=40 tokens" in caplog.text
    plain = tokenizer(long, add_special_tokens=False)["input_ids"]
    assert task.ids[0].tolist()[:20] == [2, *plain[:18], 3] and task.lengths.max() == 40
    assert task.ids[-1].tolist() == tokenizer(examples[1].text, "yes")["input_ids"]
    first, last = task.labels.max(0).values.tolist()
    assert 20 <= first <= last < 39
    batch = task.collate(range(len(task)))
    scores = torch.nn.functional.one_hot(batch.labels, batch.input_ids.shape[1]).float()
    assert task.predictions(list(scores)) == [answer.text, "yes"]


def test_a_context_without_a_single_token_has_no_answer() -> None:
    from dataclasses import replace

    tokenizer = with_token_types()
    strange = LabelledExample("what?", "\x07", answers=(Answer("\x07", 0),))
    dataset = squad()
    dataset = replace(dataset, splits={**dataset.splits, "train": [strange, strange]})
    task = encode(dataset, tokenizer)
    assert task.labels.tolist() == [[0, 0], [0, 0]]
    assert task.predictions([torch.zeros(2, 48)] * 2) == ["", ""]
