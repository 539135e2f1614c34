"""Layer maps: what a setting means, and what is refused before anything runs."""

from __future__ import annotations

import pytest

from fastkd.models.layer_map import intervals, layer_map


@pytest.mark.parametrize(
    ("setting", "embeddings", "pairs"),
    [
        ("last", False, ((3, 12),)),
        ("last", True, ((3, 12),)),
        ("uniform", False, ((1, 4), (2, 8), (3, 12))),
        ("uniform", True, ((0, 0), (1, 4), (2, 8), (3, 12))),
        ([[3, 12], (1, 5)], False, ((3, 12), (1, 5))),
        ([[0, 0], [1, 12], [1, 11]], True, ((0, 0), (1, 12), (1, 11))),
    ],
)
def test_settings(setting, embeddings, pairs):
    assert layer_map(setting, 3, 12, embeddings=embeddings) == pairs


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("first", ValueError, "'first' is not known"),
        ([], ValueError, "empty"),
        ([[0, 1]], ValueError, r"student layer 0; the student's are 1 to 3"),
        ([[4, 1]], ValueError, "student layer 4"),
        ([[3, 13]], ValueError, r"teacher layer 13; the teacher's are 1 to 12"),
        ([[3, 12], [1, 4], [3, 12]], ValueError, r"\[\(3, 12\)\] given more than once"),
        ([3, 12], TypeError, "3 is not a pair"),
        (["12", [1, 1]], TypeError, "'12' is not a pair"),
        ([[1, 2, 3]], TypeError, "not a pair"),
        ([[1, 2.0]], TypeError, "not a pair"),
        ([[True, 2]], TypeError, "not a pair"),
    ],
)
def test_refused_settings(setting, error, message):
    with pytest.raises(error, match=message):
        layer_map(setting, 3, 12)


def test_uniform_needs_whole_steps():
    with pytest.raises(ValueError, match="12 teacher layers are no multiple of 5 student layers"):
        layer_map("uniform", 5, 12)
    with pytest.raises(ValueError, match="6 teacher layers are no multiple of 12"):
        layer_map("uniform", 12, 6)


@pytest.mark.parametrize(
    ("layers", "steps", "pairs"),
    [
        ((6, 12), (1, 2), tuple((k, 2 * k) for k in range(1, 7))),
        ((6, 12), (2, 4), ((2, 4), (4, 8), (6, 12))),
        ((12, 12), (1, 1), tuple((k, k) for k in range(1, 13))),
        ((7, 7), (2, 2), ((2, 2), (4, 4), (6, 6))),
        ((7, 12), (2, 4), ((2, 4), (4, 8), (6, 12))),
        ((3, 12), (3, 12), ((3, 12),)),
    ],
)
def test_intervals(layers, steps, pairs):
    assert intervals(*layers, *steps) == pairs


def test_refused_intervals():
    with pytest.raises(ValueError, match="makes 6 filters on 6 student layers, and teacher_filter_interval=1 makes 12 on 12"):
        intervals(6, 12, 1, 1)
    with pytest.raises(ValueError, match="filter_interval=0"):
        intervals(6, 12, 0, 2)
    with pytest.raises(ValueError, match="teacher_filter_interval=13: the model has 12 layers"):
        intervals(6, 12, 6, 13)
