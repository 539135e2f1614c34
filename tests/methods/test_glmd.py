"""GLMD's two losses against the closed formulas of the authors' code, and the traps found in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastkd.methods.glmd import GLMDOptions, TaskScores, WordPrediction
from fastkd.methods.kd import KDOptions, KnowledgeDistillation
from fastkd.models.language_model import LanguageModel
from fastkd.models.prune import prune_model
from fastkd.models.task_model import TaskModel
from fastkd.tasks.cloze import Example, collate
from fastkd.tasks.cloze_task import ClozeTask
from fastkd.tasks.text import Masking, TextBatch, collate_text
from fastkd.vocab.map import VocabMap
from tests import tiny
from tests.oracle import assert_close, wrong_gradients

ROWS, KEPT = 90, 40


def models(make=tiny.bert) -> tuple[LanguageModel, LanguageModel]:
    """A student on 40 of 90 ids, and a frozen teacher of another width and depth; both in float64."""
    teacher = LanguageModel(make(ROWS, seed=1, hidden_size=48, num_hidden_layers=3).double()).eval().requires_grad_(False)
    chosen = VocabMap.from_counts(torch.randperm(ROWS, generator=torch.Generator().manual_seed(3)), keep=KEPT, multiple_of=1)
    vocab_map = chosen.assign_stand_ins(teacher.head.weight)
    return LanguageModel(make(KEPT, seed=2).double(), vocab_map).eval(), teacher


def text_batch(causal: bool = False) -> TextBatch:
    """Rows of 24, 7 and 15 ids: more than half of the positions are pads."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(5, ROWS, size) for size in (24, 7, 15)]
    masking = None if causal else Masking(mask_id=4, special_ids=(0,), vocabulary=ROWS)
    return collate_text(rows, pad_id=0, masking=masking, generator=torch.Generator().manual_seed(0))


def choice_batch(causal: bool = False):
    """Two examples of 3 and 2 candidates: the second is filled with a copy of its candidate 0."""
    generator = np.random.default_rng(1)

    def example(lengths: list[int]) -> Example:
        sequences = tuple(generator.integers(5, ROWS, n).astype(np.int32) for n in lengths)
        positions = tuple((n - 3, n - 2) for n in lengths)
        targets = tuple(tuple(generator.integers(5, ROWS, 2).tolist()) for _ in lengths)
        return Example(sequences, positions, targets, label=0)

    return collate([example([9, 12, 11]), example([10, 8])], pad_id=0)


