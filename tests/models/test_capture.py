"""Captured states against what transformers itself returns, and what a capture must not leave behind."""

from __future__ import annotations

import gc
import weakref
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.models.capture import KERNEL_NAME, Heads, attention_heads, capture, check_capture, num_layers, transformer_layers
from tests import tiny
from tests.oracle import assert_close

NAMES = list(tiny.TRANSFORMERS)
INTERFACE = [name for name in NAMES if not name.startswith("deberta")]
LAYERS = 4

# By model type: from a layer to what receives the heads' outputs, and from the base model to the norm after the last layer.
OUTPUT_PROJECTION = {"gpt2": "attn.c_proj", "modernbert": "attn.Wo"} | dict.fromkeys(("llama", "qwen2", "qwen3"), "self_attn.o_proj")
FINAL_NORM = {"gpt2": "ln_f", "modernbert": "final_norm", "llama": "norm", "qwen2": "norm", "qwen3": "norm"}


def batch(*, padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 8:] = 0  # no further than a sliding window reaches: every query sees a token
        mask[2, 9:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def language_head(name: str) -> str:
    return "CausalLM" if name in tiny.DECODERS else "MaskedLM"


def scores(output: Any) -> Tensor:
    return output.start_logits if "start_logits" in output else output.logits if "logits" in output else output.last_hidden_state


def output_projection(model: Any, layer: int) -> nn.Module:
    path = OUTPUT_PROJECTION.get(model.config.model_type, "attention.output.dense")
    return attrgetter(path)(transformer_layers(model)[layer - 1])


def traces(model: nn.Module) -> dict[str, Any]:
    """All that a capture could leave: attributes, hooks, other configs."""
    return {
        name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks), id(getattr(module, "config", None)))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("head", ["", "language model", "SequenceClassification", "QuestionAnswering"])
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_scores_are_those_without_a_capture(name, head):
    model = tiny.transformer(name, language_head(name) if head == "language model" else head)
    plain = model(**batch(), output_hidden_states=True)
    with capture(model, hidden=range(LAYERS + 1), attention=range(1, LAYERS + 1)) as seen:
        output = model(**batch())
    assert torch.equal(scores(output), scores(plain))
    assert list(seen.hidden) == list(range(LAYERS + 1)) and list(seen.attention) == list(range(1, LAYERS + 1))
    final_norm = FINAL_NORM.get(model.config.model_type)
    last = seen.hidden[LAYERS] if final_norm is None else attrgetter(final_norm)(model.base_model)(seen.hidden[LAYERS])
    for layer, state in enumerate(plain.hidden_states):
        assert torch.equal(last if layer == LAYERS else seen.hidden[layer], state), layer


