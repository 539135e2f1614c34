"""Whether labels have to be shifted is found by what a model does: its class's name says it neither of subclasses nor of wrappers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from fastkd.models.behaviour import forward_arguments, probe_ids
from fastkd.models.language_model import LanguageModel
from fastkd.models.load import is_decoder
from fastkd.models.teacher_cache import CachedTeacher
from tests import multimodal, tiny
from tests.wrappers import PeftStandIn


class OwnDecoder(transformers.LlamaForCausalLM):
    """As of somebody who changes a line of it, and passes on the rest."""

    def forward(self, *positional: Any, **named: Any) -> Any:
        return super().forward(*positional, **named)


class OwnEncoder(transformers.BertForMaskedLM):
    """As of somebody who changes a line of it."""


class Remote(transformers.PreTrainedModel):
    """As a repository brings its own class: one layer of attention, causal or not."""

    config_class = transformers.LlamaConfig

    def __init__(self, causal: bool) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=60, hidden_size=32, attn_implementation="eager")
        super().__init__(config)
        self.causal = causal
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention = nn.MultiheadAttention(config.hidden_size, 4, batch_first=True)
        self.out = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        x, length = self.embed(input_ids), input_ids.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        return CausalLMOutput(logits=self.out(x + self.attention(x, x, x, attn_mask=later)[0]))


def mixture() -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=60, num_local_experts=4, **shape))


def own(kind: type, model: Any) -> Any:
    """The model as one of a subclass."""
    model.__class__ = kind
    return model


DECODERS: dict[str, Callable[[], Any]] = {
    "subclass": lambda: own(OwnDecoder, tiny.llama()),
    "compiled": lambda: torch.compile(tiny.llama(), backend="eager"),
    "compiled subclass": lambda: torch.compile(own(OwnDecoder, tiny.llama()), backend="eager"),
    "remote code": lambda: Remote(causal=True),
    "PEFT": lambda: PeftStandIn(tiny.llama()),
    **{name: lambda name=name: multimodal.multimodal(name) for name in multimodal.MODELS},
    "sliding window": lambda: tiny.transformer("qwen2", "CausalLM"),
    "experts": mixture,
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "subclass": lambda: own(OwnEncoder, tiny.bert()),
    "compiled": lambda: torch.compile(tiny.bert(), backend="eager"),
    "remote code": lambda: Remote(causal=False),
    "PEFT": lambda: PeftStandIn(tiny.bert()),
    "local attention": lambda: tiny.transformer("modernbert", "MaskedLM"),
    "small weights": lambda: tiny.transformer("bert", "MaskedLM", initializer_range=0.02),
}
MODELS = {
    f"{kind}, {name}": (make, kind == "decoder")
    for kind, makers in (("decoder", DECODERS), ("encoder", ENCODERS))
    for name, make in makers.items()
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "causal"), MODELS.values(), ids=MODELS.keys())
def test_a_model_is_causal_if_no_position_sees_a_later_one(make: Callable[[], Any], causal: bool, dtype: torch.dtype):
    model = LanguageModel(make().to(dtype))
    assert model.causal is causal
    assert model(torch.tensor([[5, 6, 7]])).shape == (1, 3, model.vocabulary)


def test_a_compiled_model_is_taken_as_what_was_compiled():
    plain = tiny.llama()
    assert LanguageModel(torch.compile(plain)).model is plain


def test_ids_that_mean_something_are_no_evidence():
    """A pad's embedding is zero, an image's place may ask for an image: with such ids alone nothing would be seen."""
    config = multimodal.multimodal("gemma3").config
    ids = probe_ids(config, 100, torch.device("cpu"))
    special = {0, 1, 2, 90, 91, 92}
    assert not special & set(ids.flatten().tolist()) and len(ids.unique()) > 10
    row, other_second, other_first = ids.chunk(3)
    half = ids.shape[1] // 2
    assert (row != other_second)[:, half:].all() and (row == other_second)[:, :half].all()
    assert (row != other_first)[:, :half].all() and (row == other_first)[:, half:].all()
    few = probe_ids(tiny.llama(5).config, 5, torch.device("cpu"))
    assert (few[0] != few[1])[half:].any() and (few[0] != few[2])[:half].any() and 0 not in few


def test_arguments_are_found_behind_keywords_that_are_passed_on():
    model = own(OwnDecoder, tiny.llama())
    assert {"labels", "use_cache", "position_ids"} <= forward_arguments(model) & forward_arguments(PeftStandIn(model))
    assert forward_arguments(Remote(causal=True)) == {"self", "input_ids", "attention_mask"}


REFUSED = {
    "BertLMHeadModel": (False, r"is for predicting next tokens, and its attention sees later tokens too. Set is_decoder=True .*Masked"),
    "BertForMaskedLM": (
        True,
        r"is for predicting masked tokens, and its attention sees no later tokens. Set is_decoder=False .*Causal",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_whose_attention_is_that_of_another_is_refused(name: str):
    """transformers' BertLMHeadModel shifts its labels in any case: without is_decoder it would learn to copy what it sees."""
    decoder, message = REFUSED[name]

    def make(decoder: bool) -> Any:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return getattr(transformers, name)(transformers.BertConfig(vocab_size=60, is_decoder=decoder, **shape))

    with pytest.raises(ValueError, match=f"^{name} {message}"):
        LanguageModel(make(decoder))
    assert LanguageModel(make(not decoder)).causal is not decoder


@pytest.mark.parametrize("causal", [False, True])
def test_a_class_for_both_is_asked_where_there_are_no_weights_too(causal: bool, tmp_path: Path):
    """XLM's one class for words is trained either way."""
    torch.manual_seed(0)
    shape = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 0}
    model = transformers.XLMWithLMHeadModel(transformers.XLMConfig(vocab_size=700, causal=causal, **shape))
    folder = tiny.save(tmp_path, model, tiny.byte_level())
    state = torch.get_rng_state()
    assert LanguageModel(model).causal is is_decoder(folder) is CachedTeacher(folder, tmp_path).causal is causal
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_whose_positions_are_apart_is_refused():
    model = tiny.llama()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(ValueError, match="No position of LlamaForCausalLM has an influence on the logits of another one"):
        LanguageModel(model)
