import itertools

import numpy as np
import pytest
import torch

from fastkd.train.batches import BatchOrder, counter_generator, counter_torch_generator, total_steps

LENGTHS = np.random.Generator(np.random.PCG64(0)).integers(1, 257, size=1003)


def epoch(order, number=0):
    first = number * order.batches_per_epoch
    return [order.batch(index) for index in range(first, first + order.batches_per_epoch)]


def padded_fraction(batches):
    padded = sum(len(rows) * LENGTHS[rows].max() for rows in batches)
    return 1 - sum(LENGTHS[rows].sum() for rows in batches) / padded


@pytest.mark.parametrize(("bucket", "shuffle"), itertools.product([True, False], repeat=2))
@pytest.mark.parametrize("batch_size", [1, 4, 16, 1003, 5000])
def test_every_epoch_visits_every_row_once(bucket, shuffle, batch_size):
    order = BatchOrder(LENGTHS, batch_size, seed=1, bucket=bucket, shuffle=shuffle)
    for number in range(2):
        batches = epoch(order, number)
        assert len(batches) == -(-len(LENGTHS) // batch_size)
        assert sorted(np.concatenate(batches)) == list(range(len(LENGTHS)))
        assert sorted(len(rows) for rows in batches)[1:] == [batch_size] * (len(batches) - 1)


def test_bucketing_pads_much_less():
    with_buckets = padded_fraction(epoch(BatchOrder(LENGTHS, 8, seed=1)))
    without = padded_fraction(epoch(BatchOrder(LENGTHS, 8, seed=1, bucket=False)))
    assert without > 0.3
    assert with_buckets < 0.05


def test_order_does_not_depend_on_how_it_is_asked():
    straight = BatchOrder(LENGTHS, 8, seed=1)
    expected = [straight.batch(index) for index in range(3 * straight.batches_per_epoch)]
    asked = np.random.Generator(np.random.PCG64(1)).permutation(len(expected))[:100]
    jumping = BatchOrder(LENGTHS, 8, seed=1)
    for index in asked:
        rows = jumping.batch(index)
        assert np.array_equal(rows, expected[index])
        rows[:] = -1  # the caller's own copy


def test_epochs_and_seeds_differ():
    order = BatchOrder(LENGTHS, 8, seed=1)
    first, second, other = epoch(order, 0), epoch(order, 1), epoch(BatchOrder(LENGTHS, 8, seed=2), 0)
    for another in (second, other):
        assert not np.array_equal(np.concatenate(first), np.concatenate(another))
    assert {tuple(sorted(rows)) for rows in first} != {tuple(sorted(rows)) for rows in second}


def test_batches_do_not_come_sorted_by_length():
    longest = [LENGTHS[rows].max() for rows in epoch(BatchOrder(LENGTHS, 8, seed=1))]
    steps_up = np.mean(np.diff(longest) > 0)
    assert 0.3 < steps_up < 0.7


def test_without_shuffle_or_buckets_rows_come_as_given():
    order = BatchOrder(LENGTHS, 10, seed=1, bucket=False, shuffle=False)
    assert np.array_equal(np.concatenate(epoch(order, 3)), np.arange(len(LENGTHS)))


def test_without_shuffle_buckets_only_sort_inside_windows():
    order = BatchOrder(LENGTHS, 4, seed=1, shuffle=False)
    rows = np.concatenate(epoch(order))
    assert sorted(rows[:256]) == list(range(256)) and np.all(np.diff(LENGTHS[rows[:256]]) >= 0)


def test_drop_last_leaves_out_rows_of_any_length():
    order = BatchOrder(LENGTHS, 8, seed=1, drop_last=True)
    assert order.batches_per_epoch == 125
    left_out = set()
    for number in range(20):
        batches = epoch(order, number)
        assert all(len(rows) == 8 for rows in batches)
        seen = set(np.concatenate(batches))
        assert len(seen) == 1000
        left_out |= set(range(len(LENGTHS))) - seen
    assert len(left_out) > 40 and np.median(LENGTHS[sorted(left_out)]) < 200


def test_the_rows_of_the_first_batches_are_those_that_come_first():
    order = BatchOrder(LENGTHS, 8, seed=1)
    for count in (1, 7, order.batches_per_epoch - 1):
        expected = sorted(np.concatenate([order.batch(index) for index in range(count)]))
        assert order.rows_of_first(count).tolist() == expected and len(expected) < len(LENGTHS)
    for count in (order.batches_per_epoch, 10 * order.batches_per_epoch):
        assert np.array_equal(order.rows_of_first(count), np.arange(len(LENGTHS)))


def test_steps_are_those_asked_for_or_those_of_the_epochs():
    assert total_steps(7, 3.0, 100, 4) == 7
    assert total_steps(-1, 3.0, 103, 4) == 75 and total_steps(-1, 0.5, 103, 4) == 13 and total_steps(-1, 2.0, 3, 4) == 2


def test_order_is_the_same_on_every_machine():
    lengths = np.array([5, 1, 4, 2, 3, 9, 8])
    order = BatchOrder(lengths, 3, seed=7)
    assert [order.batch(index).tolist() for index in range(3)] == [[1, 3, 4], [5], [2, 0, 6]]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="lengths"):
        BatchOrder(np.empty(0), 1, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        BatchOrder(LENGTHS, 0, seed=0)
    with pytest.raises(ValueError, match="drop_last"):
        BatchOrder(LENGTHS[:3], 4, seed=0, drop_last=True)
    with pytest.raises(IndexError, match="index=-1"):
        BatchOrder(LENGTHS, 4, seed=0).batch(-1)


def test_counter_generators_depend_on_every_key():
    assert counter_generator(1, 2).random() == counter_generator(np.int64(1), 2).random()
    keys = [(0,), (0, 0), (0, 0, 0), (1, 0), (0, 1), (12, 3), (1, 23), (2**32,), (2**32, 5), (0, 1 + 5 * 2**32), (-1,)]
    assert len({counter_generator(*key).random() for key in keys}) == len(keys)
    assert len({torch.rand((), generator=counter_torch_generator(*key)).item() for key in keys}) == len(keys)
    draws = [torch.randperm(50, generator=counter_torch_generator(3, 4)) for _ in range(2)]
    assert torch.equal(*draws)


def test_counter_streams_are_the_same_on_every_machine():
    assert counter_generator(1, 2, 3).bit_generator.random_raw(2).tolist() == [9622254806622438221, 15539916634956716561]


def test_global_generators_are_neither_read_nor_moved():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = counter_generator(1).random(), torch.rand(3, generator=counter_torch_generator(1))
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    torch.manual_seed(1)
    assert counter_generator(1).random() == first[0]
    assert torch.equal(torch.rand(3, generator=counter_torch_generator(1)), first[1])
