"""Scores of tasks: classes, values, and the texts of answers.

Written once in numpy and plain Python; every score is a plain float. Classes are 1-D integer array-likes of equal length,
values 1-D real ones, answers sequences of text.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

CALIBRATION_BINS = 15
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows whose prediction equals the label: `1/N sum_n [y_n == t_n]`, in [0, 1]."""
    counts = _confusion(predictions, labels)
    return float(np.trace(counts) / counts.sum())


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """`2 TP / (2 TP + FP + FN)` of class 1 of two, in [0, 1]; 0 when no row is, and none is predicted to be, of class 1."""
    counts = _confusion(predictions, labels)
    if len(counts) > 2:
        raise ValueError(f"predictions and labels hold class {len(counts) - 1}, and f1 is for classes 0 and 1; use f1_macro.")
    if len(counts) < 2:
        return 0.0
    return float(2 * counts[1, 1] / (counts[1].sum() + counts[:, 1].sum()))


def f1_macro(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Unweighted mean over classes of `F1_k = 2 TP_k / (2 TP_k + FP_k + FN_k)`, in [0, 1].

    The mean runs over the classes seen among labels or predictions, as scikit-learn's `f1_score(average="macro")` does.
    """
    counts = _confusion(predictions, labels)
    seen = counts.sum(axis=0) + counts.sum(axis=1)  # 2 TP_k + FP_k + FN_k
    return float(np.mean(2 * np.diag(counts)[seen > 0] / seen[seen > 0]))


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation coefficient in its form for K classes (Gorodkin 2004, R_K), in [-1, 1].

    `(c N - sum_k p_k t_k) / sqrt((N^2 - sum_k p_k^2) (N^2 - sum_k t_k^2))` with c correct rows out of N and class k predicted
    p_k times, true t_k times. It is 0 when all predictions, or all labels, are one class.
    """
    counts = _confusion(predictions, labels).astype(np.float64)
    true, predicted, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    covariance = np.trace(counts) * total - predicted @ true
    variance = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return float(covariance / np.sqrt(variance)) if variance > 0 else 0.0


def group_exact_match(predictions: ArrayLike, labels: ArrayLike, groups: Sequence[str]) -> float:
    """Share of groups all of whose rows are predicted right, in [0, 1]: MultiRC's exact match, a group a question."""
    _confusion(predictions, labels)
    right = np.asarray(predictions) == np.asarray(labels)
    if len(groups) != right.size:
        raise ValueError(f"groups has {len(groups)} entries for {right.size} predictions; name the group of each.")
    wrong_groups = {group for group, is_right in zip(groups, right, strict=True) if not is_right}
    return 1 - len(wrong_groups) / len(set(groups))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation `cov(y, t) / (std(y) std(t))`, in [-1, 1].

    It is 0, as `matthews` is, when all predictions are one value (SciPy gives nan): such a model tells nothing, and its
    evaluation must not end a run. Labels that are all one value are refused.
    """
    return _correlation(*_values(predictions, labels))


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """`pearson` of the ranks, in [-1, 1]; equal values share the mean of their ranks."""
    predicted, true = _values(predictions, labels)
    return _correlation(_ranks(predicted), _ranks(true))


def calibration_error(confidences: ArrayLike, is_right: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error, in [0, 1]: how far a model's confidence is from its accuracy (Guo et al. 2017, arXiv:1706.04599).

    `ECE = sum_m |B_m| / N |accuracy(B_m) - confidence(B_m)|`: row n is in bin `B_m`, of `bins` equally wide ones, if its confidence is
    in `((m - 1) / bins, m / bins]`; 0 is in the first. Guo et al. use 15 bins.

    Args:
        confidences: Probability of what is predicted, one a row, in [0, 1].
        is_right: Whether that is the label, one a row.
    """
    confidence, right = _same_length(confidences, is_right, names=("confidences", "is_right"))
    if right.dtype != np.bool_:
        raise TypeError(f"is_right must hold booleans, but holds {right.dtype}; compare predictions with labels first.")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidences go from {confidence.min()} to {confidence.max()}; they must be probabilities, from 0 to 1.")
    if bins < 1:
        raise ValueError(f"bins is {bins}; there must be at least one.")
    # An upper edge belongs to the bin below it; k / bins is the same number here as for whoever compares with it.
    bin_of = np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    surplus = np.bincount(bin_of, weights=right - confidence.astype(np.float64), minlength=bins)
    return float(np.abs(surplus).sum() / confidence.size)


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Share of questions whose predicted text is one of the right ones, in [0, 1], as SQuAD counts it.

    Case, punctuation, the articles a, an and the, and the amount of white space do not matter. A question without right
    answers is answered by "".
    """
    return _best_answers(predictions, answers, lambda predicted, right: float(predicted == right))


def token_f1(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Mean over questions of the best F1 between the predicted words and those of a right answer, in [0, 1], as SQuAD has it.

    Words are compared as in `exact_match`, as bags: `2 common / (predicted + right)`. Where either has no words, F1 is 1 if
    neither has and else 0.
    """
    return _best_answers(predictions, answers, _word_f1)


def _confusion(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(K, K) int64: how often class `row` was predicted as class `column`."""
    predicted, true = _same_length(predictions, labels)
    for name, values in (("predictions", predicted), ("labels", true)):
        if not np.issubdtype(values.dtype, np.integer):
            raise TypeError(f"{name} must be integer class indices, but hold {values.dtype}; take the argmax of scores first.")
        if values.min() < 0:
            raise ValueError(f"{name} hold {values.min()}: negative marks an unlabeled row; leave those out of the score.")
    classes = int(max(predicted.max(), true.max())) + 1
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def _values(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, if there is a correlation to speak of."""
    predicted, true = _same_length(predictions, labels)
    for name, values in (("predictions", predicted), ("labels", true)):
        if values.dtype.kind not in "iuf":
            raise TypeError(f"{name} must be real numbers, but hold {values.dtype}.")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} hold a value that is not finite, and nothing correlates with it.")
    if (true == true[0]).all():
        raise ValueError(f"labels are all {true[0]}, and nothing correlates with a constant; a correlation needs two values or more.")
    return predicted.astype(np.float64), true.astype(np.float64)


def _same_length(
    predictions: ArrayLike, labels: ArrayLike, names: tuple[str, str] = ("predictions", "labels")
) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(predictions), np.asarray(labels)
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise ValueError(f"{names[0]} {first.shape} and {names[1]} {second.shape} must be two 1-D sequences of one length above 0.")
    return first, second


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if (first == first[0]).all():
        return 0.0
    first, second = (values / np.abs(values).max() for values in (first - first.mean(), second - second.mean()))  # no overflow
    return float(np.clip(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)), -1, 1))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on in ascending order; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _best_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]], score: Callable[[str, str], float]) -> float:
    """Mean over questions of the best `score` of the prediction against a right answer, both normalised."""
    if len(predictions) != len(answers) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions and answers to {len(answers)} questions; give one for each, and at least one."
        )
    best = 0.0
    for predicted, texts in zip(predictions, answers, strict=True):
        if not isinstance(predicted, str) or isinstance(texts, str):
            raise TypeError(f"prediction {predicted!r} with answers {texts!r}: a text and a list of texts are needed.")
        rights = [right for text in texts if (right := _normalised(text))] or [""]
        best += max(score(_normalised(predicted), right) for right in rights)
    return best / len(predictions)


def _normalised(text: str) -> str:
    """SQuAD's: lower case, then without punctuation, then without articles, then single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _word_f1(predicted: str, right: str) -> float:
    first, second = Counter(predicted.split()), Counter(right.split())
    if not first or not second:
        return float(first == second)
    return 2 * (first & second).total() / (first.total() + second.total())
