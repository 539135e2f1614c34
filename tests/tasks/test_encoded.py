"""Labelled examples as padded batches: every id is where it must be, and scores become the right predictions."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.tasks.encoded import EncodedTask, encode_task
from fastkd.tasks.labelled import Answer, LabelledExample, TaskDataset
from fastkd.tasks.pairs import unlabelled
from tests import tiny

PAD, CLS, SEP = 0, 2, 3
SHORT, LONG = "return self", "the value of each key is the first line of text that the module can read " * 3


def with_token_types(**names: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | names
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny.wordpiece().backend_tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    )


def plain(text: str, tokenizer: Any = None) -> list[int]:
    return (tokenizer or tiny.wordpiece())(text, add_special_tokens=False)["input_ids"]


def classes(*rows: tuple[str, str | None]) -> TaskDataset:
    """With the labels 1, 0, 1, ..., and a split without labels."""
    examples = [LabelledExample(text, second, (number + 1) % 2) for number, (text, second) in enumerate(rows)]
    splits = {"train": examples, "test": [replace(example, label=None) for example in examples]}
    return TaskDataset("toy", "classification", splits, ("accuracy",), ("no", "yes"))


def choices(*rows: tuple[str, str | None, tuple[str, ...]], label: int | None = 1) -> TaskDataset:
    examples = [LabelledExample(text, second, label, options) for text, second, options in rows]
    return TaskDataset("toy", "multiple_choice", {"train": examples, "validation": examples}, ("accuracy",))


def values(*numbers: float | None) -> TaskDataset:
    examples = [LabelledExample(f"line {number}", "second", number) for number in numbers]
    labelled = [replace(example, label=1.0) for example in examples]
    return TaskDataset("toy", "regression", {"train": labelled, "validation": examples}, ("pearson",))


def questions() -> TaskDataset:
    examples = [
        LabelledExample("who?", "It was the first line of the text.", answers=(Answer("first line", 11),)),
        LabelledExample("why?", "The module can read it."),
    ]
    return TaskDataset("toy", "question_answering", {"train": examples, "validation": examples}, ("token_f1",))


def encode(dataset: TaskDataset, tokenizer: Any = None, split: str = "train", max_length: int = 64, **options: Any) -> EncodedTask:
    return encode_task(dataset, split, tokenizer or tiny.wordpiece(), max_length=max_length, **options)


def test_rows_are_the_tokenizers_own_and_padded_to_a_multiple_of_eight() -> None:
    task = encode(classes((SHORT, None), (LONG, None), ("a", None)))
    first, second, third = ([CLS, *plain(text), SEP] for text in (SHORT, LONG, "a"))
    assert all(row.dtype == np.int32 for row in task.ids) and len(second) < 64
    assert task.lengths.tolist() == [len(first), len(second), len(third)] and len(task) == 3
    batch = task.collate([2, 1])
    width = batch.input_ids.shape[1]
    assert width % 8 == 0 and len(second) <= width < len(second) + 8
    assert batch.input_ids.tolist() == [third + [PAD] * (width - 3), second + [PAD] * (width - len(second))]
    assert batch.attention_mask.tolist() == [[1] * 3 + [0] * (width - 3), [1] * len(second) + [0] * (width - len(second))]
    assert batch.token_type_ids is None
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype) == (torch.int64,) * 3
    assert batch.labels.tolist() == [1, 0] and (batch.num_examples, batch.num_choices) == (2, 1)
    assert (task.kind, task.num_outputs) == ("classification", 2)
    assert task.collate(np.array([0])).input_ids.tolist() == [first + [PAD] * (8 - len(first))]
    with pytest.raises(ValueError, match="indices is empty"):
        task.collate([])


def test_pairs_have_token_types_where_the_tokenizer_makes_them() -> None:
    dataset = classes(("read a line", "of text"), ("a", "b"))
    first, second = plain("read a line"), plain("of text")
    ids = [CLS, *first, SEP, *second, SEP]
    batch = encode(dataset, with_token_types()).collate([0])
    width = batch.input_ids.shape[1]
    assert batch.input_ids[0].tolist() == ids + [PAD] * (width - len(ids))
    assert batch.token_type_ids is not None and batch.token_type_ids.dtype == torch.int64
    assert batch.token_type_ids[0].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (width - len(ids))
    without = encode(dataset).collate([0])
    assert without.token_type_ids is None and torch.equal(without.input_ids, batch.input_ids)


def test_decoders_read_pairs_without_special_tokens_and_may_have_no_pad_token() -> None:
    from transformers import PreTrainedTokenizerFast

    backend = tiny.byte_level().backend_tokenizer
    eos = tiny.byte_level().eos_token_id
    dataset = classes(("read a line", " of text"), ("a", "b"))
    ids = plain("read a line", tiny.byte_level()) + plain(" of text", tiny.byte_level())
    for names, pad_id in (({"eos_token": "<eos>"}, eos), ({}, 0), ({"eos_token": "<eos>", "pad_token": "#"}, backend.token_to_id("#"))):
        batch = encode(dataset, PreTrainedTokenizerFast(tokenizer_object=backend, **names)).collate([0, 1])
        assert batch.token_type_ids is None
        assert batch.input_ids[0].tolist() == ids + [pad_id] * (batch.input_ids.shape[1] - len(ids))
        assert batch.attention_mask.sum(1).tolist() == [len(ids), 2]


def test_the_longest_text_is_cut_and_how_many_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    long, short = plain(LONG), plain(SHORT)
    dataset = classes((LONG, SHORT), (SHORT, LONG), (LONG, LONG), (SHORT, SHORT))
    with caplog.at_level(logging.WARNING):
        task = encode(dataset, max_length=20)
    assert [record.getMessage() for record in caplog.records] == ["3 of 4 rows of split 'train' were cut to max_length=20 tokens."]
    room = 17 - len(short)
    assert task.ids[0].tolist() == [CLS, *long[:room], SEP, *short, SEP]
    assert task.ids[1].tolist() == [CLS, *short, SEP, *long[:room], SEP]
    assert task.ids[2].tolist() in ([CLS, *long[:k], SEP, *long[: 17 - k], SEP] for k in (8, 9))
    assert task.ids[3].tolist() == [CLS, *short, SEP, *short, SEP]
    assert task.lengths.tolist() == [20, 20, 20, 3 + 2 * len(short)]
    caplog.clear()
    encode(dataset, max_length=200)
    encode(classes((LONG, None), (SHORT, None)), max_length=len(long) + 2)
    assert not caplog.records
    assert encode(classes((LONG, None), (SHORT, None)), max_length=10).ids[0].tolist() == [CLS, *long[:8], SEP]


def test_every_choice_is_a_row_in_order(caplog: pytest.LogCaptureFixture) -> None:
    options = ("a line", "no text", "the key")
    dataset = choices((SHORT, "each", options), ("read", "it", tuple(reversed(options))), ("value", "is", options))
    task = encode(dataset, with_token_types())
    assert (task.num_outputs, task.num_choices, len(task)) == (1, 3, 3)
    batch = task.collate([2, 1])
    assert (batch.num_examples, batch.num_choices, batch.labels.tolist()) == (2, 3, [1, 1])
    expected = [("value is", option) for option in options] + [("read it", option) for option in reversed(options)]
    assert batch.token_type_ids is not None
    for ids, held, types, (text, option) in zip(batch.input_ids, batch.attention_mask, batch.token_type_ids, expected, strict=True):
        row = [CLS, *plain(text), SEP, *plain(option), SEP]
        assert ids[held.bool()].tolist() == row and held.sum() == len(row)
        assert types.sum() == len(plain(option)) + 1
    assert task.lengths[0] == max(len([CLS, *plain(f"{SHORT} each"), SEP, *plain(option), SEP]) for option in options)
    alone = encode(choices((SHORT, None, options[:2]), ("read", None, options[:2])))
    assert alone.ids[1].tolist() == [CLS, *plain(SHORT), SEP, *plain("no text"), SEP]
    with caplog.at_level(logging.WARNING):
        encode(choices((LONG, None, ("a", "b")), ("read", None, ("a", "b"))), max_length=16)
    assert "1 of 2 rows of split 'train' were cut" in caplog.text


def test_more_rows_than_one_call_of_the_tokenizer_takes() -> None:
    rows = [(f"line {number}", f"text {number % 7}") for number in range(600)]
    task = encode(classes(*rows))
    assert [row.tolist() for row in task.ids] == [[CLS, *plain(a), SEP, *plain(b), SEP] for a, b in rows]


def test_labels_of_every_kind_and_of_none() -> None:
    regression = encode(values(0.25, 5.0), split="validation")
    batch = regression.collate([1, 0])
    assert batch.labels.dtype == torch.float32 and batch.labels.tolist() == [5.0, 0.25] and regression.num_outputs == 1
    missing = encode(values(None, None), split="validation").collate([0]).labels
    assert missing.dtype == torch.float32 and math.isnan(missing.item())
    assert encode(classes((SHORT, None), (LONG, None)), split="test").collate([0, 1]).labels.tolist() == [-1, -1]
    assert encode(choices((SHORT, None, ("a", "b")), ("b", None, ("a", "b")), label=None)).collate([1]).labels.tolist() == [-1]
    answers = encode(questions(), doc_stride=8).collate([0, 1])
    first = [CLS, *plain("who?"), SEP].index(SEP) + 1 + len(plain("It was the"))
    assert answers.labels.tolist() == [[first, first + len(plain("first line")) - 1], [0, 0]]
    assert answers.labels.dtype == torch.int64


def test_unlabelled_rows_have_nothing_to_predict() -> None:
    task = encode(unlabelled("pairs", [LabelledExample("read", "text"), LabelledExample("a", "b")]))
    assert (task.kind, task.num_outputs) == ("unlabelled", 0)
    assert task.collate([0, 1]).labels.tolist() == [-1, -1]
    assert task.ids[1].tolist() == [CLS, *plain("a"), SEP, *plain("b"), SEP]
    with pytest.raises(ValueError, match="nothing to predict"):
        task.predictions([torch.zeros(2)] * 2)


def test_predictions_are_what_the_dataset_scores() -> None:
    dataset = classes((SHORT, None), (LONG, None), ("a", None))
    task = encode(dataset)
    scores = torch.tensor([[0.0, 1.0], [2.0, -1.0], [3.0, 2.0]])
    assert task.predictions(list(scores)) == [1, 0, 0]
    assert dataset.score("train", task.predictions(list(scores.bfloat16()))) == {"accuracy": pytest.approx(2 / 3)}
    picked = encode(choices(*[(SHORT, None, ("a", "b", "c"))] * 2)).predictions(
        [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([5.0, 1, 2])]
    )
    assert picked == [2, 0]
    numbers = encode(values(1.0, 2.0), split="validation").predictions([torch.tensor(0.5), torch.tensor(-2.0)])
    assert numbers == [0.5, -2.0] and all(type(number) is float for number in numbers)
    with pytest.raises(ValueError, match=r"scores has those of 2 rows, and there are 3"):
        task.predictions(list(scores[:2]))
    with pytest.raises(ValueError, match=r"scores are \(3,\) a row; kind 'classification' with these outputs has \(2,\)"):
        task.predictions(list(torch.zeros(3, 3)))


def test_question_answering_predicts_answers() -> None:
    dataset = questions()
    task = encode(dataset, doc_stride=8)
    assert (task.kind, task.num_outputs, len(task)) == ("question_answering", 2, 2)
    batch = task.collate(range(2))
    scores = torch.nn.functional.one_hot(batch.labels, batch.input_ids.shape[1]).float()
    assert task.predictions(list(scores)) == ["first line", ""]
    assert dataset.score("train", task.predictions(list(scores))) == {"token_f1": 1.0}


def test_the_same_rows_every_time_whatever_the_tokenizer_did_before() -> None:
    tokenizer = with_token_types()
    dataset = classes((LONG, SHORT), (SHORT, LONG))
    before = encode(dataset, tokenizer, max_length=24)
    encode(questions(), tokenizer, max_length=24, doc_stride=2)
    tokenizer([SHORT, LONG], padding="max_length", truncation=True, max_length=50)
    for again in (encode(dataset, tokenizer, max_length=24), encode(dataset, with_token_types(), max_length=24)):
        for one, other in zip(before.ids, again.ids, strict=True):
            assert np.array_equal(one, other)


def test_moved_batches_keep_everything() -> None:
    batch = encode(choices((SHORT, None, ("a", "b")), ("b", None, ("a", "b"))), with_token_types()).collate([0, 1])
    moved = batch.to("meta")
    assert moved.num_choices == 2 and moved.num_examples == 2 and batch.token_type_ids is not None
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        assert getattr(moved, name).device.type == "meta" and getattr(moved, name).shape == getattr(batch, name).shape
    assert replace(batch, token_type_ids=None).to("cpu").token_type_ids is None


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (classes(("a", None), ("b", None)), {"max_length": 7}, ValueError, "max_length is 7; a row needs at least 8 tokens"),
        (
            classes(("a", None), ("b", None)),
            {"split": "dev"},
            ValueError,
            "split='dev' is not a split of toy: use one of 'train', 'test'",
        ),
        (classes(("a", None), ("b", None)), {"tokenizer": Slow()}, TypeError, "The tokenizer is a Slow, which is not a fast one"),
        (classes(("a", "b"), ("b", None)), {}, ValueError, r"Row 1 \(the first is 0\) of split 'train' of toy and row 0 are not both"),
        (
            choices(*[("a", None, ("x", "y"))] * 3, ("d", None, ("x", "y", "z"))),
            {},
            ValueError,
            r"Row 3 \(the first is 0\) of split 'train' of toy has 3 choices and row 0 has 2; all rows must have the same number",
        ),
        (questions(), {"max_answer_length": 0}, ValueError, "max_answer_length is 0; it must be at least 1"),
        (questions(), {"n_best": 0}, ValueError, "n_best is 0; it must be at least 1"),
        (questions(), {"doc_stride": 128}, ValueError, "doc_stride is 128; .* must be from 0 to 29 where max_length is 64"),
        (questions(), {"doc_stride": -1}, ValueError, "doc_stride is -1"),
        (questions(), {"tokenizer": tiny.byte_level()}, ValueError, "begins no row with a classification token"),
    ],
)
def test_what_cannot_be_encoded_is_refused(dataset: TaskDataset, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode(dataset, **options)