@pytest.mark.parametrize("name", INTERFACE)
def test_projections_make_the_attention_of_transformers(name):
    """softmax(q k^T / sqrt(d) + mask) is `output_attentions`, times v it is what the output projection gets; gradients agree too."""
    model = tiny.transformer(name, attention="eager").double()
    inputs = batch()
    contexts: dict[int, Tensor] = {}
    for layer in range(1, LAYERS + 1):
        output_projection(model, layer).register_forward_pre_hook(lambda _, args, layer=layer: contexts.update({layer: args[0]}))
    attentions = model(**inputs, output_attentions=True).attentions
    with capture(model, attention=range(1, LAYERS + 1)) as seen:
        model(**inputs)
    kept_precision = name in ("bert", "roberta", "gpt2")  # the others take their softmax in float32 whatever their dtype
    weights = torch.randn(attentions[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    truth_loss = loss = torch.zeros((), dtype=torch.float64)
    for layer, truth in enumerate(attentions, 1):
        q, k, v = seen.attention[layer].q, seen.attention[layer].k, seen.attention[layer].v
        assert k.shape[1] == v.shape[1] == (2 if name in ("llama", "qwen2", "qwen3") else 4)
        k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in (k, v))
        hidden = ~visible(model, layer, inputs["attention_mask"])[:, None]
        logits = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(hidden, torch.finfo(torch.float64).min)
        probabilities = logits.softmax(-1, dtype=torch.float64 if kept_precision else torch.float32).double()
        assert (probabilities - truth).abs().max() <= 1e-12
        assert ((truth @ v).transpose(1, 2).flatten(2) - contexts[layer]).abs().max() <= 1e-12
        loss, truth_loss = loss + (probabilities * weights).sum(), truth_loss + (truth * weights).sum()
    wanted = [p for p in model.parameters() if p.requires_grad]
    gradients, truths = (torch.autograd.grad(value, wanted, allow_unused=True) for value in (loss, truth_loss))
    assert [g is None for g in gradients] == [t is None for t in truths]
    flat = [torch.cat([g.flatten() for g in side if g is not None]) for side in (gradients, truths)]
    assert flat[1].norm() > 0
    assert_close(flat[0], flat[1], 1e-12 if kept_precision else 1e-6)


def visible(model: Any, layer: int, attention_mask: Tensor) -> Tensor:
    """(B, S, S): which keys a query attends to, by the definition of each model."""
    length = attention_mask.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    types = getattr(model.config, "layer_types", None)
    if model.config.model_type in tiny.DECODERS:
        seen &= distance >= 0
    if types is not None and types[layer - 1] == "sliding_attention":
        seen &= distance.abs() <= 3
    return seen & attention_mask.bool()[:, None]


@pytest.mark.parametrize("name", ["deberta-v2", "deberta-v3"])
def test_projections_of_deberta_are_those_of_its_content(name):
    model = tiny.transformer(name).double()
    with capture(model, hidden=range(LAYERS + 1), attention=range(1, LAYERS + 1)) as seen:
        model(**batch())
    for layer in range(1, LAYERS + 1):
        attention, state = transformer_layers(model)[layer - 1].attention.self, seen.hidden[layer - 1]
        for letter, projection in (("q", attention.query_proj), ("k", attention.key_proj), ("v", attention.value_proj)):
            truth = (state @ projection.weight.T + projection.bias).view(3, 11, 4, 8).transpose(1, 2)
            captured = getattr(seen.attention[layer], letter)
            assert captured.shape == (3, 4, 11, 8)
            assert (captured - truth).abs().max() <= 1e-12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", INTERFACE)
def test_the_models_own_kernel_runs(name, attention, monkeypatch):
    model = tiny.transformer(name, attention=attention)
    plain = model(**batch()).logits
    calls = []
    kernel = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    with capture(model, attention=(2, 3)):
        output = model(**batch()).logits
    assert torch.equal(output, plain)
    assert len(calls) == (LAYERS if attention == "sdpa" else 0)


def test_gpt2s_reordered_attention_runs_as_it_is(monkeypatch):
    model = tiny.transformer("gpt2", attention="eager", reorder_and_upcast_attn=True).bfloat16()
    plain = model(**batch()).logits
    calls = []
    attention_class = type(model.transformer.h[0].attn)
    own = attention_class._upcast_and_reordered_attn
    monkeypatch.setattr(attention_class, "_upcast_and_reordered_attn", lambda *args: calls.append(1) or own(*args))
    with capture(model, attention=(2,)) as seen:
        output = model(**batch()).logits
    assert torch.equal(output, plain) and len(calls) == LAYERS and seen.attention[2].q.dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_dropout_and_autocast_are_untouched(name, autocast):
    model = tiny.transformer(name).train()
    inputs = batch() | ({"use_cache": False} if name in tiny.DECODERS else {})
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(model(**inputs, output_hidden_states=True))
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), capture(model, hidden=range(LAYERS), attention=(1, LAYERS)) as seen:
        output = model(**inputs)
    assert torch.equal(outputs[0].logits, outputs[1].logits) and torch.equal(output.logits, outputs[0].logits)
    assert not torch.equal(output.logits, model.eval()(**inputs).logits)
    for layer, state in seen.hidden.items():
        assert torch.equal(state, outputs[0].hidden_states[layer]), layer
    assert seen.attention[LAYERS].v.dtype == (torch.bfloat16 if autocast else torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_through_output_hidden_states(name):
    model = tiny.transformer(name)
    states = model(**batch(), output_hidden_states=True).hidden_states[:LAYERS]
    with capture(model, hidden=range(LAYERS)) as seen:
        model(**batch())
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(sum(seen.hidden[layer].pow(3).sum() for layer in range(LAYERS)), parameters, allow_unused=True)
    truths = torch.autograd.grad(sum(state.pow(3).sum() for state in states), parameters, allow_unused=True)
    assert sum(truth is not None for truth in truths) > len(parameters) / 2
    for gradient, truth in zip(gradients, truths, strict=True):
        assert (gradient is None) == (truth is None)
        assert gradient is None or torch.equal(gradient, truth)


@pytest.mark.parametrize("name", NAMES)
def test_stop_leaves_the_forward_and_the_model_as_it_was(name):
    model = tiny.transformer(name)
    with capture(model, hidden=(0, 2), attention=(2, 3)) as whole:
        plain = model(**batch()).logits
    ran: list[str] = []
    for layer in (3, 4):
        transformer_layers(model)[layer - 1].register_forward_pre_hook(lambda *_, layer=layer: ran.append(f"layer {layer}"))
        output_projection(model, layer).register_forward_hook(lambda *_, layer=layer: ran.append(f"output of {layer}"))
    before = traces(model)

    with capture(model, hidden=(0, 2), attention=(2, 3), stop=True) as seen:
        model(**batch())
        pytest.fail("the with-block goes on after a stopped forward")
    assert ran == ["layer 3"]
    assert all(torch.equal(seen.hidden[layer], whole.hidden[layer]) for layer in (0, 2))
    for layer in (2, 3):
        for letter in "qkv":
            assert torch.equal(getattr(seen.attention[layer], letter), getattr(whole.attention[layer], letter))
    assert traces(model) == before

    ran.clear()
    with capture(model, hidden=(2,), stop=True):
        model(**batch())
    assert ran == []
    assert torch.equal(model(**batch()).logits, plain)
    assert ran == ["layer 3", "output of 3", "layer 4", "output of 4"]


def test_a_stopped_forward_frees_its_activations():
    model = tiny.transformer("bert")
    alive: list[Any] = []
    transformer_layers(model)[0].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), capture(model, attention=(3,), stop=True):
            model(**batch())
        assert [reference() for reference in alive] == [None]
    finally:
        gc.enable()


