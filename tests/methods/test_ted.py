"""TED's stages against eager formulas in float64, and the traps found in the authors' code."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastkd.methods.finetune import FineTuning
from fastkd.methods.language_modeling import LanguageModeling
from fastkd.methods.ted import FilterTraining, TaskAwareDistillation, TEDOptions
from fastkd.models.filters import FilterBank
from fastkd.models.language_model import LanguageModel
from fastkd.models.task_model import TaskHead, TaskModel, build_task_model
from fastkd.tasks.encoded import TaskBatch
from fastkd.tasks.text import TextBatch, shifted
from fastkd.vocab.map import VocabMap
from tests import tiny
from tests.oracle import assert_close, wrong_gradients

IDS, KEPT, EXACT = 60, 25, 1e-10
HEADS = {
    "classification": TaskHead("classification", 3),
    "decoder": TaskHead("classification", 3),
    "regression": TaskHead("regression", 1),
    "multiple_choice": TaskHead("multiple_choice", 1),
    "question_answering": TaskHead("question_answering", 2),
}
TEXT = ("masked", "causal", "mapped")
CASES = (*HEADS, *TEXT)
# Student layers 1 and 2 of 2 learn from teacher layers 2 and 4 of 4.
HALF: dict[str, Any] = {"teacher_filter_interval": 2}


def model(case: str, seed: int, **shape: int) -> Any:
    decoder = case in ("decoder", "causal", "mapped")
    make = tiny.llama if decoder else tiny.bert
    if case in HEADS:
        head = build_task_model(make(IDS, **shape).config, HEADS[case], seed=seed, pad_id=0)
        return TaskModel(head.model.double().eval(), head.kind)
    if case == "mapped" and "num_hidden_layers" not in shape:
        counts = torch.randperm(IDS, generator=torch.Generator().manual_seed(3))
        teacher_rows = tiny.llama(IDS).get_output_embeddings().weight
        vocab_map = VocabMap.from_counts(counts, keep=KEPT, multiple_of=1).assign_stand_ins(teacher_rows)
        return LanguageModel(make(KEPT, seed=seed, **shape).double(), vocab_map)
    return LanguageModel(make(IDS, seed=seed, **shape).double())


def models(case: str) -> tuple[Any, Any]:
    """A student, and a frozen teacher of another width and depth."""
    teacher = model(case, 1, hidden_size=48, num_hidden_layers=4)
    return model(case, 2).eval(), teacher.eval().requires_grad_(False)


def make_batch(case: str, first: int = 0, end: int = 6) -> Any:
    """Rows `first` to `end` of six (examples, or two examples of three choices) of 3 to 8 tokens; a third of the positions are pads."""
    generator = torch.Generator().manual_seed(7)
    mask = (torch.arange(8) < torch.tensor([8, 3, 5, 7, 4, 6])[:, None]).long()
    ids, rows = torch.randint(5, IDS, mask.shape, generator=generator) * mask, slice(first, end)
    if case in TEXT:
        labels = torch.where(torch.rand(mask.shape, generator=generator) < 0.4, ids, -100).masked_fill(mask == 0, -100)
        return TextBatch(ids[rows], mask[rows], labels[rows])
    labels = {
        "regression": torch.randn(6, generator=generator),
        "multiple_choice": torch.tensor([2, 0]),
        "question_answering": torch.tensor([[1, 3], [0, 0], [2, 4], [6, 6], [0, 2], [1, 5]]),
    }.get(case, torch.tensor([0, 2, 1, 1, 0, 2]))
    choices = 3 if case == "multiple_choice" else 1
    types = None if case == "decoder" else (ids[rows] % 2) * mask[rows]
    return TaskBatch(ids[rows], mask[rows], types, labels[first // choices : end // choices], choices)


def banks(student: Any, teacher: Any, folder: Any, nonlinear: bool = False, width: int | None = None) -> dict[str, Any]:
    """Filters with weights of order one, as stage I would have left them."""
    made = {}
    for role, of, layers in (("student", student, (1, 2)), ("teacher", teacher, (2, 4))):
        generator = torch.Generator().manual_seed(len(role))
        bank = FilterBank.of(of, layers, generator, filter_width=width or teacher.model.config.hidden_size, nonlinear=nonlinear)
        for p in bank.parameters():
            torch.nn.init.normal_(p, std=0.3, generator=generator)
        made[f"{role}_filters"] = folder / role
        bank.save(folder / role)
    return made


def states_and_output(wrapped: Any, batch: Any) -> tuple[dict[int, Tensor], Any]:
    """Every layer's own output, before any final norm, and the model's output."""
    states: dict[int, Tensor] = {}
    base = wrapped.model.base_model
    layers = base.layers if hasattr(base, "layers") else base.encoder.layer
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, n=number: states.__setitem__(n, out if isinstance(out, Tensor) else out[0]))
        for number, layer in enumerate(layers, 1)
    ]
    ids = batch.input_ids if wrapped.vocab_map is None else wrapped.id_to_slot[batch.input_ids]
    types = getattr(batch, "token_type_ids", None)
    extra = {} if types is None else {"token_type_ids": types}
    output = wrapped.model(input_ids=ids, attention_mask=batch.attention_mask, **extra)
    for hook in hooks:
        hook.remove()
    return states, output


def filtered(bank: FilterBank, k: int, state: Tensor) -> Tensor:
    weights = dict(bank.named_parameters())
    if bank.shape.nonlinear:
        activation = functional.gelu if bank.shape.activation == "gelu" else functional.silu
        state = activation(functional.linear(state, weights[f"first.{k}.0.weight"], weights[f"first.{k}.0.bias"]))
    return functional.linear(state, weights[f"last.{k}.weight"], weights[f"last.{k}.bias"])


def task_loss(case: str, logits: Tensor, batch: Any, slots: Any = None) -> Tensor:
    """The task's own loss of raw logits: (R, C), (B, S, 2) for questions, (B, S, V) for text."""
    labels = batch.labels
    if case in TEXT:
        labels = labels if slots is None else torch.where(labels < 0, labels, slots[labels.clamp_min(0)])
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if case == "regression":
        return functional.mse_loss(logits[:, 0], labels.double())
    if case == "question_answering":
        return (functional.cross_entropy(logits[..., 0], labels[:, 0]) + functional.cross_entropy(logits[..., 1], labels[:, 1])) / 2
    return functional.cross_entropy(logits.view(len(labels), -1), labels)


