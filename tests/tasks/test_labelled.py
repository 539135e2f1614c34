"""The container of labelled tasks: what it refuses, its fingerprint, its scores, and CR-ILD's few-sample and noisy variants."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fastkd.tasks.labelled import Answer, LabelledExample, TaskDataset

N = 2_000


def classes(count: int = N, names: tuple[str, ...] = ("a", "b", "c")) -> TaskDataset:
    rows = [LabelledExample(f"text {number}", label=number % len(names)) for number in range(count)]
    return TaskDataset("toy", "classification", {"train": rows, "validation": rows[:6]}, ("accuracy", "f1_macro"), names)


def choices(count: int = 100) -> TaskDataset:
    rows = [LabelledExample(f"text {n}", label=n % 4, choices=("w", "x", "y", "z")) for n in range(count)]
    return TaskDataset("toy", "multiple_choice", {"train": rows, "validation": rows[:8]}, ("accuracy",))


def values() -> TaskDataset:
    rows = [LabelledExample(f"text {n}", "second", float(n)) for n in range(5)]
    return TaskDataset("toy", "regression", {"train": rows, "validation": rows}, ("spearman", "pearson"))


def questions() -> TaskDataset:
    rows = [
        LabelledExample("who?", "It was Ada Lovelace.", answers=(Answer("Ada Lovelace", 7), Answer("Ada", 7))),
        LabelledExample("why?", "Nobody knows."),
    ]
    return TaskDataset("toy", "question_answering", {"train": rows, "validation": rows}, ("token_f1", "exact_match"))


def with_row(task: TaskDataset, number: int, **changes: object) -> TaskDataset:
    rows = list(task.split("train"))
    rows[number] = replace(rows[number], **changes)  # type: ignore[arg-type]
    return replace(task, splits={**task.splits, "train": rows})


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (classes, {"label": 3}, r"Row 2 \(the first is 0\) of split 'train' of toy has the label 3; .*below 3"),
        (classes, {"label": -1}, "has the label -1"),
        (classes, {"label": True}, "has the label True"),
        (classes, {"label": 1.0}, "has the label 1.0"),
        (classes, {"label": None}, "has no label, which the first row has"),
        (classes, {"text": " \n"}, "has no text"),
        (choices, {"label": 4}, "has the label 4; .*below 4"),
        (choices, {"choices": ("one",)}, r"has the choices \['one'\]; two or more"),
        (choices, {"choices": ("one", " ")}, "none empty"),
        (values, {"label": float("nan")}, "has the label nan, which is no finite float"),
        (values, {"label": 2}, "has the label 2, which is no finite float"),
    ],
)
def test_bad_rows_are_named(task, changes, message):
    with pytest.raises(ValueError, match=message):
        with_row(task(), 2, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_text": None}, "needs both a question"),
        ({"answers": (Answer("Ada", 6),)}, "answer 'Ada', which does not stand at character 6"),
        ({"answers": (Answer("", 0),)}, "answer ''"),
        ({"answers": (Answer(".", -1),)}, "character -1"),
    ],
)
def test_bad_answers_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        with_row(questions(), 0, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "tagging"}, "kind is 'tagging'; it must be one of classification, regression"),
        ({"label_names": ("a",)}, r"label_names is \('a',\)"),
        ({"label_names": ("a", "a", "b")}, "each once"),
        ({"label_names": ()}, "needs two or more"),
        ({"metrics": ()}, "can be judged by accuracy, f1"),
        ({"metrics": ("pearson",)}, r"metrics is \('pearson',\); kind 'classification'"),
        ({"metrics": ("f1",)}, "'f1' is for two classes and toy has 3"),
        ({"splits": {}}, "toy has no split; it needs 'train', or one to evaluate on"),
        ({"splits": {"validation": [], "test": []}}, "'validation' of toy has 0 examples"),
        ({"splits": {"train": classes().split("train"), "validation": []}}, "'validation' of toy has 0 examples"),
        ({"splits": {"train": classes().split("train")[:1], "validation": []}}, "'train' of toy has 1 examples"),
    ],
)
def test_bad_tasks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(classes(), **changes)
    if "label_names" in changes:
        return
    with pytest.raises(ValueError, match="label_names"):
        replace(values(), label_names=("a", "b"))


def test_unknown_split_lists_the_present_ones():
    with pytest.raises(ValueError, match="split='dev' is not a split of toy: use one of 'train', 'validation'"):
        classes().split("dev")


def test_a_split_may_have_no_labels_at_all():
    unlabelled = [LabelledExample("a", "b"), LabelledExample("c", "d")]
    task = replace(classes(), splits={**classes().splits, "train": unlabelled})
    assert not task.is_labelled("train") and task.is_labelled("validation") and questions().is_labelled("train")
    with pytest.raises(ValueError, match="its training split has no labels"):
        task.label_noise(0.5, 0)
    with pytest.raises(ValueError, match="'train' of toy has no labels to score"):
        task.score("train", [0, 0])
    with pytest.raises(ValueError, match=r"Row 1 .* has a label and the first row has none"):
        replace(task, splits={**task.splits, "train": [unlabelled[0], LabelledExample("c", label=1)]})


def test_fingerprint_is_the_contents():
    prints = {classes().fingerprint}
    assert bytes.fromhex(*prints) and {classes().fingerprint, replace(classes(), name="other").fingerprint} == prints
    for changed in (
        with_row(classes(), 5, label=0),
        with_row(classes(), 5, text="other"),
        with_row(classes(), 5, second_text=""),
        with_row(classes(), 5, group="other"),
        replace(classes(), label_names=("a", "c", "b")),
        replace(classes(), splits={"train": classes().split("train"), "test": classes().split("validation")}),
        classes(N - 1),
        values(),
        questions(),
        with_row(questions(), 0, answers=(Answer("Ada Lovelace", 7),)),
    ):
        prints.add(changed.fingerprint)
    assert len(prints) == 11


def test_a_splits_fingerprint_is_its_own_contents():
    task = classes()
    prints = {task.split_fingerprint("train"), task.split_fingerprint("validation")}
    for same in (replace(task, name="other"), replace(task, metrics=("f1_macro",)), task.limited("validation", 4)):
        assert same.split_fingerprint("train") in prints
    assert replace(task, splits={"train": task.split("validation"), "test": task.split("train")}).split_fingerprint("test") in prints
    for changed in (with_row(task, 5, label=0), with_row(task, 5, text="other"), replace(task, label_names=("a", "c", "b"))):
        prints.add(changed.split_fingerprint("train"))
    prints.add(questions().split_fingerprint("train"))
    assert len(prints) == 6 and all(len(bytes.fromhex(found)) == 32 for found in prints)
    with pytest.raises(ValueError, match="split='dev' is not a split of toy"):
        task.split_fingerprint("dev")


def test_fingerprint_is_the_same_for_ever():
    assert classes(3).fingerprint == "1df3f602776205e6aee5001e042b21844e4f4039d1b4dd28ac406d2a039b9631"


def test_limits_keep_the_first_rows_of_one_split():
    task = classes()
    limited = task.limited("validation", 4)
    assert limited.split("validation") == task.split("validation")[:4] and limited.split("train") == task.split("train")
    assert task.limited("validation", 100).fingerprint == task.fingerprint
    with pytest.raises(ValueError, match="n is 1; split 'train' of toy must keep at least 2 examples"):
        task.limited("train", 1)
    with pytest.raises(ValueError, match="split='dev' is not a split"):
        task.limited("dev", 4)


def test_outputs_of_every_kind():
    assert [task().num_outputs for task in (classes, choices, values, questions)] == [3, 1, 1, 2]


def test_a_split_stands_alone():
    rows = classes().split("validation")
    alone = replace(classes(), splits={"test": rows})
    assert alone.split_fingerprint("test") == classes().split_fingerprint("validation") and alone.is_labelled("test")
    with pytest.raises(ValueError, match="split='train' is not a split of toy: use one of 'test'"):
        alone.few_sample(2, 0)


def test_values_that_are_all_equal_cannot_be_evaluated_on():
    """Which a run would otherwise learn from its first evaluation; what is trained on is never scored."""
    rows = [LabelledExample(f"text {n}", label=2.0) for n in range(3)]
    assert replace(values(), splits={"train": rows, "validation": values().split("train")}).is_labelled("train")
    with pytest.raises(ValueError, match=r"Split 'validation' of toy has the value 2\.0 in all of its 3 examples, and nothing"):
        replace(values(), splits={"train": values().split("train"), "validation": rows})
    mixed = replace(values(), splits={"validation": [*rows, LabelledExample("other", label=1.0)]})
    with pytest.raises(ValueError, match=r"has the value 2\.0 in all of its 2 examples"):
        mixed.limited("validation", 2)


def test_questions_may_lack_an_answer_where_one_of_them_does_whatever_rows_are_left():
    answered = replace(questions(), splits={"train": [questions().split("train")[0]] * 2}, has_unanswerable=False)
    assert questions().has_unanswerable and not answered.has_unanswerable
    rows = [*answered.split("train"), questions().split("train")[1]]
    limited = replace(answered, splits={"validation": rows}).limited("validation", 2)
    assert all(example.answers for example in limited.split("validation")) and limited.has_unanswerable


def test_unlabelled_rows_need_no_split_to_evaluate_on_and_no_metrics():
    rows = [LabelledExample("a", "b"), LabelledExample("c")]
    task = TaskDataset("toy", "unlabelled", {"train": rows}, ())
    assert task.num_outputs == 0 and not task.is_labelled("train") and len(task.limited("train", 2).split("train")) == 2
    with pytest.raises(ValueError, match=r"metrics is \('accuracy',\); kind 'unlabelled' can be judged by none"):
        replace(task, metrics=("accuracy",))
    with pytest.raises(ValueError, match=r"Row 1 .* has the label 1; kind 'unlabelled' has none"):
        with_row(task, 1, label=1)
    with pytest.raises(ValueError, match="no labels to score"):
        task.score("train", [0, 0])


def test_few_samples_follow_from_their_own_seed():
    task = classes()
    few = task.few_sample(100, seed=3)
    random.seed(0), np.random.seed(0)
    assert few.fingerprint == task.few_sample(100, seed=3).fingerprint != task.few_sample(100, seed=4).fingerprint
    rows = few.split("train")
    assert len(set(rows)) == 100 and few.split("validation") == task.split("validation") and len(task.split("train")) == N
    assert list(rows) == [row for row in task.split("train") if row in set(rows)]
    assert set(rows) < set(task.few_sample(500, seed=3).split("train"))
    counts = Counter(row.label for row in task.few_sample(1_000, seed=0).split("train"))
    assert all(abs(counts[label] - 1_000 / 3) < 50 for label in range(3))
    assert len(questions().few_sample(2, 0).split("train")) == 2
    for n in (1, N + 1):
        with pytest.raises(ValueError, match=f"n is {n}; it must be from 2 to the 2000 training examples"):
            task.few_sample(n, 0)


@pytest.mark.parametrize(("task", "num_labels"), [(classes(), 3), (choices(N), 4)])
def test_label_noise_is_uniform_over_the_other_labels(task, num_labels):
    noisy = task.label_noise(0.3, seed=1)
    pairs = Counter((before.label, after.label) for before, after in zip(task.split("train"), noisy.split("train"), strict=True))
    wrong = {pair: count for pair, count in pairs.items() if pair[0] != pair[1]}
    assert abs(sum(wrong.values()) / N - 0.3) < 0.04  # four standard deviations
    expected = 0.3 * N / num_labels / (num_labels - 1)
    assert len(wrong) == num_labels * (num_labels - 1)
    assert all(abs(count - expected) < 4.5 * expected**0.5 for count in wrong.values())
    assert [replace(row, label=0) for row in noisy.split("train")] == [replace(row, label=0) for row in task.split("train")]
    assert noisy.split("validation") == task.split("validation")


def test_label_noise_follows_from_its_own_seed_and_grows_with_the_rate():
    task = classes()
    some, more = task.label_noise(0.2, 5), task.label_noise(0.6, 5)
    random.seed(1), np.random.seed(1)
    assert some.fingerprint == task.label_noise(0.2, 5).fingerprint != task.label_noise(0.2, 6).fingerprint
    places = [
        {number for number, rows in enumerate(zip(task.split("train"), noisy.split("train"), strict=True)) if rows[0] != rows[1]}
        for noisy in (some, task.label_noise(0.2, 6))
    ]
    assert len(places[0] & places[1]) < 0.4 * len(places[0])  # a fifth, if the seeds choose independently
    assert task.label_noise(0.0, 5).fingerprint == task.fingerprint
    for clean, few, many in zip(task.split("train"), some.split("train"), more.split("train"), strict=True):
        assert few in (clean, many)
    assert all(a.label != b.label for a, b in zip(task.split("train"), task.label_noise(1, 5).split("train"), strict=True))


def test_label_noise_refuses_what_has_no_classes():
    for task, kind in ((values(), "regression"), (questions(), "question_answering")):
        with pytest.raises(ValueError, match=f"no classes among which another label could be drawn: its kind is '{kind}'"):
            task.label_noise(0.3, 0)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"rate is .* it must be a probability"):
            classes().label_noise(rate, 0)


def test_scores_of_every_kind():
    assert classes().score("validation", [0, 1, 2, 0, 1, 0]) == pytest.approx({"accuracy": 5 / 6, "f1_macro": (0.8 + 1 + 2 / 3) / 3})
    assert choices().score("validation", np.array([0, 1, 2, 3, 0, 1, 0, 0])) == {"accuracy": 6 / 8}
    assert values().score("validation", [1.0, 2.0, 3.0, 4.0, 100.0])["spearman"] == pytest.approx(1)
    assert questions().score("validation", ["Ada Byron", ""]) == {"token_f1": pytest.approx((2 / 3 + 1) / 2), "exact_match": 0.5}
    with pytest.raises(ValueError, match="5 predictions for the 6 examples of split 'validation'"):
        classes().score("validation", [0] * 5)


def test_grouped_rows_are_scored_together():
    rows = [LabelledExample("paragraph", f"answer {n}", n % 2, group=str(n // 2)) for n in range(6)]
    task = TaskDataset("toy", "classification", {"train": rows, "validation": rows}, ("f1", "group_exact_match"), ("False", "True"))
    assert task.score("validation", [0, 1, 1, 1, 0, 1]) == pytest.approx({"f1": 6 / 7, "group_exact_match": 2 / 3})
