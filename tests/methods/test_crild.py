"""CR-ILD's losses against full S x S formulas computed from the models' own modules, and the traps found in the authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.methods.crild import CRILDOptions, IntermediateLayerDistillation, LogitDistillation, _fit_dense
from fastkd.methods.mixup import MixedBatch
from fastkd.methods.objective import Position
from fastkd.models.language_model import LanguageModel
from fastkd.models.task_model import TaskModel
from fastkd.tasks.encoded import TaskBatch
from fastkd.train.batches import counter_torch_generator
from tests import multimodal, tiny
from tests.oracle import assert_close, wrong_gradients

VOCABULARY, MIX = 90, 0.7
HALFWAY = Position(step=5, total_steps=10, epoch=2, total_epochs=4.0)


def encoder(seed: int, kind: str = "classification", outputs: int = 3, **settings: Any) -> TaskModel:
    from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, **settings}
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=outputs, initializer_range=0.2, **shape)
    model = (BertForQuestionAnswering if kind == "question_answering" else BertForSequenceClassification)(config)
    return TaskModel(model.double(), kind).eval()


def decoder(seed: int, **settings: Any) -> LanguageModel:
    return LanguageModel(tiny.llama(VOCABULARY, seed=seed, **{"hidden_size": 24, **settings}).double()).eval()


def models(make: Any = encoder, **student: Any) -> tuple[Any, Any]:
    """A student and a frozen teacher that is wider and twice as deep."""
    return make(0, **student), make(1, hidden_size=32, num_hidden_layers=4).requires_grad_(False)


def ild(student: Any, teacher: Any, seed: int = 0, **options: Any) -> IntermediateLayerDistillation:
    return IntermediateLayerDistillation(student, teacher, CRILDOptions(**options), seed=seed)


def batch_of(lengths: tuple[int, ...] = (9, 3, 6, 5, 7), **fields: Any) -> TaskBatch:
    """Right-padded rows, pads of an ordinary id, two segments."""
    generator, shape = torch.Generator().manual_seed(0), (len(lengths), max(lengths))
    ids = torch.randint(5, VOCABULARY, shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    types = torch.randint(0, 2, shape, generator=generator)
    return TaskBatch(ids, mask, types, fields.pop("labels", torch.zeros(len(lengths), dtype=torch.long)), **fields)


def states(model: Any, batch: TaskBatch, mask: Tensor, mix: float | None) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Hidden states 0..L, and Q, K, V of layers 1..L made again from them by the layers' own projections."""
    bert, base = isinstance(model, TaskModel), model.model.base_model
    entry, layers = (base.embeddings, base.encoder.layer) if bert else (base.embed_tokens, base.layers)
    hidden: list[Tensor] = []

    def mixed(x: Tensor) -> Tensor:
        hidden.append(x if mix is None else mix * x + (1 - mix) * x[torch.arange(len(x) - 1, -1, -1)])
        return hidden[0]

    def note(module: Any, inputs: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    handles = [entry.register_forward_hook(lambda m, i, o: mixed(o)), *(layer.register_forward_hook(note) for layer in layers)]
    types = {"token_type_ids": batch.token_type_ids} if bert else {}
    model.model(input_ids=batch.input_ids, attention_mask=mask.long(), **types)
    for handle in handles:
        handle.remove()
    return hidden, [projections(model, layer, x) for layer, x in zip(layers, hidden, strict=False)]


def projections(model: Any, layer: Any, x: Tensor) -> dict[str, Tensor]:
    bert, heads, (batch, length, _) = isinstance(model, TaskModel), model.model.config.num_attention_heads, x.shape
    names = ("attention.self.query", "attention.self.key", "attention.self.value") if bert else "qkv"
    x = x if bert else layer.input_layernorm(x)
    made = (layer.get_submodule(name if bert else f"self_attn.{name}_proj")(x) for name in names)
    q, k, v = (y.view(batch, length, -1, model.model.config.hidden_size // heads).transpose(1, 2) for y in made)
    if not bert:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k = apply_rotary_pos_emb(q, k, *model.model.base_model.rotary_emb(x, torch.arange(length)[None]))
    return {"A": (q, k[:, torch.arange(heads) * k.shape[1] // heads]), "Q": (q, q), "K": (k, k), "V": (v, v)}


def scores(pair: tuple[Tensor, Tensor], keys: Tensor | None, heads: int | None) -> Tensor:
    """(B, heads, S, S), with the authors' -10000 at masked keys."""
    if heads is not None:
        pair = tuple(torch.stack(torch.cat(list(x.unbind(1)), -1).chunk(heads, -1), 1) for x in pair)
    raw = pair[0] @ pair[1].mT / pair[0].shape[-1] ** 0.5
    return raw if keys is None else raw - 10000.0 * (~keys).double()[:, None, None]


def reference(objective: Any, batch: TaskBatch, mix: float | None, average: Any = None) -> Tensor:
    """Spec 1.1 to 1.5, term by term, for the objective's settings and its present weight of consistency."""
    student, teacher, dense, settings = objective.student, objective.teacher, objective.fit_dense, objective.settings
    exclude, own = settings.padding == "exclude", batch.attention_mask.bool()
    union = own if mix is None else own | own.flip(0)
    (h_s, p_s), (h_t, p_t) = states(student, batch, union, mix), states(teacher, batch, union, mix)
    source, clean_dense = (student, dense) if average is None else (average["student"], average["fit_dense"])
    with torch.no_grad():
        h_c, p_c = states(source, batch, own, None)
    depth, ratio, total = len(p_s), len(p_t) // len(p_s), torch.zeros((), dtype=torch.float64)

    def relation(letter: str, s: Any, t: Any, tokens: Tensor) -> Tensor:
        keys = tokens if exclude or letter == "A" else None
        a, b = (scores(x[letter], keys, objective.options.relation_heads) for x in (s, t))
        p = b.softmax(-1).detach()
        value = -(p * a.log_softmax(-1)).sum(-1)
        if settings.form == "kl":
            value = value + torch.special.xlogy(p, p).sum(-1)
        return (value * tokens[:, None]).sum() / (a.shape[1] * union.sum()) if exclude else value.mean()

    def distance(s: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        squares = (dense(s) - t.detach()).square()
        return (squares.mean(-1) * rows).sum() / union.sum() if exclude else squares.mean()

    for letter in settings.objects:
        layers = {"last": [depth], "uniform": list(range(0 if letter == "H" else 1, depth + 1))}[settings.layers]
        for layer in layers:
            if letter == "P":
                at = union.sum(-1) - 1 if isinstance(student, LanguageModel) else torch.zeros(len(own), dtype=torch.long)
                s, t = dense(h_s[layer])[torch.arange(len(own)), at], h_t[layer * ratio][torch.arange(len(own)), at]
                gap = s / s.norm(dim=-1, keepdim=True) - t / t.norm(dim=-1, keepdim=True)
                total = total + gap.square().mean() / len(layers)
            elif letter == "H":
                total = total + distance(h_s[layer], h_t[layer * ratio], union)
            else:
                total = total + relation(letter, p_s[layer - 1], p_t[layer * ratio - 1], union if exclude else own)
        if letter in settings.consistency_objects and objective.consistency:
            for share, turn in ((1.0 if mix is None else mix, lambda x: x), (0.0 if mix is None else 1 - mix, lambda x: x.flip(0))):
                if letter == "H":
                    term = distance(h_s[-1], turn(clean_dense(h_c[-1])), turn(own))
                else:
                    term = relation(letter, p_s[-1], {letter: tuple(turn(x) for x in p_c[-1][letter])}, turn(own))
                total = total + objective.consistency * share * term
    return total


def loss_of(objective: Any, batch: TaskBatch) -> Tensor:
    mixed = MixedBatch(batch, MIX if objective.settings.mixup else None)
    return objective(mixed, objective.weight(mixed))


def assert_same(loss: Tensor, truth: Tensor, model: torch.nn.Module, tolerance: float = 1e-8) -> list[Tensor | None]:
    """One value and one gradient for every trained parameter of `model`, none where the other has none; returns the gradients."""
    assert_close(loss, truth, 1e-10)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients, truths = (torch.autograd.grad(x, list(named.values()), allow_unused=True) for x in (loss, truth))
    scale = max(t.norm() for t in truths if t is not None)
    for name, gradient, true_gradient in zip(named, gradients, truths, strict=True):
        assert (gradient is None) == (true_gradient is None), name
        if gradient is not None and true_gradient.norm() > 1e-8 * scale:
            assert_close(gradient, true_gradient, tolerance, name)
    return gradients


def check(objective: Any, batch: TaskBatch, average: Any = None) -> list[Tensor | None]:
    """The objective is the reference; Llama's norms work in float32."""
    truth = reference(objective, batch, MIX if objective.settings.mixup else None, average)
    return assert_same(loss_of(objective, batch), truth, objective, 1e-8 if isinstance(objective.student, TaskModel) else 1e-6)


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("padding", ["include", "exclude"])
@pytest.mark.parametrize("objects", ["A", "H", "P", "Q", "K", "V"])
def test_every_object_alone(objects, padding, make):
    """With pads, MixUp and models of different width: values and all gradients, in both settings of the padding traps (3 and 7)."""
    form = "kl" if objects in "AK" else "cross_entropy"
    gradients = check(ild(*models(make), objects=objects, padding=padding, form=form), batch_of())
    largest = max((g for g in gradients if g is not None), key=lambda g: g.norm())
    for what, wrong in wrong_gradients(largest).items():
        with pytest.raises(AssertionError):
            assert_close(wrong, largest, 1e-8, what)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (encoder, {"preset": "consistency"}),
        (encoder, {"preset": "consistency", "objects": "VKQPHA", "relation_heads": 8, "padding": "include", "form": "cross_entropy"}),
        (encoder, {"preset": "consistency", "objects": "AHQ", "mixup": False, "padding": "include"}),
        (decoder, {"preset": "consistency", "objects": "AHQKV", "relation_heads": 4}),
        (encoder, {"preset": "paper_script"}),
        (encoder, {"preset": "paper_script", "objects": "AHQ"}),
        (encoder, {"preset": "tinybert"}),
        (encoder, {"preset": "pkd"}),
        (decoder, {"preset": "tinybert", "objects": "AHPV", "padding": "exclude"}),
    ],
)
def test_sums_of_objects_consistency_and_all_layers(make, options):
    objective = ild(*models(make), **options)
    objective.begin_step(HALFWAY)
    check(objective, batch_of())


def test_models_of_different_heads_are_compared_by_relation_heads():
    student, teacher = models(num_attention_heads=2)
    with pytest.raises(ValueError, match=r"the student has 2 and the teacher 4\. Set relation_heads"):
        ild(student, teacher, preset="paper_script")
    check(ild(student, teacher, preset="paper_script", relation_heads=8), batch_of())
    for heads in (3, 16):
        with pytest.raises(ValueError, match=rf"relation_heads={heads} must divide"):
            ild(student, teacher, relation_heads=heads)


def loss_at(preset: str, weight: float, at: Position = HALFWAY, **options: Any) -> Tensor:
    objective = ild(*models(), preset=preset, consistency_weight=weight, **options)
    objective.begin_step(at)
    return loss_of(objective, batch_of()).detach()


def test_trap_1_the_published_commands_consistency_is_inert():
    assert torch.equal(loss_at("paper_script", 0.0), loss_at("paper_script", 1000.0))
    assert loss_at("paper_script", 1000.0, objects="AH") > 10 * loss_at("paper_script", 0.0, objects="AH")
    assert loss_at("consistency", 1000.0) > 10 * loss_at("consistency", 0.0)


def test_trap_5_an_epoch_ramp_has_no_consistency_in_its_first_epoch():
    first = Position(step=5, total_steps=10, epoch=0, total_epochs=1.0)
    assert torch.equal(loss_at("consistency", 1000.0, first, ramp="epoch"), loss_at("consistency", 0.0, first))
    assert not torch.equal(loss_at("consistency", 1000.0, first), loss_at("consistency", 0.0, first))
    for ramp, at, expected in (("epoch", HALFWAY, 0.05), ("step", first, 0.05), ("step", Position(9, 10, 0, 1.0), 0.09)):
        objective = ild(*models(), ramp=ramp)
        objective.begin_step(at)
        assert objective.consistency == pytest.approx(expected, rel=1e-12)


def test_trap_2_relations_alone_leave_the_top_without_gradient_and_do_not_run_it():
    student, teacher = models()
    for model in (student, teacher):
        for module in (model.model.bert.pooler, model.model.bert.encoder.layer[-1].output):
            module.register_forward_pre_hook(lambda module, inputs: pytest.fail("ran"))
    objective = ild(student, teacher, preset="paper_script")
    loss_of(objective, batch_of()).backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None}
    top = ("layer.1.attention.output", "layer.1.intermediate", "layer.1.output", "pooler", "classifier")
    assert reached == {name for name, _ in student.named_parameters() if not any(part in name for part in top)}
    assert objective.auxiliary() == {} and all(p.grad is None for p in teacher.parameters())


def test_a_mix_is_drawn_where_it_is_wanted_and_positions_are_counted_in_mixed_rows():
    batch = batch_of((4, 2, 3, 1, 2))
    drawn = ild(*models()).prepare(batch, counter_torch_generator(3, 17))
    assert drawn.mix == MixedBatch.draw(batch, counter_torch_generator(3, 17)).mix and drawn.batch is batch
    assert ild(*models(), mixup=False).prepare(batch, torch.Generator()).mix is None
    weights = {padding: ild(*models(), padding=padding).weight(drawn).tolist() for padding in ("exclude", "include")}
    assert weights == {"exclude": [5.0, 15.0], "include": [5.0, 20.0]}


def test_trap_6_the_clean_pass_is_made_by_the_student_in_its_mode_or_by_the_average_in_evaluation():
    def calls(at: Position, **options: Any) -> list[tuple[str, bool, bool]]:
        objective = ild(*models(), **options).train()
        seen: list[tuple[str, bool, bool]] = []
        named = {"student": objective.student, **({"average": objective.average["student"]} if objective.average else {})}
        for name, model in named.items():
            model.model.bert.embeddings.register_forward_hook(
                lambda m, i, o, name=name: seen.append((name, m.training, torch.is_grad_enabled()))
            )
        objective.begin_step(at)
        loss_of(objective, batch_of())
        return seen

    trained = ("student", True, True)
    assert calls(HALFWAY) == [("student", True, False), trained]
    assert calls(HALFWAY, ema_decay=0.9) == [("average", False, False), trained]
    assert calls(Position(0, 10, 0, 1.0)) == [trained] == calls(HALFWAY, preset="paper_script", ema_decay=0.9)


def test_the_average_follows_the_student_and_makes_the_targets():
    student, teacher = models()
    student.register_buffer("marker", torch.zeros(1, dtype=torch.long))
    objective = ild(student, teacher, ema_decay=0.9, objects="AHQ", consistency_weight=2.0)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert set(objective.auxiliary()) == {"fit_dense", "average"} and not any(name.startswith("average") for name in trained)
    expected = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(2):
        with torch.no_grad():
            for p in trained.values():
                p += 0.1 * torch.randn_like(p)
            student.marker += 1
        objective.end_step()
        expected = {name: 0.9 * value + 0.1 * trained[name].detach() for name, value in expected.items()}
    for name, value in objective.average.named_parameters():
        assert_close(value, expected[name], 1e-12, name)
    assert objective.average["student"].marker.item() == 2
    objective.begin_step(HALFWAY)
    check(objective.train(False), batch_of(), objective.average)


def test_cross_entropy_is_kl_and_the_targets_entropy_with_the_same_gradient():
    (student, teacher), batch, found = models(), batch_of(), {}
    for form in ("kl", "cross_entropy"):
        loss = loss_of(ild(student, teacher, preset="paper_script", objects="Q", form=form, mixup=False), batch)
        found[form] = loss, torch.autograd.grad(loss, student.model.bert.embeddings.word_embeddings.weight)[0]
    p = scores(states(teacher, batch, batch.attention_mask, None)[1][-1]["Q"], None, None).softmax(-1)
    assert_close(found["cross_entropy"][0] - found["kl"][0], -(p * p.log()).sum(-1).mean(), 1e-10)
    assert_close(found["cross_entropy"][1], found["kl"][1], 1e-10)


def test_micro_batches_add_up_to_the_whole_batch():
    """Pairs of partners, each pair cut to its own length, share the step's denominators."""
    objective = ild(*models(), objects="AHPV", consistency_weight=3.0)
    objective.begin_step(HALFWAY)
    whole = batch_of((9, 3, 6, 5))

    def loss_in(parts: list[list[int]]) -> Tensor:
        batches = []
        for part in parts:
            longest = int(whole.attention_mask[part].sum(-1).max())
            cut = (x[part, :longest] for x in (whole.input_ids, whole.attention_mask, whole.token_type_ids))
            batches.append(MixedBatch(TaskBatch(*cut, whole.labels[part]), MIX))
        denominator = sum(objective.weight(batch) for batch in batches)
        return sum(objective(batch, denominator) for batch in batches)

    assert_same(loss_in([[0, 3], [1, 2]]), loss_in([[0, 1, 2, 3]]), objective)


@pytest.mark.parametrize("name", multimodal.MODELS)
def test_widths_are_those_of_the_part_that_reads_text(name):
    teacher, student = LanguageModel(multimodal.multimodal(name)), LanguageModel(tiny.llama(100, hidden_size=16, head_dim=4))
    assert _fit_dense(student, teacher, 0).weight.shape == (32, 16)


def test_fit_dense_is_drawn_from_its_seed_alone():
    student, teacher = models(hidden_size=32)  # also where the widths are the same
    before = torch.get_rng_state()
    drawn = [ild(student, teacher, seed, objects="P").fit_dense for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0].weight, drawn[1].weight) and not torch.equal(drawn[0].weight, drawn[2].weight)
    assert abs(drawn[0].weight.std().item() - 0.02) < 0.002 and not drawn[0].bias.any() and drawn[0].weight.dtype == torch.float64


@pytest.mark.parametrize("preset", ["consistency", "paper_script"])
@pytest.mark.parametrize("kind", ["classification", "regression", "multiple_choice", "question_answering"])
def test_stage_kd(kind, preset):
    """T^2 soft cross-entropy or KL, the authors' regression without T^2, and pads among the answers or not."""
    outputs = {"classification": 3, "question_answering": 2}.get(kind, 1)
    student, teacher = encoder(0, kind, outputs), encoder(1, kind, outputs).requires_grad_(False)
    labels = {
        "classification": torch.tensor([0, 2, 1, 1]),
        "regression": torch.tensor([0.5, 1.0, -2.0, 3.0]),
        "multiple_choice": torch.tensor([1, 0]),
        "question_answering": torch.tensor([[1, 2], [0, 0], [3, 3], [2, 4]]),
    }[kind]
    batch = batch_of((9, 3, 6, 5), labels=labels, num_choices=2 if kind == "multiple_choice" else 1)
    objective = LogitDistillation(student, teacher, CRILDOptions(preset=preset, temperature=3.0, label_weight=0.25))
    assert objective.weight(batch) == len(labels)
    z_s, z_t = student(batch), teacher(batch)
    compat = preset == "paper_script"
    if kind == "regression":
        expected = ((z_s - z_t) / (3.0 if compat else 1.0)).square().mean() + 0.25 * (z_s - labels).square().mean()
    else:
        a, b = z_s / 3, z_t / 3
        if kind == "question_answering" and not compat:
            a, b = (x - 10000.0 * (1 - batch.attention_mask.double())[:, None] for x in (a, b))
        p = b.softmax(-1)
        rows = -(p * a.log_softmax(-1)).sum(-1) + (0 if compat else torch.special.xlogy(p, p).sum(-1))
        classes = z_s.flatten(0, 1) if kind == "question_answering" else z_s
        expected = 9 * rows.mean() + 0.25 * torch.nn.functional.cross_entropy(classes, labels.flatten())
    assert_same(objective(batch, objective.weight(batch)), expected, student)


def test_models_that_do_not_fit_are_refused():
    student, teacher = encoder(0, num_hidden_layers=3), encoder(1, num_hidden_layers=4).requires_grad_(False)
    with pytest.raises(ValueError, match=r"4 teacher layers are no multiple of 3 student layers"):
        ild(student, teacher, preset="tinybert")
    other = encoder(2, outputs=2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"classification with 3 outputs and the teacher for classification with 2"):
        LogitDistillation(student, other, CRILDOptions())
    with pytest.raises(ValueError, match="must be frozen"):
        ild(student, encoder(3))
    with pytest.raises(TypeError, match="Linear"):
        ild(TaskModel(torch.nn.Linear(2, 2)), teacher)
