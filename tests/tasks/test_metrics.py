"""The metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from fastkd.tasks.metrics import accuracy, f1_macro, matthews

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


@pytest.mark.parametrize("metric", [accuracy, f1_macro, matthews])
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
