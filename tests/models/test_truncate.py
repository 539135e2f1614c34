"""Students made of some of a model's layers, against the whole model with its other layers bypassed."""

from __future__ import annotations

import pytest
import torch

from fastkd.models.capture import capture, num_layers, transformer_layers
from fastkd.models.truncate import keep_layers, parse_layers
from tests import tiny
from tests.models.test_capture import NAMES, batch, language_head, scores


def logits(model):
    return scores(model(**batch()))


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_make_the_same_model_with_tensors_of_its_own(name):
    model = tiny.transformer(name)
    student = keep_layers(model, range(1, 5))
    assert type(student) is type(model)
    assert torch.equal(logits(student), logits(model))
    assert student.config.to_dict() == model.config.to_dict()
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize(
    ("layers", "head"),
    [([1, 3], "language model"), ([1, 2], "SequenceClassification"), ([1, 4], "QuestionAnswering"), ([2, 4], "language model")],
)
@pytest.mark.parametrize("name", NAMES)
def test_kept_layers_compute_what_the_model_does_with_the_others_bypassed(name, layers, head, tmp_path):
    if name == "modernbert" and 1 not in layers:
        pytest.skip("refused, see below")
    if name == "deberta-v2" and 1 not in layers:
        pytest.skip("the convolution follows another layer than in the whole model")
    model = tiny.transformer(name, language_head(name) if head == "language model" else head, attention="eager")
    whole = logits(model)
    student = keep_layers(model, layers)
    assert torch.equal(logits(model), whole) and num_layers(model) == model.config.num_hidden_layers == 4

    for number, layer in enumerate(transformer_layers(model), 1):
        if number not in layers:
            is_tuple = model.config.model_type == "deberta-v2"
            layer.register_forward_hook(lambda _, args, output, is_tuple=is_tuple: (args[0], None) if is_tuple else args[0])
    bypassed = logits(model)
    assert torch.equal(logits(student), bypassed) and not torch.equal(bypassed, whole)

    assert num_layers(student) == student.config.num_hidden_layers == 2
    indices = [[m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")] for layer in transformer_layers(student)]
    assert all(set(found) <= {place} for place, found in enumerate(indices))
    student.save_pretrained(tmp_path)
    reopened = type(student).from_pretrained(tmp_path).eval()
    reopened.set_attn_implementation("eager")
    assert torch.equal(logits(reopened), bypassed)
    assert [p.shape for p in reopened.parameters()] == [p.shape for p in student.parameters()]


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_a_truncated_decoder_generates_with_its_cache(name):
    student = keep_layers(tiny.transformer(name, "CausalLM"), "every:2" if name != "gpt2" else [1, 4])
    ids = batch(padded=False)["input_ids"]
    generated = [
        student.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_layers_make_the_same_states(name):
    model = tiny.transformer(name)
    student = keep_layers(model, "first:3")
    seen = []
    for each in (model, student):
        with capture(each, hidden=(1, 3), attention=(3,)) as states:
            each(**batch())
        seen.append(states)
    for layer in (1, 3):
        assert torch.equal(seen[0].hidden[layer], seen[1].hidden[layer])
    assert torch.equal(seen[0].attention[3].k, seen[1].attention[3].k)


def test_layer_types_move_with_their_layers():
    student = keep_layers(tiny.transformer("qwen3"), "every:2")
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.sliding_window for layer in transformer_layers(student)] == [None, 4]


def test_kept_layers_leave_precision_mode_and_random_state_alone():
    model = tiny.transformer("llama").bfloat16().train()
    state = torch.get_rng_state()
    student = keep_layers(model, (2,))
    assert torch.equal(torch.get_rng_state(), state)
    assert student.dtype == torch.bfloat16 and all(module.training for module in student.modules())


def test_settings():
    model = tiny.transformer("bert", num_hidden_layers=7)
    assert parse_layers("first:3", model) == (1, 2, 3)
    assert parse_layers("first:7", model) == (1, 2, 3, 4, 5, 6, 7)
    assert parse_layers("every:2", model) == (2, 4, 6)
    assert parse_layers("every:7", model) == (7,)
    assert parse_layers([1, 4, 7], model) == (1, 4, 7)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "empty"),
        ([0], r"^student_layers=\[0\]: the model has layers 1 to 4"),
        ([1, 5], r"layers=\[5\]"),
        ([1, 1], "each layer once"),
        ([2, 1], "ascending"),
        ("first:0", "N from 1 to 4"),
        ("first:5", "N from 1 to 4"),
        ("every:-1", "N from 1 to 4"),
        ("last:2", "first:N"),
        ("3", "first:N"),
        ("first:x", "first:N"),
    ],
)
def test_refused_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        keep_layers(tiny.transformer("bert"), layers)


def test_what_a_config_cannot_say_is_refused():
    with pytest.raises(ValueError, match="Keep layer 1"):
        keep_layers(tiny.transformer("modernbert"), "every:2")
    scaled = tiny.transformer("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match='Use "first:2"'):
        keep_layers(scaled, "every:2")
    assert num_layers(keep_layers(scaled, "first:2")) == 2


def test_unknown_models_are_refused_by_class_name():
    with pytest.raises(TypeError, match=r"Linear.*gpt2"):
        keep_layers(torch.nn.Linear(2, 2), [1])
