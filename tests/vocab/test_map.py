import random
from pathlib import Path

import pytest
import torch

from fastkd.vocab.count import TokenCounts
from fastkd.vocab.map import VocabMap


def zipf_counts(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Frequencies with many ties and never-seen ids, in shuffled order."""
    ranks = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed)) + 1
    return (3 * num_tokens // ranks - 4).clamp_min(0)


def test_glmd_setting_keeps_15360_of_30524_tokens() -> None:
    counts = zipf_counts(30_524)
    protected = torch.randperm(30_524, generator=torch.Generator().manual_seed(2))[:35].tolist()
    vocab_map = VocabMap.from_counts(counts, keep=0.5, protected=protected, vocab_size=30_592)
    assert vocab_map.num_kept == 15_360
    assert vocab_map.vocab_size == 30_592

    by_frequency = sorted(range(30_524), key=lambda i: (-int(counts[i]), i))
    first = [i for i in by_frequency if i in set(protected)]
    rest = [i for i in by_frequency if i not in set(protected)]
    assert vocab_map.kept_ids.tolist() == (first + rest)[:15_360]
    assert torch.equal(vocab_map.id_to_slot[vocab_map.kept_ids], torch.arange(15_360))
    assert int((vocab_map.id_to_slot >= 0).sum()) == int(vocab_map.is_kept.sum()) == 15_360
    assert not vocab_map.is_kept[30_524:].any()


def test_order_is_protected_then_frequency_and_stable() -> None:
    counts = torch.tensor([5, 9, 5, 0, 9, 5, 0, 7])
    vocab_map = VocabMap.from_counts(counts, keep=6, protected=[6, 5, 3, 5], multiple_of=1)
    assert vocab_map.kept_ids.tolist() == [5, 3, 6, 1, 4, 7]
    assert vocab_map.id_to_slot.tolist() == [-1, 3, -1, 1, 4, 0, 2, 5]
    assert vocab_map.is_kept.tolist() == [False, True, False, True, True, True, True, True]


def test_token_counts_are_accepted() -> None:
    counts = TokenCounts(torch.tensor([1, 3, 2]), rows=1, corpus_fingerprint="c", tokenizer_fingerprint="t")
    vocab_map = VocabMap.from_counts(counts, keep=2, multiple_of=1)
    assert vocab_map.kept_ids.tolist() == [1, 2]
    assert counts.coverage(vocab_map.kept_ids) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("keep", "multiple_of", "expected"),
    [(0.5, 1, 50), (0.499, 1, 49), (0.5, 16, 64), (48, 16, 48), (49, 16, 64), (1, 1, 1), (0.001, 1, 1), (0.001, 8, 8)],
)
def test_number_kept(keep: float, multiple_of: int, expected: int) -> None:
    assert VocabMap.from_counts(zipf_counts(100), keep, multiple_of=multiple_of).num_kept == expected


@pytest.mark.parametrize("keep", [0.97, 100, 97, 10**9])
def test_all_tokens_are_kept_when_the_rounded_number_reaches_them(keep: float) -> None:
    counts = zipf_counts(100)
    vocab_map = VocabMap.from_counts(counts, keep, protected=[8], multiple_of=96, vocab_size=128)
    rest = [i for i in sorted(range(100), key=lambda i: (-int(counts[i]), i)) if i != 8]
    assert vocab_map.kept_ids.tolist() == [8, *rest]
    assert (vocab_map.id_to_slot[100:] == -1).all()


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.0, 1.5, float("nan"), float("inf"), True, "0.5", None])
def test_keep_out_of_range_is_refused(keep: object) -> None:
    with pytest.raises(ValueError, match=r"keep=.*ratio between 0 and 1.*keep=100"):
        VocabMap.from_counts(zipf_counts(100), keep)


def test_other_wrong_arguments_are_refused() -> None:
    counts = zipf_counts(100)
    with pytest.raises(ValueError, match="multiple_of must be at least 1, got 0"):
        VocabMap.from_counts(counts, 0.5, multiple_of=0)
    with pytest.raises(ValueError, match="protected names id 100; the ids that were counted are 0 to 99"):
        VocabMap.from_counts(counts, 0.5, protected=[100])
    with pytest.raises(ValueError, match="requires names id -1"):
        VocabMap.from_counts(counts, 0.5, requires={3: [-1]})
    with pytest.raises(ValueError, match=r"exclude names id 100"):
        VocabMap.from_counts(counts, 0.5, exclude=[100])
    for wrong in (counts.float(), counts[None], counts[:0], counts > 3):
        with pytest.raises(ValueError, match="counts must be TokenCounts or one integer per token"):
            VocabMap.from_counts(wrong, 0.5)
    with pytest.raises(ValueError, match=r"12 protected tokens need 12 .* room for 8; use keep=12 or more"):
        VocabMap.from_counts(counts, 8, protected=range(12), multiple_of=8)


def test_ids_without_a_row_are_dropped_unless_they_were_counted_or_protected() -> None:
    counts = zipf_counts(100)
    with pytest.raises(
        ValueError, match=rf"Id 99 was counted {int(counts[99])} times and vocab_size is 99: it has no row in the model"
    ):
        VocabMap.from_counts(counts, 0.5, vocab_size=99)
    counts[98:] = 0
    chosen = VocabMap.from_counts(counts, 1000, vocab_size=98)
    assert chosen.vocab_size == chosen.num_kept == 98
    with pytest.raises(ValueError, match="protected names id 99, which cannot be kept"):
        VocabMap.from_counts(counts, 0.5, vocab_size=98, protected=[99])


def test_excluded_ids_and_what_requires_them_are_not_kept() -> None:
    counts = torch.tensor([1, 9, 8, 7, 6, 5])
    chosen = VocabMap.from_counts(counts, 6, multiple_of=1, exclude=[1], requires={4: [5, 2], 2: [3, 1]})
    assert chosen.kept_ids.tolist() == [3, 5, 0] and chosen.vocab_size == 6  # 2 requires 1, and 4 requires 2
    assert VocabMap.from_counts(counts, 0.5, multiple_of=1, exclude=[0, 1]).kept_ids.tolist() == [2, 3]  # half of 4
    with pytest.raises(
        ValueError, match="protected names id 4, which cannot be kept: it has no row in the model, is excluded, or requires"
    ):
        VocabMap.from_counts(counts, 2, protected=[4], exclude=[1], requires={4: [5, 2], 2: [3, 1]})


def test_pinned_ids_have_their_slots() -> None:
    chosen = VocabMap.from_counts(torch.tensor([0, 1, 9, 8, 7, 6]), 4, protected=[0, 1], multiple_of=1)
    assert chosen.kept_ids.tolist() == [1, 0, 2, 3]
    pinned = chosen.pin({1: 1, 0: 0})
    assert pinned.kept_ids.tolist() == [0, 1, 2, 3] and pinned.id_to_slot.tolist() == [0, 1, 2, 3, -1, -1]
    assert chosen.pin({3: 0}).kept_ids.tolist() == [3, 0, 2, 1]
    with_stand_ins = chosen.assign_stand_ins(torch.eye(6)[[0, 1, 2, 3, 3, 1]])  # 4 reads as 3 and 5 as 1
    moved = with_stand_ins.pin({3: 0})
    assert moved.id_to_slot[4] == 0 == moved.id_to_slot[3]
    assert torch.equal(moved.decode_ids(moved.id_to_slot), with_stand_ins.decode_ids(with_stand_ins.id_to_slot))
    with pytest.raises(ValueError, match="pin names id 5, which is not kept; name it in protected"):
        chosen.pin({5: 0})
    with pytest.raises(ValueError, match="pin gives id 1 slot 4 of 4; keep more than 4 ids"):
        chosen.pin({1: 4})


def test_requires_takes_the_whole_group_or_skips_it() -> None:
    #                       0   1  2  3  4  5  6
    counts = torch.tensor([10, 9, 8, 3, 2, 1, 0])
    requires = {0: [5, 6], 1: [3], 3: [4]}
    kept = {number: VocabMap.from_counts(counts, number, multiple_of=1, requires=requires).kept_ids.tolist() for number in range(1, 8)}
    assert kept == {
        1: [2],  # 0 needs three places, 1 needs three (transitively 3 and 4)
        2: [2, 4],  # 3 needs two places, one is left
        3: [0, 5, 6],
        4: [0, 2, 5, 6],
        5: [0, 2, 4, 5, 6],
        6: [0, 1, 3, 4, 5, 6],
        7: [0, 1, 2, 3, 4, 5, 6],
    }


def test_what_protected_ids_require_is_kept_but_sorted_by_frequency() -> None:
    counts = torch.tensor([10, 9, 8, 3, 2, 1, 0])
    vocab_map = VocabMap.from_counts(counts, 4, protected=[6], multiple_of=1, requires={6: [3], 3: [5]})
    assert vocab_map.kept_ids.tolist() == [6, 0, 3, 5]
    with pytest.raises(ValueError, match=r"1 protected tokens need 3 .* room for 2; use keep=3 or more"):
        VocabMap.from_counts(counts, 2, protected=[6], multiple_of=1, requires={6: [3], 3: [5]})


@pytest.mark.parametrize("keep", range(20, 400, 31))
def test_requires_is_closed_and_full_for_merges(keep: int) -> None:
    generator = random.Random(keep)
    requires = {token: [generator.randrange(token), generator.randrange(token)] for token in range(20, 400)}
    counts = zipf_counts(400, seed=keep)
    vocab_map = VocabMap.from_counts(counts, keep, multiple_of=1, requires=requires)
    kept = set(vocab_map.kept_ids.tolist())
    assert len(kept) == keep
    assert all(parent in kept for token in kept for parent in requires.get(token, ()))
    frequencies = counts[vocab_map.kept_ids]
    assert torch.equal(frequencies, frequencies.sort(descending=True).values)


def test_a_cycle_in_requires_is_refused_when_it_cannot_be_kept() -> None:
    counts, requires = torch.tensor([3, 2, 1]), {1: [2], 2: [1]}
    assert VocabMap.from_counts(counts, 3, multiple_of=1, requires=requires).num_kept == 3
    with pytest.raises(ValueError, match="requires has a cycle"):
        VocabMap.from_counts(counts, 2, multiple_of=1, requires=requires)


def small_map() -> VocabMap:
    """Slots 0, 1, 2 = ids 4, 1, 3; ids 0, 2 and the padded 5 are dropped."""
    return VocabMap.from_counts(torch.tensor([1, 8, 0, 5, 2]), 3, protected=[4], multiple_of=1, vocab_size=6)


EMBEDDING = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 1.0], [3.0, 3.0], [0.0, 2.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("similarity", "slots"),
    [("dot", [2, 1, 2, 2, 0, 0]), ("cosine", [1, 1, 0, 2, 0, 0]), ("euclidean", [1, 1, 0, 2, 0, 1])],
)
def test_stand_ins(similarity: str, slots: list[int]) -> None:
    vocab_map = small_map()
    assigned = vocab_map.assign_stand_ins(EMBEDDING, similarity)
    assert assigned.id_to_slot.tolist() == slots
    assert torch.equal(assigned.kept_ids, vocab_map.kept_ids)
    assert torch.equal(assigned.is_kept, vocab_map.is_kept)
    assert vocab_map.id_to_slot.tolist() == [-1, 1, -1, 2, 0, -1], "the first map is left as it was"
    assert assigned.fingerprint != vocab_map.fingerprint
    again = assigned.assign_stand_ins(EMBEDDING, "dot")
    assert again.fingerprint == vocab_map.assign_stand_ins(EMBEDDING, "dot").fingerprint


def test_stand_ins_exclude_and_unk() -> None:
    vocab_map = small_map()
    assert vocab_map.assign_stand_ins(EMBEDDING, "dot", exclude=[3]).id_to_slot.tolist() == [1, 1, 0, 2, 0, 0]
    assert vocab_map.assign_stand_ins(EMBEDDING, "dot", exclude=[4, 3, 0]).id_to_slot.tolist() == [1, 1, 1, 2, 0, 1]
    assert vocab_map.assign_stand_ins(None, "unk", unk_id=3).id_to_slot.tolist() == [2, 1, 2, 2, 0, 2]


def test_wrong_stand_in_arguments_are_refused() -> None:
    vocab_map = small_map()
    for unk_id in (None, 0, 6, -1):
        with pytest.raises(ValueError, match=f"needs a kept id as unk_id, got {unk_id}"):
            vocab_map.assign_stand_ins(EMBEDDING, "unk", unk_id=unk_id)
    with pytest.raises(ValueError, match=r"similarity must be .* got 'l2'"):
        vocab_map.assign_stand_ins(EMBEDDING, "l2")
    with pytest.raises(ValueError, match=r"one row for each of the 6 ids of the map, got \(5, 2\)"):
        vocab_map.assign_stand_ins(EMBEDDING[:5])
    with pytest.raises(ValueError, match="one row for each of the 6 ids of the map, got None"):
        vocab_map.assign_stand_ins(None)
    with pytest.raises(ValueError, match="exclude names every kept id"):
        vocab_map.assign_stand_ins(EMBEDDING, exclude=range(6))


def test_map_and_decode_ids_of_any_shape() -> None:
    vocab_map = small_map().assign_stand_ins(EMBEDDING)
    ids = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [1, 1]]], dtype=torch.int32)
    slots = vocab_map.map_ids(ids)
    assert slots.tolist() == [[[2, 1], [2, 2]], [[0, 0], [1, 1]]] and slots.dtype == torch.int64
    assert vocab_map.decode_ids(slots).tolist() == [[[3, 1], [3, 3]], [[4, 4], [1, 1]]]
    assert vocab_map.map_ids(torch.tensor(3)).item() == 2
    assert vocab_map.map_ids(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4)
    every_slot = torch.arange(3)
    assert torch.equal(vocab_map.map_ids(vocab_map.decode_ids(every_slot)), every_slot)


def test_ignore_index_passes_through() -> None:
    vocab_map = small_map().assign_stand_ins(EMBEDDING)
    labels = torch.tensor([[-100, 0], [3, -100]])
    assert vocab_map.map_ids(labels, ignore_index=-100).tolist() == [[-100, 2], [2, -100]]
    assert labels.tolist() == [[-100, 0], [3, -100]]
    with pytest.raises(ValueError, match=r"got -1 at position \(1, 0\)"):
        vocab_map.map_ids(torch.tensor([[-100, 0], [-1, 3]]), ignore_index=-100)


def test_wrong_ids_are_refused() -> None:
    vocab_map = small_map()
    with pytest.raises(ValueError, match="3 dropped ids have no stand-in yet; call assign_stand_ins"):
        vocab_map.map_ids(torch.tensor([1]))
    assert vocab_map.decode_ids(torch.tensor([1])).item() == 1
    vocab_map = vocab_map.assign_stand_ins(EMBEDDING)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 6\), got 6 at position \(0, 1\)\."):
        vocab_map.map_ids(torch.tensor([[1, 6], [7, 1]]))
    with pytest.raises(ValueError, match=r"got -100 at position \(2,\); labels .* need ignore_index"):
        vocab_map.map_ids(torch.tensor([1, 2, -100]))
    with pytest.raises(ValueError, match=r"slots must lie in \[0, 3\), got 3 at position \(1,\)\."):
        vocab_map.decode_ids(torch.tensor([2, 3]))
    for wrong in (torch.tensor([1.0]), torch.tensor([True])):
        with pytest.raises(TypeError, match="ids must be integers"):
            vocab_map.map_ids(wrong)
    with pytest.raises(ValueError, match=r"ids are on meta and the map on cpu; move it with VocabMap\.to"):
        vocab_map.map_ids(torch.zeros(2, dtype=torch.int64, device="meta"))


def test_identity() -> None:
    vocab_map = VocabMap.identity(7)
    ids = torch.tensor([[6, 0, 3]])
    assert torch.equal(vocab_map.map_ids(ids), ids) and torch.equal(vocab_map.decode_ids(ids), ids)
    assert vocab_map.is_kept.all() and vocab_map.num_kept == vocab_map.vocab_size == 7


@pytest.mark.parametrize(
    ("kept_ids", "id_to_slot"),
    [([1, 1], [-1, 1, -1]), ([1, 3], [-1, 0, -1]), ([1, 2], [-1, 1, 0]), ([1], [1, 0, 0]), ([1], [-2, 0, 0])],
)
def test_tensors_that_do_not_belong_together_are_refused(kept_ids: list[int], id_to_slot: list[int]) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        VocabMap(torch.tensor(kept_ids), torch.tensor(id_to_slot))
    with pytest.raises(ValueError, match="kept_ids must be a non-empty int64 tensor"):
        VocabMap(torch.tensor(kept_ids, dtype=torch.int32), torch.tensor(id_to_slot))


@pytest.mark.parametrize("with_stand_ins", [False, True])
def test_save_and_load(tmp_path: Path, with_stand_ins: bool) -> None:
    vocab_map = small_map().assign_stand_ins(EMBEDDING) if with_stand_ins else small_map()
    vocab_map.save(tmp_path)
    loaded = VocabMap.load(tmp_path)
    assert torch.equal(loaded.kept_ids, vocab_map.kept_ids) and torch.equal(loaded.id_to_slot, vocab_map.id_to_slot)
    assert loaded.fingerprint == vocab_map.fingerprint
    assert loaded.has_stand_ins == with_stand_ins

    [tensors_file] = tmp_path.glob("*.safetensors")
    data = tensors_file.read_bytes()
    tensors_file.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    with pytest.raises(ValueError, match="was changed after it was written: its sha256 is"):
        VocabMap.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no vocab_map in"):
        VocabMap.load(tmp_path / "elsewhere")


def test_fingerprint_depends_on_both_tensors() -> None:
    maps = [small_map(), VocabMap.identity(6), VocabMap.identity(7)]
    maps += [small_map().assign_stand_ins(EMBEDDING, similarity) for similarity in ("dot", "cosine", "euclidean")]
    assert len({vocab_map.fingerprint for vocab_map in maps}) == len(maps)
    assert small_map().fingerprint == small_map().fingerprint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_nothing_waits_for_the_device() -> None:
    vocab_map = small_map().assign_stand_ins(EMBEDDING.cuda()).to("cuda")
    labels = torch.tensor([-100, 0, 5, 3], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        slots = vocab_map.map_ids(labels, ignore_index=-100)
        ids = vocab_map.decode_ids(slots[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert slots.tolist() == [-100, 2, 0, 2] and ids.tolist() == [3, 4, 3]


def test_the_vocabulary_of_a_draft_goes_there_and_back():
    """Two formats that vLLM's speculators and SpecForge store: a mask over the target's ids, offsets from the draft's."""
    t2d = torch.tensor([True, False, False, True, True, False, True])
    d2t = torch.tensor([0, 2, 2, 3])  # 0 -> 0, 1 -> 3, 2 -> 4, 3 -> 6
    for vocab_map in (VocabMap.from_t2d(t2d), VocabMap.from_d2t(d2t, 7), VocabMap.from_d2t(d2t.int(), 7)):
        assert vocab_map.kept_ids.tolist() == [0, 3, 4, 6]
        assert vocab_map.id_to_slot.tolist() == [0, -1, -1, 1, 2, -1, 3]
        assert torch.equal(vocab_map.is_kept, t2d) and torch.equal(vocab_map.d2t, d2t)
    mixed = VocabMap.from_counts(torch.tensor([3, 9, 1, 7]), keep=3, multiple_of=1)
    assert torch.equal(VocabMap.from_d2t(mixed.d2t, 4).kept_ids, mixed.kept_ids)


def test_the_vocabulary_of_a_draft_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"t2d has shape .* give a bool for each id"):
        VocabMap.from_t2d(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"d2t has shape .* give an integer for each id"):
        VocabMap.from_d2t(torch.tensor([0.0, 1.0]), 7)
    with pytest.raises(ValueError, match="d2t leads to ids from 0 to 7, and the target has 7"):
        VocabMap.from_d2t(torch.tensor([0, 6]), 7)
    with pytest.raises(ValueError, match="do not belong together"):
        VocabMap.from_d2t(torch.tensor([1, 0]), 7)
    with pytest.raises(ValueError, match="non-empty"):
        VocabMap.from_t2d(torch.zeros(4, dtype=torch.bool))
