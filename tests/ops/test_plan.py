"""The chunk planner: covers every row once, keeps the budget, never depends on V / H."""

from __future__ import annotations

import pytest

from fastkd.ops import plan as plan_module
from fastkd.ops.plan import CPU_BUDGET, KNEE_TOKENS, plan_chunks


@pytest.mark.parametrize("tokens", [0, 1, 127, 512, 4096, 5000, 99_999])
@pytest.mark.parametrize("vocabulary", [2, 4096, 30_522, 128_256, 1_000_000])
def test_every_row_once(tokens, vocabulary):
    plan = plan_chunks(tokens, vocabulary)
    chunks = list(plan.backward_chunks())
    forward = [part for chunk in chunks for part in plan.forward_parts(chunk)]
    teacher = [part for chunk in forward for part in plan.teacher_parts(chunk)]
    for slices, most in ((chunks, plan.backward_tokens), (forward, plan.forward_tokens), (teacher, plan.teacher_tokens)):
        assert [token for part in slices for token in range(part.start, part.stop)] == list(range(tokens))
        assert max((part.stop - part.start for part in slices), default=0) <= most
    assert len(chunks) == plan.chunks
    assert plan.buffer_bytes <= max(CPU_BUDGET, KNEE_TOKENS * 8 * vocabulary)


def test_a_given_budget_is_kept():
    for budget in (1, 10_000, 10_000_000):
        plan = plan_chunks(4096, 1000, memory_budget=budget)
        assert plan.buffer_bytes <= max(budget, 8 * 1000)


def test_chunks_are_equalised():
    plan = plan_chunks(4100, 30_522)
    sizes = [chunk.stop - chunk.start for chunk in plan.backward_chunks()]
    assert min(sizes) > 0.5 * max(sizes)


def test_chunk_size_decides_alone():
    assert plan_chunks(100, 1000, chunk_size=7).backward_tokens == 7
    assert plan_chunks(100, 1000, chunk_size=700).backward_tokens == 100


def test_float64_and_a_lone_student_count():
    assert KNEE_TOKENS <= plan_chunks(10**6, 30_522, element_size=8).backward_tokens < plan_chunks(10**6, 30_522).backward_tokens
    assert plan_chunks(10**6, 30_522, has_teacher=False).backward_tokens > plan_chunks(10**6, 30_522).backward_tokens


def test_it_prints():
    assert str(plan_chunks(4096, 30_522)) == (
        "4096 tokens x 30522 vocabulary in 6 chunk(s) of 683 tokens: 159.0 MiB alive instead of 953.8 MiB"
    )


def test_the_teacher_comes_in_parts_where_two_chunks_at_the_knee_do_not_fit():
    small, large = plan_chunks(4096, 30_522), plan_chunks(4096, 262_144)
    assert small.teacher_tokens == small.backward_tokens
    assert (large.backward_tokens, large.teacher_tokens) == (KNEE_TOKENS, KNEE_TOKENS // 4)
    assert plan_chunks(4096, 1000, memory_budget=10_000).teacher_tokens == 1


GPU_PLANS = {
    "one chunk of 128256": (8192, 128_256, 2048, (8192, 256)),
    "128256 under a narrow head": (8192, 128_256, 896, (2816, 256)),
    "many tokens": (32_768, 128_256, 2048, (3072, 256)),
    "151936": (8192, 151_936, 2048, (2048, 256)),
    "262144": (8192, 262_144, 2048, (1024, 256)),
    "BERT": (8192, 30_522, 384, (8192, 256)),
}


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(plan_module, "default_budget", lambda device: 1 << 30)


@pytest.mark.parametrize(("tokens", "vocabulary", "width", "expected"), GPU_PLANS.values(), ids=GPU_PLANS)
def test_a_gpus_parts_fill_the_tiles_of_its_products(h200, tokens, vocabulary, width, expected):
    """Multiples of 256; one backward chunk where its 16-bit gradient takes no more than the budget and a float32 dW."""
    plan = plan_chunks(tokens, vocabulary, device="cuda", gradient_size=2, hidden_size=width)
    assert (plan.backward_tokens, plan.forward_tokens) == expected
    assert plan.forward_tokens == plan.teacher_tokens and not plan.in_place
    assert plan.buffer_bytes == 8 * plan.forward_tokens * vocabulary + 2 * plan.backward_tokens * vocabulary
    assert plan.buffer_bytes <= ((1 << 30) if plan.chunks > 1 else 2.3 * 2**30)


def test_a_tight_gpu_takes_one_tile(h200):
    plan = plan_chunks(4096, 262_144, device="cuda", gradient_size=2, memory_budget=300 << 20)
    assert (plan.forward_tokens, plan.backward_tokens) == (128, 86) or plan.buffer_bytes <= 300 << 20