def compare_gradients(loss: Tensor, expected: Tensor, named: dict[str, Tensor]) -> None:
    """Value and every gradient; those that are rounding noise around zero (key biases) are compared with the largest."""
    assert_close(loss, expected, EXACT)
    ours, truths = (torch.autograd.grad(x, list(named.values()), allow_unused=True, materialize_grads=True) for x in (loss, expected))
    scale = max(float(t.norm()) for t in truths)
    assert scale > 0
    for name, gradient, truth in zip(named, ours, truths, strict=True):
        if truth.norm() > 1e-9 * scale:
            assert_close(gradient, truth, EXACT, name)
        else:
            assert gradient.norm() < 1e-8 * scale, name
    largest = max(truths, key=lambda truth: float(truth.norm()) * (len(truth) > 1))
    for what, wrong in wrong_gradients(largest).items():
        with pytest.raises(AssertionError):
            assert_close(wrong, largest, EXACT, what)


@pytest.mark.parametrize("nonlinear", [False, True], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("case", CASES)
def test_stage_one_is_the_mean_of_every_filters_own_task_loss(case, nonlinear):
    """On layers 2 and 4 of the teacher: filters and heads over whole states, and full logits."""
    _, teacher = models(case)
    options = TEDOptions(**HALF, filter_nonlinear=nonlinear, filter_output_dim=20)
    objective = FilterTraining(teacher, options, role="teacher", seed=0).eval()
    for p in (*objective.filters.parameters(), *objective.heads.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    batch = make_batch(case)
    with torch.no_grad():
        states, _ = states_and_output(teacher, batch)
    losses = []
    for k, layer in enumerate((2, 4)):
        head, seen = objective.heads[k], filtered(objective.filters, k, states[layer])
        if case in HEADS and case != "question_answering":
            last = batch.attention_mask.sum(1) - 1 if case == "decoder" else torch.zeros(6, dtype=torch.int64)
            activation = functional.silu if case == "decoder" else functional.gelu
            pooled = activation(functional.linear(seen[range(6), last], head.dense.weight, head.dense.bias))
            logits = functional.linear(pooled, head.classifier.weight, head.classifier.bias)
        else:
            logits = functional.linear(seen, head.weight, head.bias)
        if case in TEXT:
            logits = functional.linear(logits, teacher.head.weight, teacher.head.bias)
        losses.append(task_loss(case, logits, batch))
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert all(name.startswith(("filters.", "heads.")) for name in trained)
    compare_gradients(objective(batch, objective.weight(batch)), (losses[0] + losses[1]) / 2, trained)


def stage_two(case: str, student: Any, teacher: Any, batch: Any, options: TEDOptions, ours: Any, theirs: Any) -> Tensor:
    """Spec 1.3, eagerly: L + kl_alpha * KL + mse_alpha * MSE; options are resolved. theirs None: the teacher's states as they are."""
    t, mask = options.temperature, batch.attention_mask.bool()
    states, output = states_and_output(student, batch)
    with torch.no_grad():
        teacher_states, teacher_output = states_and_output(teacher, batch)

    def kl(teacher_logits: Tensor, logits: Tensor) -> Tensor:
        return t**2 * functional.kl_div(
            (logits / t).log_softmax(-1), (teacher_logits / t).log_softmax(-1), log_target=True, reduction="sum"
        )

    if case == "question_answering":
        z_s, z_t = (torch.stack([o.start_logits, o.end_logits], -1) for o in (output, teacher_output))
        kept = mask if options.padding == "exclude" else torch.ones_like(mask)
        divergence = sum(kl(z_t[b, kept[b], i], z_s[b, kept[b], i]) for b in range(len(mask)) for i in (0, 1)) / (2 * len(mask))
    else:
        z_s, z_t = output.logits, teacher_output.logits
        if case in TEXT:
            z_t = z_t if student.vocab_map is None else z_t[..., student.vocab_map.kept_ids]
            divergence = kl(z_t[mask], z_s[mask]) / mask.sum()
        elif case == "regression":
            rank = kl(z_t.squeeze(-1), z_s.squeeze(-1)) / len(mask)
            divergence = {"mse": functional.mse_loss(z_s, z_t), "batch_softmax": rank, "none": 0.0}[options.regression_kd]
        else:
            examples = len(batch.labels)
            divergence = kl(z_t.view(examples, -1), z_s.view(examples, -1)) / examples
    loss = task_loss(case, z_s, batch, getattr(student, "id_to_slot", None)) + options.kl_alpha * divergence
    for k, (own, other) in enumerate(((1, 2), (2, 4)) if ours is not None else ()):
        target = teacher_states[other] if theirs is None else filtered(theirs, k, teacher_states[other])
        residual = filtered(ours, k, states[own]) - target.detach()
        residual = residual[mask] if options.padding == "exclude" else residual
        loss = loss + options.mse_alpha * residual.square().mean() / 2
    return loss


VARIANTS = {
    "strict": {},
    "paper": {"preset": "paper"},
    "nonlinear": {"padding": "include", "temperature": 1.5},
    "narrow": {"kl_alpha": 0.7},
    "lwd": {"layerwise": "lwd", "mse_alpha": 3.0},
    "lwd_nonlinear": {"layerwise": "lwd", "filter_nonlinear": True, "padding": "include"},
    "no_divergence": {"kl_alpha": 0.0},
    "kd": {"layerwise": "none", "regression_kd": "none"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_stage_two_is_the_eager_total(case, variant, tmp_path):
    student, teacher = models(case)
    options = TEDOptions(**HALF, **VARIANTS[variant])
    folders = banks(student, teacher, tmp_path, nonlinear=variant == "nonlinear", width=20 if variant == "narrow" else None)
    objective = TaskAwareDistillation(student, teacher, options, filters=folders, seed=0).eval()
    ours, theirs = getattr(objective, "filters", None), getattr(objective, "teacher_filters", None)
    assert (ours is None, theirs is None) == (variant == "kd", variant in ("kd", "lwd", "lwd_nonlinear"))
    batch = make_batch(case)
    expected = stage_two(case, student, teacher, batch, options.resolved(), ours, theirs)
    compare_gradients(objective(batch, objective.weight(batch)), expected, dict(objective.named_parameters()))
    assert all(p.grad is None and not p.requires_grad for m in (teacher, theirs or teacher) for p in m.parameters())


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_add_up_to_the_whole_batch(case, tmp_path):
    """Halves with different numbers of tokens and labels, each padded to the whole's width."""
    student, teacher = models(case)
    folders = banks(student, teacher, tmp_path)
    objectives = [
        FilterTraining(copy.deepcopy(student), TEDOptions(), role="student", seed=0, filters=folders).eval(),
        TaskAwareDistillation(student, teacher, TEDOptions(**HALF), filters=folders, seed=0).eval(),
        TaskAwareDistillation(student, teacher, TEDOptions(**HALF, padding="include"), filters=folders, seed=0).eval(),
    ]
    for objective in objectives:
        parameters = [p for p in objective.parameters() if p.requires_grad]

        def gradients(*batches: Any, objective: Any = objective, parameters: Any = parameters) -> Tensor:
            denominator = sum(objective.weight(batch) for batch in batches)
            loss = sum(objective(batch, denominator) for batch in batches)
            made = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            return torch.cat([g.flatten() for g in (loss, *made)])

        halves = make_batch(case, 0, 3), make_batch(case, 3, 6)
        assert_close(gradients(*halves), gradients(make_batch(case)), EXACT)


def test_batch_softmax_depends_on_the_batch_and_counts_by_its_share():
    """Trap 1: one softmax over the scores of the batch; alone in it, an example says nothing."""
    student, teacher = models("regression")
    objective = TaskAwareDistillation(student, teacher, TEDOptions(layerwise="none", regression_kd="batch_softmax"), seed=0)
    batches = make_batch("regression", 0, 1), make_batch("regression", 1, 6)
    total = sum(objective(batch, np.array([6.0, 1, 1])) for batch in batches)
    labels, scores, targets = make_batch("regression").labels, student(make_batch("regression")), teacher(make_batch("regression"))
    log_q, log_p = (scores[1:] / 2).log_softmax(-1), (targets[1:] / 2).log_softmax(-1)
    expected = (scores - labels).square().mean() + 20 * 4 * (log_p.exp() * (log_p - log_q)).sum() / 6
    assert_close(total, expected, EXACT)


@pytest.mark.parametrize("case", ["classification", "masked"])
def test_only_filters_and_heads_move_in_stage_one(case):
    student, _ = models(case)
    objective = FilterTraining(student, TEDOptions(filter_output_dim=20), role="student", seed=0).train()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2, weight_decay=0.1)
    batch, losses = make_batch(case), []
    for _ in range(4):
        loss = objective(batch, objective.weight(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("student."), name
    objective.eval()
    assert objective(batch, objective.weight(batch)) < losses[0]
    assert set(objective.auxiliary()) == {"filters", "heads"}


@pytest.mark.parametrize("case", ["classification", "causal"])
def test_the_teacher_keeps_its_bytes_and_the_saved_student_has_no_filters(case, tmp_path):
    student, teacher = models(case)
    folders = banks(student, teacher, tmp_path)
    keys = set(student.model.state_dict())
    objective = TaskAwareDistillation(student, teacher, TEDOptions(**HALF), filters=folders, seed=0).train()
    frozen = [*teacher.state_dict().values(), *objective.teacher_filters.state_dict().values()]
    before, started = [value.clone() for value in frozen], copy.deepcopy(dict(objective.named_parameters()))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for _ in range(2):
        objective(make_batch(case), objective.weight(make_batch(case))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    moved = {name for name, p in objective.named_parameters() if not torch.equal(p, started[name])}
    assert {f"filters.last.{k}.{part}" for k in (0, 1) for part in ("weight", "bias")} <= moved
    assert any(name.startswith("student.") for name in moved)
    assert set(objective.auxiliary()) == {"filters"} and not any("teacher" in name for name in objective.state_dict())
    student.model.save_pretrained(tmp_path / "saved")
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) <= keys == set(student.model.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_terms_of_weight_zero_are_not_computed(case):
    """mse_alpha 0 is layerwise none bit for bit; with kl_alpha 0 too it is fine-tuning, and the teacher is not run."""
    student, teacher = models(case)
    batch = make_batch(case)

    def run(**options: Any) -> list[Tensor]:
        objective = TaskAwareDistillation(student, teacher, TEDOptions(**options), seed=0)
        assert set(objective.auxiliary()) == set()
        loss = objective(batch, objective.weight(batch))
        return [loss, *torch.autograd.grad(loss, list(student.parameters()), allow_unused=True, materialize_grads=True)]

    kd = run(layerwise="none")
    for other in ({"mse_alpha": 0.0}, {"mse_alpha": 0.0, "layerwise": "lwd"}):
        assert all(torch.equal(a, b) for a, b in zip(kd, run(**other), strict=True))
    plain = (LanguageModeling if case in TEXT else FineTuning)(student)
    teacher.forward = None
    loss = plain(batch, plain.weight(batch))
    assert torch.equal(run(mse_alpha=0.0, kl_alpha=0.0)[0], loss) and not torch.equal(kd[0], loss)


@pytest.mark.parametrize("kl_alpha", [0.0, 20.0])
@pytest.mark.parametrize("case", ["causal", "mapped"])
def test_under_left_padding_a_pads_label_is_neither_counted_nor_summed(case, kl_alpha):
    """The pad before the first token predicts it, by the shift."""
    student, teacher = models(case)
    padded = make_batch(case)
    ids, mask = padded.input_ids.flip(1), padded.attention_mask.flip(1)
    batch = TextBatch(ids, mask, shifted(torch.where(mask.bool(), ids, -100)))
    of_tokens = replace(batch, labels=torch.where(mask.bool(), batch.labels, -100))
    options = TEDOptions(layerwise="none", kl_alpha=kl_alpha)
    objective = TaskAwareDistillation(student, teacher, options, seed=0)
    expected = stage_two(case, student, teacher, of_tokens, options.resolved(), None, None)
    compare_gradients(objective(batch, objective.weight(batch)), expected, dict(student.named_parameters()))
    filters = FilterTraining(student, TEDOptions(filter_output_dim=20), role="student", seed=0).eval()
    assert filters.weight(batch) == (of_tokens.labels != -100).sum() < (batch.labels != -100).sum()
    assert_close(filters(batch, 1.0), filters(of_tokens, 1.0), EXACT)


@pytest.mark.parametrize("case", ["masked", "causal"])
def test_text_without_a_label_has_no_task_loss(case, tmp_path):
    student, teacher = models(case)
    folders = banks(student, teacher, tmp_path)
    batch = replace(make_batch(case), labels=torch.full((6, 8), -100))
    first = FilterTraining(copy.deepcopy(student), TEDOptions(), role="student", seed=0, filters=folders)
    assert first.weight(batch) == 0.0 and first(batch, 0.0).item() == 0.0
    objective = TaskAwareDistillation(student, teacher, TEDOptions(layerwise="none", kl_alpha=2.0), seed=0)
    mask = batch.attention_mask.bool()
    with torch.no_grad():
        log_q, log_p = ((states_and_output(m, batch)[1].logits[mask] / 2).log_softmax(-1) for m in (student, teacher))
    expected = 2 * 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert_close(objective(batch, objective.weight(batch)), expected, EXACT)


@pytest.mark.parametrize("case", [c for c in CASES if c != "mapped"])
def test_identical_models_have_nothing_to_learn_from_each_other(case, tmp_path):
    _, teacher = models(case)
    student = copy.deepcopy(teacher).requires_grad_(True)
    folders = {**banks(teacher, teacher, tmp_path), "student_filters": tmp_path / "teacher"}
    options = TEDOptions(filter_interval=2, teacher_filter_interval=2)
    objective, plain = TaskAwareDistillation(student, teacher, options, filters=folders, seed=0), FineTuning(student)
    plain = LanguageModeling(student) if case in TEXT else plain
    batch = make_batch(case)
    assert_close(objective(batch, objective.weight(batch)), plain(batch, plain.weight(batch)), 1e-9)


def test_an_explicit_layer_map_pairs_any_layers(tmp_path):
    student, teacher = models("classification")
    options = TEDOptions(layer_map=((2, 1), (1, 4)))
    made = {}
    for role, of in (("teacher", teacher), ("student", student)):
        trained = FilterTraining(copy.deepcopy(of), options, role=role, seed=3, filters=made)
        made[f"{role}_filters"] = tmp_path / role
        trained.filters.save(tmp_path / role)
        assert trained.filters.shape.filter_width == 48
    batch = make_batch("classification")
    objective = TaskAwareDistillation(student, teacher, replace(options, kl_alpha=0.0, mse_alpha=1.0), filters=made, seed=0)
    (own, output), (other, _) = states_and_output(student, batch), states_and_output(teacher, batch)
    mask = batch.attention_mask.bool()
    pairs = enumerate(((2, 1), (1, 4)))
    distances = [
        filtered(objective.filters, k, own[s][mask]) - filtered(objective.teacher_filters, k, other[t][mask]) for k, (s, t) in pairs
    ]
    expected = functional.cross_entropy(output.logits, batch.labels) + sum(d.square().mean() for d in distances) / 2
    assert_close(objective(batch, objective.weight(batch)), expected, EXACT)
