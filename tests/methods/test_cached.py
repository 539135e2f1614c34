"""A teacher's answers as tensors of a cache and back: the loss of a batch is the one that the teacher itself gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastkd.methods.cached import CachedLesson, CacheForm, to_cache
from fastkd.methods.kd import KDOptions, KnowledgeDistillation
from fastkd.methods.stage_data import Sequences
from fastkd.methods.teaching import Lesson, TaughtBatch, Teacher
from fastkd.models.language_model import LanguageModel
from fastkd.models.teacher_cache import CachedTeacher, TeacherCache, write_header, write_shard
from fastkd.tasks.text import TextBatch, collate_text
from tests import tiny

ROWS = 90


def rows() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(5, ROWS, size) for size in (24, 7, 15, 3)]


def batch_of(numbers: list[int]) -> TextBatch:
    return collate_text([rows()[i] for i in numbers], pad_id=0, masking=None, generator=torch.Generator())


def models(**settings: object) -> tuple[LanguageModel, LanguageModel]:
    teacher = LanguageModel(tiny.llama(ROWS, seed=1, hidden_size=48, **settings)).eval().requires_grad_(False)
    return LanguageModel(tiny.llama(ROWS, seed=2)).eval(), teacher


def cache_of(folder, teacher: LanguageModel, form: CacheForm, *layers: int) -> CachedLesson:
    """Written in another order and other batches than it is read."""
    lesson = Lesson(words=slice(ROWS), layers=layers)
    shards = []
    for number, own in enumerate(([0, 1], [2, 3])):
        batch = batch_of(own)
        tensors = to_cache(Teacher(teacher, lesson)(batch), batch.attention_mask, form)
        shards.append(write_shard(folder, number, np.array(own), batch.attention_mask.sum(-1).numpy(), tensors))
    write_header(folder, {}, shards)
    return CachedLesson(TeacherCache(folder), lesson)


@pytest.mark.parametrize(
    ("form", "rtol"),
    [(CacheForm("dense", torch.float32), 1e-6), (CacheForm("dense"), 5e-3), (CacheForm("topk", torch.float32, ROWS, 2.0), 1e-5)],
    ids=["dense-float32", "dense-bfloat16", "topk-all"],
)
def test_the_loss_is_the_teachers(tmp_path, form, rtol):
    student, teacher = models()
    batch = batch_of([2, 0, 1])
    online = KnowledgeDistillation(student, teacher, KDOptions(), ROWS)
    denominator = online.weight(batch)
    expected = torch.autograd.grad(online(batch, denominator), student.head.weight)[0]
    cached = cache_of(tmp_path, teacher, form)
    tiny.save(tmp_path / "teacher", teacher.model, tiny.byte_level())
    offline = KnowledgeDistillation(student, CachedTeacher(str(tmp_path / "teacher"), tmp_path), KDOptions(), ROWS)
    taught = TaughtBatch(batch, cached([2, 0, 1], batch.input_ids.shape[1])).to("cpu")
    loss = offline(taught, offline.weight(taught))
    assert torch.allclose(loss, online(batch, denominator), rtol=rtol)
    found = torch.autograd.grad(loss, student.head.weight)[0]
    assert (found - expected).norm() <= 3 * rtol * expected.norm()


def test_dense_logits_are_the_models_less_the_largest_after_its_soft_cap(tmp_path):
    _, teacher = models()
    teacher.transform = type(teacher.transform)(scale=0.5, softcap=3.0)
    batch = batch_of([0, 1])
    tensors = to_cache(
        Teacher(teacher, Lesson(words=torch.tensor([8, 3, 60])))(batch), batch.attention_mask, CacheForm(dtype=torch.float32)
    )
    raw = teacher.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.attention_mask.bool()]
    logits = (3 * torch.tanh(raw * 0.5 / 3))[:, [8, 3, 60]]
    assert torch.allclose(tensors["token.logits"], logits - logits.amax(-1, keepdim=True), atol=1e-5)
    assert (tensors["token.logits"].amax(-1) == 0).all()


def test_topk_and_its_tail_are_the_tempered_distribution():
    _, teacher = models()
    batch = batch_of([0, 3])
    tensors = to_cache(
        Teacher(teacher, Lesson(words=slice(ROWS)))(batch), batch.attention_mask, CacheForm("topk", torch.float32, 4, 3.0)
    )
    logits = teacher.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.attention_mask.bool()]
    probabilities = (logits / 3).softmax(-1)
    largest, ids = probabilities.topk(4)
    assert torch.equal(tensors["token.topk_ids"].long(), ids)
    assert torch.allclose(tensors["token.topk_logprobs"].exp(), largest, atol=1e-6)
    assert torch.allclose(tensors["token.tail_logprob"].exp(), 1 - largest.sum(-1), atol=1e-5)


def test_states_come_back_in_float32_where_there_are_tokens(tmp_path):
    _, teacher = models()
    cached = cache_of(tmp_path, teacher, CacheForm(dtype=torch.bfloat16), 1, 2)
    batch = batch_of([3, 0])
    states = Teacher(teacher, Lesson(layers=(2,)))(batch).states
    found = cached([3, 0], batch.input_ids.shape[1]).to("cpu").states
    assert set(found) == {1, 2} and found[2].dtype == torch.float32
    tokens = batch.attention_mask.bool()
    assert torch.allclose(found[2][tokens], states[2][tokens].bfloat16().float(), rtol=1e-2, atol=1e-3)
    assert not found[2][~tokens].any()


def test_sequences_of_a_batch_are_filled_up_as_its_rows_are():
    sequences = Sequences(np.array([3, 4, 5, 6, 7, 8]), np.array([0, 3, 5, 6]))
    assert sequences.behind([1, 0]).tolist() == [3, 4, 3, 0, 1, 2]
    assert sequences.behind([1, 2]).tolist() == [3, 4, 5, 5]
    assert sequences.behind([2]).tolist() == [5]