def closed_formula(student: LanguageModel, teacher: LanguageModel, batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Spec 1.2 step by step: logits times mask, teacher columns K, T^2 * mean over B * S of sum over V_k; and d/dz^s by its formula."""
    mask = batch.attention_mask[..., None].double()
    z_s = student.model(input_ids=student.id_to_slot[batch.input_ids], attention_mask=batch.attention_mask).logits * mask
    z_t = teacher.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits * mask
    a, b = z_s / temperature, z_t[..., student.vocab_map.kept_ids] / temperature
    kl = (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1)
    gradient = temperature * mask / kl.numel() * (a.softmax(-1) - b.softmax(-1))
    return temperature**2 * kl.mean(), gradient.detach()


@pytest.mark.parametrize("make", [tiny.bert, tiny.llama], ids=["encoder", "decoder"])
def test_paper_word_prediction_is_the_closed_formula(make):
    """With pads, T = 15 and a pruned vocabulary: the value, the gradient of every weight, and the head's from the formula of d/dz."""
    student, teacher = models(make)
    batch = text_batch(causal=make is tiny.llama)
    objective = WordPrediction(student, teacher, GLMDOptions(preset="paper"))
    loss = objective(batch, objective.weight(batch))
    parameters = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    expected, logit_gradient = closed_formula(student, teacher, batch, 15.0)
    truth = torch.autograd.grad(expected, list(parameters.values()), retain_graph=True, allow_unused=True)
    assert_close(loss, expected, 1e-9)
    scale = max(t.norm() for t in truth if t is not None)
    for name, gradient, true_gradient in zip(parameters, gradients, truth, strict=True):
        if true_gradient is not None and true_gradient.norm() > 1e-9 * scale:
            assert_close(gradient, true_gradient, 1e-9, name)
    hidden = student(batch.input_ids, batch.attention_mask, lambda h, w, b: h).detach()
    head = torch.nn.Parameter(student.head.weight.detach().clone())
    formula = torch.einsum("bsv,bsh->vh", logit_gradient, hidden)
    logits = torch.nn.functional.linear(hidden, head, student.head.bias) * batch.attention_mask[..., None]
    target = teacher(batch.input_ids, batch.attention_mask)[..., student.vocab_map.kept_ids] * batch.attention_mask[..., None]
    kl = torch.nn.functional.kl_div((logits / 15).log_softmax(-1), (target / 15).log_softmax(-1), log_target=True, reduction="none")
    assert_close(formula, torch.autograd.grad(225 * kl.sum(-1).mean(), head)[0], 1e-9)
    for what, wrong in wrong_gradients(formula).items():
        with pytest.raises(AssertionError):
            assert_close(wrong, formula, 1e-9, what)


def test_trap_1_pads_stay_in_the_papers_denominator():
    student, teacher = models()
    batch = text_batch()
    losses = {}
    for preset in ("paper", "strict"):
        objective = WordPrediction(student, teacher, GLMDOptions(preset=preset, temperature=2.0))
        losses[preset] = objective(batch, objective.weight(batch))
    tokens, positions = int(batch.attention_mask.sum()), batch.input_ids.numel()
    assert tokens == 46 and positions == 72
    assert_close(losses["paper"] * positions, losses["strict"] * tokens, 1e-12)


def test_trap_3_temperature_squared_is_on_the_divergence_and_never_on_task_scores():
    student, teacher = models()
    batch = text_batch()
    at = {t: WordPrediction(student, teacher, GLMDOptions(temperature=t))(batch, 1.0).item() for t in (16.0, 32.0)}
    assert at[32.0] == pytest.approx(at[16.0], rel=0.1)  # without T^2 it would fall to a quarter
    choices = choice_batch()
    task = ClozeTask(kind="choices", template="{text} {choice}", choices_column="c")
    scores = [TaskScores(student, teacher, GLMDOptions(temperature=t), task)(choices, 2.0).item() for t in (1.0, 15.0)]
    assert scores[0] == scores[1]


def test_trap_4_the_sum_over_the_vocabulary_is_not_divided_by_it():
    student, teacher = models()
    batch = text_batch()
    objective = WordPrediction(student, teacher, GLMDOptions(temperature=1.0))
    loss = objective(batch, objective.weight(batch))
    keep = batch.attention_mask.bool()
    log_q = student(batch.input_ids, batch.attention_mask)[keep].log_softmax(-1)
    log_p = teacher(batch.input_ids, batch.attention_mask)[keep][:, student.vocab_map.kept_ids].log_softmax(-1)
    batch_mean = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert_close(loss, batch_mean, 1e-12)


@pytest.mark.parametrize("mass", ["full", "slots"])
def test_the_teacher_may_speak_of_dropped_ids(mass):
    """full: KL over the kept ids of a p that sums to less than one; slots: every kept id is taught its stand-ins' mass too."""
    student, teacher = models()
    batch = text_batch()
    objective = WordPrediction(student, teacher, GLMDOptions(temperature=2.0, teacher_mass=mass))
    loss = objective(batch, objective.weight(batch))
    vocab_map = student.vocab_map
    keep = batch.attention_mask.bool()
    log_q = (student(batch.input_ids, batch.attention_mask)[keep] / 2).log_softmax(-1)
    p = (teacher(batch.input_ids, batch.attention_mask)[keep] / 2).softmax(-1)
    p = p[:, vocab_map.kept_ids] if mass == "full" else torch.zeros_like(log_q).index_add(1, vocab_map.id_to_slot, p)
    expected = 4 * (p * (p.log() - log_q)).sum(-1).mean()
    assert_close(loss, expected, 1e-9)
    assert_close(*(torch.autograd.grad(x, student.head.weight)[0] for x in (loss, expected)), 1e-9)
    plain = WordPrediction(student, teacher, GLMDOptions(temperature=2.0))
    assert abs(plain(batch, plain.weight(batch)) - loss) > 1e-3


@pytest.mark.parametrize("mass", ["renormalize", "full", "slots"])
def test_a_student_with_all_ids_has_none_that_are_dropped(mass):
    torch.manual_seed(3)
    student, teacher = LanguageModel(tiny.bert(ROWS).double()), models()[1]
    losses = []
    for options in (GLMDOptions(temperature=2.0, teacher_mass=mass), GLMDOptions(temperature=2.0)):
        objective = WordPrediction(student, teacher, options)
        losses.append(objective(text_batch(), 7.0))
    assert torch.equal(*losses)


def test_a_teacher_on_a_kept_vocabulary_teaches_its_own_ids_and_no_others():
    """Its rows are slots: they are found by its map, and not by the ids themselves."""
    student, teacher = models()
    small = prune_model(teacher.model, student.vocab_map).eval().requires_grad_(False)
    batch = text_batch()
    objective = WordPrediction(student, small, GLMDOptions(temperature=2.0))
    log_q, log_p = (
        (model(batch.input_ids, batch.attention_mask)[batch.attention_mask.bool()] / 2).log_softmax(-1) for model in (student, small)
    )
    assert_close(objective(batch, objective.weight(batch)), 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(), 1e-9)
    kept = student.vocab_map.num_kept
    with pytest.raises(ValueError, match=f"teacher keeps {kept} of {ROWS} ids, and the student compares others too"):
        WordPrediction(LanguageModel(tiny.bert(ROWS).double()), small, GLMDOptions())
    with pytest.raises(ValueError, match=f"teacher keeps {kept} of {ROWS} ids"):
        KnowledgeDistillation(student, small, KDOptions(), ROWS)


def task_scores(model: LanguageModel, batch) -> torch.Tensor:
    """Candidates' log-likelihoods from plain logits, one at a time."""
    log_q = model(batch.input_ids, batch.attention_mask).log_softmax(-1)
    targets = model.to_slots(batch.score_targets, ignore_index=-100)
    total = [
        sum(log_q[r, p, t] for p, t, m in zip(batch.score_positions[r], targets[r], batch.score_mask[r], strict=True) if m)
        for r in range(len(targets))
    ]
    return torch.stack(total).view(batch.choice_mask.shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["paper", "strict"])
def test_trap_7_padded_choices(preset):
    """paper: copies of candidate 0 enter both softmaxes and count as word-prediction rows; strict: they are in neither."""
    student, teacher = models()
    batch = choice_batch()
    assert batch.choice_mask.tolist() == [[True, True, True], [True, True, False]]
    task = ClozeTask(kind="choices", template="{text} {choice}", choices_column="c")
    options = GLMDOptions(preset=preset, temperature=2.0)
    objective = TaskScores(student, teacher, options, task)
    loss = objective(batch, objective.weight(batch))
    u_s, u_t = task_scores(student, batch), task_scores(teacher, batch)
    counts = [3, 3] if preset == "paper" else [3, 2]
    expected = -sum((u_t[n, :c].softmax(-1) * u_s[n, :c].log_softmax(-1)).sum() for n, c in enumerate(counts)) / 2
    assert_close(loss, expected, 1e-6)  # task scores are compared in float32
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, student.head.weight))

    words = WordPrediction(student, teacher, options)
    tokens = batch.attention_mask.sum(-1)
    assert words.weight(batch) == (batch.input_ids.numel() if preset == "paper" else float(tokens[:5].sum()))
    compared = words.mask(batch).sum(-1)
    assert torch.equal(compared[:5], tokens[:5])
    assert compared[5] == (tokens[5] if preset == "paper" else 0)


