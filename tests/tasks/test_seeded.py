"""Choices by key: fixed for ever, uniform, and different for different keys."""

from fastkd.tasks.seeded import draw, shuffled


def test_draws_are_the_same_for_ever():
    # The first 53 bits of `printf 'noisy\0003\0007' | sha256sum`; another value would change every published subset.
    assert draw("noisy", 3, 7) == 1753007871682815 / 2**53


def test_draws_are_uniform_and_follow_the_whole_key():
    values = [draw("a", seed, number) for seed in range(10) for number in range(1_000)]
    assert len(set(values)) == len(values)
    assert min(values) >= 0 and max(values) < 1
    tenths = [sum(tenth / 10 <= value < (tenth + 1) / 10 for value in values) for tenth in range(10)]
    assert all(abs(count - 1_000) < 120 for count in tenths)  # four standard deviations
    assert draw("a", 1, 23) != draw("a", 12, 3)


def test_shuffled_is_a_permutation_by_the_key():
    items = [f"item {number}" for number in range(50)]
    once = shuffled(items, "key", 0)
    assert sorted(once) == sorted(items) and once != items
    assert once == shuffled(items, "key", 0) != shuffled(items, "key", 1)
    assert shuffled([], "key") == []