def test_at_hidden_gets_every_state_in_order_and_none_is_stored():
    model = tiny.transformer("llama")
    with capture(model, hidden=range(LAYERS + 1)) as truth:
        model(**batch())
    got: list[tuple[int, Tensor]] = []
    with capture(model, hidden=(3, 0, 1), at_hidden=lambda layer, state: got.append((layer, state)), stop=True) as seen:
        model(**batch())
    assert [layer for layer, _ in got] == [0, 1, 3]
    assert all(torch.equal(state, truth.hidden[layer]) for layer, state in got)
    assert seen.hidden == {}


@pytest.mark.parametrize("name", NAMES)
def test_replaced_embeddings_enter_every_part_of_the_model(name):
    """With its rows' embeddings exchanged the model computes what it computes on exchanged rows, DeBERTa-v2's convolution included."""
    model = tiny.transformer(name)
    inputs = batch(padded=False)
    exchanged = {key: value.flip(0) for key, value in inputs.items()}
    with capture(model, hidden=(0, LAYERS)) as truth:
        logits = model(**exchanged).logits
    with capture(model, hidden=(0, LAYERS), embeddings=lambda state: state.flip(0)) as seen:
        output = model(**inputs).logits
    assert torch.equal(seen.hidden[0], truth.hidden[0])
    assert_close(seen.hidden[LAYERS], truth.hidden[LAYERS], 1e-5)
    assert_close(output, logits, 1e-5)
    assert not torch.allclose(output, logits.flip(0))
    assert_close(model(**inputs).logits, logits.flip(0), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_on_the_model(name, tmp_path):
    model = tiny.transformer(name)
    model(**batch(), output_hidden_states=True)  # transformers leaves hooks of its own at the first such call
    model.config.save_pretrained(tmp_path / "before")
    before, implementation = traces(model), model.config._attn_implementation

    def fail(*_: Any) -> None:
        raise MemoryError

    with capture(model, hidden=range(LAYERS + 1), attention=range(1, LAYERS + 1), embeddings=lambda state: state):
        model(**batch())
    projection = next(
        module
        for path, module in transformer_layers(model)[1].named_modules()
        if path.endswith(("value", "value_proj", "v_proj", "Wqkv", "c_attn"))
    )
    handle = projection.register_forward_hook(fail)
    with pytest.raises(MemoryError), capture(model, hidden=(4,), attention=(2,), stop=True):
        model(**batch())
    handle.remove()
    model.config.save_pretrained(tmp_path / "after")
    assert traces(model) == before and model.config._attn_implementation == implementation
    assert (tmp_path / "after" / "config.json").read_bytes() == (tmp_path / "before" / "config.json").read_bytes()


def test_captures_of_two_models_and_of_one_twice_do_not_disturb_each_other():
    teacher, student = tiny.transformer("bert", seed=1, attention="eager"), tiny.transformer("bert", seed=2, attention="sdpa")
    alone = []
    for model in (teacher, student):
        with capture(model, hidden=(2,), attention=(2,)) as seen:
            model(**batch())
        alone.append(seen)
    with capture(teacher, hidden=(2,), attention=(2,)) as outer, capture(student, hidden=(2,), attention=(2,)) as inner:
        with capture(student, attention=(2, 3)) as twice:
            student(**batch())
        teacher(**batch())
    for seen, truth in ((outer, alone[0]), (inner, alone[1])):
        assert torch.equal(seen.hidden[2], truth.hidden[2]) and torch.equal(seen.attention[2].k, truth.attention[2].k)
    assert torch.equal(twice.attention[2].q, alone[1].attention[2].q) and sorted(twice.attention) == [2, 3]

    with capture(teacher, hidden=(2,), stop=True) as outer:
        with capture(student, hidden=(1,)):
            student(**batch())
            teacher(**batch())
        pytest.fail("an inner capture has taken the stop of the outer one")
    assert torch.equal(outer.hidden[2], alone[0].hidden[2])


def test_other_models_know_nothing_of_a_capture():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    captured, other = tiny.transformer("qwen3", seed=1), tiny.transformer("qwen3", seed=2)
    plain = other(**batch()).logits
    names = set(ALL_ATTENTION_FUNCTIONS.valid_keys()) - {KERNEL_NAME}
    with capture(captured, attention=(1,)) as seen:
        assert torch.equal(other(**batch()).logits, plain) and not seen.attention
        captured(**batch())
    assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == names | {KERNEL_NAME}


def test_layers_and_heads_are_counted():
    model = tiny.transformer("qwen3")
    assert num_layers(model) == LAYERS and attention_heads(model) == Heads(query=4, key_value=2)
    assert attention_heads(tiny.transformer("deberta-v3")) == Heads(4, 4)


@pytest.mark.parametrize("kind", ["MambaModel", "T5Model", "Linear"])
def test_unknown_models_are_refused_by_class_name(kind):
    import transformers

    if kind == "MambaModel":
        model = transformers.MambaModel(transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1))
    elif kind == "T5Model":
        model = transformers.T5Model(transformers.T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    else:
        model = nn.Linear(2, 2)
    name = type(model).__name__
    for use in (num_layers, check_capture, attention_heads, lambda model: capture(model, hidden=(1,)).__enter__()):
        with pytest.raises(TypeError, match=rf"(?s){name}.*bert, .*llama"):
            use(model)


@pytest.mark.parametrize("asked", [{"hidden": (5,)}, {"hidden": (-1,)}, {"attention": (0,)}, {"attention": (1, 5)}])
def test_layers_out_of_range_are_refused(asked):
    model = tiny.transformer("bert")
    for use in (check_capture, lambda *args, **kw: capture(*args, **kw).__enter__()):
        with pytest.raises(ValueError, match=rf"{next(iter(asked))}=\[.*BertForSequenceClassification has 4 layers"):
            use(model, **asked)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_is_refused_in_training_only():
    model = tiny.transformer("llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        check_capture(model, hidden=(1,))
    check_capture(model.eval(), hidden=(1,))


def test_a_capture_that_nothing_arrives_at_says_so():
    model = tiny.transformer("bert")
    with pytest.raises(ValueError, match="stop=True"), capture(model, stop=True):
        pass
    with pytest.raises(RuntimeError, match=r"did not compute \[\('hidden', 4\)\]"), capture(model, hidden=(4,)):
        pass