def test_verbalizer_scores_are_raw_logits_of_the_mapped_words():
    student, teacher = models()
    generator = np.random.default_rng(2)
    examples = [Example((generator.integers(5, ROWS, n).astype(np.int32),), ((p,),), ((),), label=1) for n, p in ((9, 4), (6, 2))]
    batch = collate(examples, pad_id=0)
    task = ClozeTask(kind="verbalizer", template="{text} {mask}", label_words=("a", "b", "c"))
    words = student.vocab_map.kept_ids[[7, 20, 31]]
    objective = TaskScores(student, teacher, GLMDOptions(), task, words)
    logits = student(batch.input_ids, batch.attention_mask)[[0, 1], [4, 2]]
    assert_close(objective.scores(student, batch), logits[:, student.vocab_map.id_to_slot[words]], 1e-12)
    target = teacher(batch.input_ids, batch.attention_mask)[[0, 1], [4, 2]][:, words]
    expected = -(target.softmax(-1) * objective.scores(student, batch).log_softmax(-1)).sum() / 2
    assert_close(objective(batch, 2.0), expected, 1e-6)


def test_length_penalty_divides_by_the_candidates_length():
    student, teacher = models()
    batch = choice_batch()
    plain, penalised = (
        TaskScores(
            student, teacher, GLMDOptions(), ClozeTask(kind="choices", template="{text} {choice}", choices_column="c", length_penalty=p)
        ).scores(student, batch)
        for p in (0.0, 1.0)
    )
    assert_close(penalised, plain / 2, 1e-12)


