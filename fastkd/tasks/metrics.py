"""Floor 1: the scores of classification and choice tasks, from predicted and true class indices.

Written once in numpy; predictions and labels are 1-D integer array-likes of equal length, and every score is a plain float.
"""

import numpy as np
from numpy.typing import ArrayLike


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows whose prediction equals the label: `1/N sum_n [y_n == t_n]`, in [0, 1]."""
    counts = _confusion(predictions, labels)
    return float(np.trace(counts) / counts.sum())


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


def _confusion(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(K, K) int64: how often class `row` was predicted as class `column`."""
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != true.shape or predicted.size == 0:
        raise ValueError(f"predictions {predicted.shape} and labels {true.shape} must be two 1-D sequences of one length above 0.")
    for name, values in (("predictions", predicted), ("labels", true)):
        if not np.issubdtype(values.dtype, np.integer):
            raise TypeError(f"{name} must be integer class indices, but hold {values.dtype}; take the argmax of scores first.")
        if values.min() < 0:
            raise ValueError(f"{name} hold {values.min()}: negative marks an unlabeled row; leave those out of the score.")
    classes = int(max(predicted.max(), true.max())) + 1
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)
