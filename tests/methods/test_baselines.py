"""Hard labels, plain KD over the whole vocabulary, and perplexity over mapped tokens."""

from __future__ import annotations

import math

import pytest
import torch

from fastkd.methods.kd import KDOptions, KnowledgeDistillation
from fastkd.methods.language_modeling import LanguageModeling
from fastkd.methods.perplexity import perplexity
from tests import tiny
from tests.methods.test_glmd import ROWS, models, text_batch
from tests.oracle import assert_close


@pytest.mark.parametrize("make", [tiny.bert, tiny.llama], ids=["encoder", "decoder"])
def test_language_modelling_is_cross_entropy_of_mapped_labels(make):
    student, _ = models(make)
    batch = text_batch(causal=make is tiny.llama)
    objective = LanguageModeling(student)
    labels = student.to_slots(batch.labels, ignore_index=-100)
    logits = student(batch.input_ids, batch.attention_mask)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert_close(objective(batch, objective.weight(batch)), expected, 1e-9)


def test_plain_kd_runs_over_every_id_of_the_teacher():
    """Each dropped id has its stand-in's logit (output mode A of the authors' code), labels are the original ids."""
    student, teacher = models(tiny.llama)
    batch = text_batch(causal=True)
    objective = KnowledgeDistillation(student, teacher, KDOptions(temperature=2.0, label_weight=0.7), ROWS)
    loss = objective(batch, objective.weight(batch))
    mask = batch.attention_mask.bool()
    z_s = student(batch.input_ids, batch.attention_mask)[..., student.vocab_map.id_to_slot]
    z_t = teacher(batch.input_ids, batch.attention_mask)
    log_q, log_p = (z_s / 2)[mask].log_softmax(-1), (z_t / 2)[mask].log_softmax(-1)
    kd = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected = kd + 0.7 * torch.nn.functional.cross_entropy(z_s.flatten(0, 1), batch.labels.flatten())
    assert_close(loss, expected, 1e-9)
    gradient, truth = (torch.autograd.grad(x, student.head.weight, retain_graph=True)[0] for x in (loss, expected))
    assert_close(gradient, truth, 1e-9)


def test_perplexity_counts_the_same_event_for_all():
    """The teacher's probability of a slot is the sum over its ids; so is that of a student trained over all ids."""
    student, teacher = models(tiny.llama)
    batch = text_batch(causal=True)
    predicted = batch.labels != -100
    slots = student.id_to_slot[batch.labels[predicted]]
    membership = torch.nn.functional.one_hot(student.id_to_slot, student.vocabulary).double()

    def expected(model, columns=None) -> float:
        logits = model(batch.input_ids, batch.attention_mask)[predicted]
        probability = logits.softmax(-1) if columns is None else logits[:, columns].softmax(-1)
        if probability.shape[1] == ROWS:
            probability = probability @ membership
        return math.exp(-probability.gather(1, slots[:, None]).log().mean())

    assert perplexity(student, [batch]) == pytest.approx(expected(student), rel=1e-6)
    assert perplexity(teacher, [batch], fold=student.vocab_map) == pytest.approx(expected(teacher), rel=1e-6)
    KnowledgeDistillation(student, teacher, KDOptions(), ROWS)  # which makes the student answer for all ids
    mode_a = expected(student, student.id_to_slot)
    assert perplexity(student, [batch]) == pytest.approx(mode_a, rel=1e-6)


def test_perplexity_of_kept_tokens_alone():
    """Only labels that are kept, every model's distribution renormalised over the kept ids."""
    student, teacher = models(tiny.llama)
    batch, vocab_map = text_batch(causal=True), student.vocab_map
    predicted = (batch.labels != -100) & vocab_map.is_kept[batch.labels.clamp_min(0)]
    slots = vocab_map.id_to_slot[batch.labels[predicted]]
    for model, columns in ((student, slice(None)), (teacher, vocab_map.kept_ids)):
        log_q = model(batch.input_ids, batch.attention_mask)[predicted][:, columns].log_softmax(-1)
        expected = math.exp(-log_q.gather(1, slots[:, None]).mean())
        assert perplexity(model, [batch], kept_only=vocab_map) == pytest.approx(expected, rel=1e-6)


def test_perplexity_leaves_the_model_as_it_was():
    student, _ = models(tiny.llama)
    student.train()
    perplexity(student, [text_batch(causal=True)])
    assert student.training
