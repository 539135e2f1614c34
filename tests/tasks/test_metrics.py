"""The metrics against values worked out by hand, and against scikit-learn and SciPy."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from fastkd.tasks.metrics import (
    _ranks,
    accuracy,
    calibration_error,
    exact_match,
    f1,
    f1_macro,
    group_exact_match,
    matthews,
    pearson,
    spearman,
    token_f1,
)

# Three classes; confusion matrix (true rows, predicted columns): [[2, 1, 0], [0, 1, 1], [1, 0, 2]].
LABELS = [0, 0, 0, 1, 1, 2, 2, 2]
PREDICTIONS = [0, 0, 1, 1, 2, 2, 2, 0]


def test_three_classes_by_hand():
    assert accuracy(PREDICTIONS, LABELS) == 5 / 8
    # F1 of each class is 2 TP / (predicted + true): 4/6, 2/4, 4/6.
    assert f1_macro(PREDICTIONS, LABELS) == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3, rel=1e-12)
    # c N - p.t = 5*8 - (3*3 + 2*2 + 3*3) = 18; N^2 - p.p = N^2 - t.t = 64 - 22 = 42.
    assert matthews(PREDICTIONS, LABELS) == pytest.approx(18 / 42, rel=1e-12)


def test_binary_matthews_is_the_textbook_formula():
    labels, predictions = [1] * 6 + [0] * 4, [1, 1, 1, 1, 1, 0, 1, 0, 0, 0]  # TP 5, FN 1, FP 1, TN 3
    assert matthews(predictions, labels) == pytest.approx((5 * 3 - 1 * 1) / math.sqrt(6 * 6 * 4 * 4), rel=1e-12)


def test_f1_skips_classes_that_never_occur_and_counts_missed_ones_as_zero():
    assert f1_macro([0, 0, 5, 5], [0, 0, 5, 5]) == 1.0
    # Class 1 is never predicted (F1 0); class 0 has precision 1/2, recall 1 (F1 2/3).
    assert f1_macro([0, 0], [0, 1]) == pytest.approx(1 / 3, rel=1e-12)


def test_matthews_at_its_ends():
    assert matthews([0, 1, 0, 1], [0, 1, 0, 1]) == pytest.approx(1.0)
    assert matthews([1, 0, 1, 0], [0, 1, 0, 1]) == pytest.approx(-1.0)
    assert matthews([1, 1, 1], [0, 1, 1]) == 0.0
    assert matthews([0, 1, 1], [1, 1, 1]) == 0.0


def test_large_counts_do_not_overflow():
    labels = np.arange(200_000) % 2
    assert matthews(labels, labels) == pytest.approx(1.0)
    assert accuracy(labels, labels) == 1.0


@pytest.mark.parametrize("metric", [accuracy, f1, f1_macro, matthews])
def test_wrong_arguments_are_refused(metric):
    with pytest.raises(ValueError, match=r"predictions \(2,\) and labels \(3,\)"):
        metric([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="one length above 0"):
        metric([], [])
    with pytest.raises(ValueError, match="1-D"):
        metric([[0, 1]], [[0, 1]])
    with pytest.raises(TypeError, match=r"predictions.*float64.*argmax"):
        metric([0.2, 0.8], [0, 1])
    with pytest.raises(ValueError, match=r"labels hold -1.*unlabeled"):
        metric([0, 1], [0, -1])


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_classes_score_as_scikit_learn_has_it(classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=200)
    predictions = np.where(rng.random(200) < 0.6, labels, rng.integers(classes, size=200))
    check_against_scikit_learn(predictions, labels)


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([1, 1, 1], [0, 1, 1]),  # constant predictions
        ([0, 0, 0], [0, 1, 1]),
        ([0, 1, 1], [1, 1, 1]),  # one class among the labels
        ([0, 0], [0, 0]),  # and nothing else anywhere
        ([1, 1], [1, 1]),
        ([0, 0], [1, 1]),
        ([1], [1]),
        ([2, 0, 2], [0, 2, 2]),  # a class that never occurs
    ],
)
@pytest.mark.filterwarnings("ignore:.*(single label|ill-defined)")
def test_degenerate_classes_score_as_scikit_learn_has_it(predictions, labels):
    check_against_scikit_learn(predictions, labels)


def check_against_scikit_learn(predictions, labels):
    assert accuracy(predictions, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions), abs=1e-12)
    assert f1_macro(predictions, labels) == pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="macro"), abs=1e-12)
    assert matthews(predictions, labels) == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predictions), abs=1e-12)
    if max(*predictions, *labels) < 2:
        assert f1(predictions, labels) == pytest.approx(sklearn.metrics.f1_score(labels, predictions), abs=1e-12)
    else:
        with pytest.raises(ValueError, match=r"hold class \d, and f1 is for classes 0 and 1; use f1_macro"):
            f1(predictions, labels)


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
@pytest.mark.parametrize("seed", range(5))
def test_correlations_as_scipy_has_them(seed, scale):
    rng = np.random.default_rng(seed)
    labels = np.round(rng.uniform(0, 5, 150), 1)  # ties, as in STS-B
    predictions = np.round(labels + rng.normal(0, 2, 150)) * (-1) ** seed
    assert pearson(predictions * scale, labels) == pytest.approx(scipy.stats.pearsonr(predictions, labels).statistic, abs=1e-12)
    assert spearman(predictions * scale, labels) == pytest.approx(scipy.stats.spearmanr(predictions, labels).statistic, abs=1e-12)
    assert np.array_equal(_ranks(labels), scipy.stats.rankdata(labels))


def test_correlations_at_their_ends():
    labels = [0.0, 1.0, 5.0]
    assert [pearson(labels, labels), pearson([1, 3, 11], labels), spearman([-5, 3, 4], labels)] == pytest.approx([1, 1, 1])
    assert [pearson([0, -1, -5], labels), spearman([3, 2, 1], labels)] == pytest.approx([-1, -1])
    assert spearman([1, 100, 10_000], labels) == pytest.approx(1) and 0.9 < pearson([1, 100, 10_000], labels) < 0.99
    # A collapsed student scores 0 as in matthews; scipy gives nan.
    assert pearson([2.5] * 3, labels) == spearman([2.5] * 3, labels) == 0.0
    assert pearson(np.full(3, 3.1, dtype=np.float32), labels) == 0.0


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_wrong_values_are_refused(metric):
    with pytest.raises(ValueError, match=r"labels are all 3\.0"):
        metric([1.0, 2.0], [3.0, 3.0])
    with pytest.raises(ValueError, match="labels are all"):
        metric([1.0], [3.0])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="predictions hold a value that is not finite"):
            metric([1.0, bad], [3.0, 4.0])
    with pytest.raises(TypeError, match="labels must be real numbers"):
        metric([1.0, 2.0], ["3", "4"])
    for predictions, labels in (([], []), ([1.0], [1.0, 2.0]), ([[1.0], [2.0]], [[1.0], [2.0]])):
        with pytest.raises(ValueError, match="two 1-D sequences of one length above 0"):
            metric(predictions, labels)


def test_groups_are_right_only_as_a_whole():
    groups = ["p", "p", "q", "q", "r"]
    assert group_exact_match([1, 0, 1, 1, 0], [1, 0, 1, 0, 0], groups) == pytest.approx(2 / 3)
    assert group_exact_match([0, 1, 0, 0, 1], [1, 0, 1, 1, 0], groups) == 0.0
    with pytest.raises(ValueError, match="groups has 2 entries for 3 predictions"):
        group_exact_match([0, 1, 1], [0, 1, 1], ["p", "q"])


@pytest.mark.parametrize(
    ("predicted", "answers", "exact", "words"),
    [
        ("Ada Lovelace", ["Ada Lovelace"], 1, 1),
        ("the  ada-lovelace!", ["An AdaLovelace"], 1, 1),  # punctuation goes without leaving a space
        ("Ada", ["Ada Lovelace"], 0, 2 / 3),
        ("Countess Ada", ["Ada Lovelace", "Ada Byron King", "countess"], 0, 2 / 3),
        ("to be or not to be", ["to be"], 0, 2 * 2 / (6 + 2)),  # bags: "to" counts twice only where both have it twice
        ("to to", ["to be to"], 0, 2 * 2 / (2 + 3)),
        ("cat", ["dog"], 0, 0),
        ("", [], 1, 1),  # rightly unanswered
        ("a", [], 1, 1),  # an article alone says nothing
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("", ["the", "cat"], 0, 0),  # right answers without words are passed over, as SQuAD's script does
        ("theory", ["ory"], 0, 0),
    ],
)
def test_answers_score_as_squad_has_it(predicted, answers, exact, words):
    assert exact_match([predicted], [answers]) == exact
    assert token_f1([predicted], [answers]) == pytest.approx(words, rel=1e-12)


def test_answers_are_averaged_over_questions():
    assert exact_match(["x", "y", "z"], [["x"], ["x"], ["z"]]) == pytest.approx(2 / 3)
    assert token_f1(["x y", "y"], [["x"], ["x"]]) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("metric", [exact_match, token_f1])
def test_wrong_answers_are_refused(metric):
    with pytest.raises(ValueError, match="1 predictions and answers to 2 questions"):
        metric(["x"], [["x"], ["y"]])
    with pytest.raises(ValueError, match="at least one"):
        metric([], [])
    with pytest.raises(TypeError, match="answers 'x': a text and a list"):
        metric(["x"], ["x"])
    with pytest.raises(TypeError, match="prediction 3"):
        metric([3], [["x"]])


def test_calibration_error_by_hand():
    """Five bins: (0, 0.2] with 0, 0.2 and 0.2, (0.4, 0.6] with 0.55, (0.8, 1] with 0.9 and 1."""
    confidences, is_right = [0.2, 0.55, 0.9, 1.0, 0.2, 0.0], [True, True, True, False, False, False]
    # Gaps: |1/3 - 0.4/3| of three rows, |1 - 0.55| of one, |1/2 - 0.95| of two.
    assert calibration_error(confidences, is_right, bins=5) == pytest.approx((0.6 + 0.45 + 0.9) / 6, rel=1e-12)
    assert calibration_error(confidences, is_right, bins=1) == pytest.approx(abs(3 - 2.85) / 6, rel=1e-12)


def test_calibration_error_at_its_ends():
    assert calibration_error([1.0, 1.0, 0.0], [True, True, False]) == 0.0
    assert calibration_error([1.0, 1.0], [False, False]) == 1.0
    # Every upper edge is in its own bin, k / 15 with k right of 15: perfectly calibrated in each bin, and in no other grouping.
    edges = np.repeat(np.arange(1, 16) / 15, 15)
    assert calibration_error(edges, np.tile(np.arange(15), 15) < np.repeat(np.arange(1, 16), 15)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (([0.5, 1.2], [True, False]), ValueError, r"confidences go from 0\.5 to 1\.2"),
        (([0.5, math.nan], [True, False]), ValueError, "must be probabilities"),
        (([0.5], [1]), TypeError, "is_right must hold booleans, but holds int64"),
        (([0.5], [True, False]), ValueError, r"confidences \(1,\) and is_right \(2,\)"),
        (([0.5], [True], 0), ValueError, "bins is 0"),
    ],
)
def test_what_calibration_error_refuses(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        calibration_error(*arguments)
