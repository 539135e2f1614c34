"""The chunk planner: covers every row once, keeps the budget, never depends on V / H."""

from __future__ import annotations

import pytest

from fastkd.ops.plan import CPU_BUDGET, KNEE_ROWS, plan_chunks


@pytest.mark.parametrize("tokens", [0, 1, 127, 512, 4096, 5000, 99_999])
@pytest.mark.parametrize("vocabulary", [2, 4096, 30_522, 128_256, 1_000_000])
def test_every_row_once(tokens, vocabulary):
    plan = plan_chunks(tokens, vocabulary)
    assert [row for chunk in plan.slices() for row in range(chunk.start, chunk.stop)] == list(range(tokens))
    parts = [part for chunk in plan.slices() for part in plan.parts(chunk)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(tokens))
    assert max((part.stop - part.start for part in parts), default=0) <= plan.teacher_rows
    assert len(list(plan.slices())) == plan.chunks
    assert plan.buffer_bytes <= max(CPU_BUDGET, KNEE_ROWS * 8 * vocabulary)


def test_a_given_budget_is_kept():
    for budget in (1, 10_000, 10_000_000):
        plan = plan_chunks(4096, 1000, memory_budget=budget)
        assert plan.buffer_bytes <= max(budget, 8 * 1000)


def test_chunks_are_equalised():
    plan = plan_chunks(4100, 30_522)
    sizes = [chunk.stop - chunk.start for chunk in plan.slices()]
    assert min(sizes) > 0.5 * max(sizes)


def test_chunk_size_decides_alone():
    assert plan_chunks(100, 1000, chunk_size=7).chunk_rows == 7
    assert plan_chunks(100, 1000, chunk_size=700).chunk_rows == 100


def test_float64_and_a_lone_student_count():
    assert KNEE_ROWS <= plan_chunks(10**6, 30_522, element_size=8).chunk_rows < plan_chunks(10**6, 30_522).chunk_rows
    assert plan_chunks(10**6, 30_522, has_teacher=False).chunk_rows > plan_chunks(10**6, 30_522).chunk_rows


def test_it_prints():
    assert str(plan_chunks(4096, 30_522)) == (
        "4096 tokens x 30522 vocabulary in 6 chunk(s) of 683 rows: 159.0 MiB of logits alive instead of 953.8 MiB"
    )


def test_the_teacher_comes_in_parts_where_two_chunks_at_the_knee_do_not_fit():
    small, large = plan_chunks(4096, 30_522), plan_chunks(4096, 262_144)
    assert small.teacher_rows == small.chunk_rows
    assert (large.chunk_rows, large.teacher_rows) == (KNEE_ROWS, KNEE_ROWS // 4)
    assert plan_chunks(4096, 1000, memory_budget=10_000).teacher_rows == 1