def test_classification_heads():
    from transformers import BertConfig, BertForSequenceClassification

    def classifier(seed: int) -> TaskModel:
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
        return TaskModel(BertForSequenceClassification(BertConfig(vocab_size=ROWS, **shape)).eval())

    student, teacher = classifier(0), classifier(1).eval().requires_grad_(False)
    examples = [Example((np.arange(5, end, dtype=np.int32),), ((),), ((),), label) for end, label in ((9, 0), (12, 2))]
    batch = collate(examples, pad_id=0)
    task = ClozeTask(kind="classification", template="{text}", labels=(0, 1, 2))
    objective = TaskScores(student, teacher, GLMDOptions(), task)
    u_s, u_t = student(batch), teacher(batch)
    assert_close(objective(batch, 2.0), -(u_t.softmax(-1) * u_s.log_softmax(-1)).sum() / 2, 1e-6)


def test_the_teacher_is_no_part_of_the_students_state_and_must_be_frozen():
    student, teacher = models()
    objective = WordPrediction(student, teacher, GLMDOptions())
    assert {n.removeprefix("student.") for n, _ in objective.named_parameters()} == {n for n, _ in student.named_parameters()}
    with pytest.raises(ValueError, match="must be frozen"):
        WordPrediction(student, LanguageModel(tiny.bert(ROWS)), GLMDOptions())
    with pytest.raises(ValueError, match="one object"):
        WordPrediction(teacher, teacher, GLMDOptions())


def test_micro_batches_add_up_to_the_whole_batch():
    """Rows of different length, split in any way: one denominator for all gives the big batch's gradient."""
    student, teacher = models()
    generator = np.random.default_rng(5)
    rows = [generator.integers(5, ROWS, size) for size in (24, 7, 15, 16)]
    objective = WordPrediction(student, teacher, GLMDOptions(temperature=2.0))

    def gradient(parts) -> torch.Tensor:
        batches = [collate_text([rows[i] for i in part], pad_id=0, masking=None, generator=torch.Generator()) for part in parts]
        denominator = sum(objective.weight(batch) for batch in batches)
        return torch.autograd.grad(sum(objective(batch, denominator) for batch in batches), student.head.weight)[0]

    whole = gradient([[0, 1, 2, 3]])
    assert_close(gradient([[0, 1], [2, 3]]), whole, 1e-9)
    assert_close(gradient([[0], [1], [2], [3]]), whole, 1e-9)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -2.0}, {"divergence": "kl"}, {"mask_probability": 1.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GLMDOptions(**options)
