"""Settings of a new student: which are refused, by which name, and that no weight is made for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastkd.models.load import load_language_model, longest_row, save_model
from fastkd.models.settings import building
from fastkd.models.student import build_student, student_config
from fastkd.models.task_model import TaskHead, build_task_model, load_task_model
from tests import tiny

BERT = tiny.bert().config
LLAMA = tiny.llama().config
GPT2 = tiny.transformer("gpt2", "CausalLM").config
SIZES = {"vocab_size": 200, "hidden_size": 32, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
GPT_NEO = transformers.GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]], num_heads=4, **SIZES)
GEMMA3 = transformers.Gemma3TextConfig(
    num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48, **SIZES
)


@pytest.mark.parametrize(
    ("base", "overrides", "said"),
    [
        (BERT, {"hidden_size": 33.0}, "student.hidden_size cannot be 33.0: "),
        (BERT, {"hidden_size": None}, "student.hidden_size cannot be None: "),
        (BERT, {"hidden_size": True}, "student.hidden_size cannot be True: "),
        (BERT, {"classifier_dropout": "much"}, "student.classifier_dropout cannot be 'much': "),
        (BERT, {"hidden_size": 33, "intermediate_size": 8}, "student.hidden_size=33 makes no bert model: ValueError: The hidden size"),
        *(
            (base, {name: value}, f"student.{name} is {value}; it is a probability, from 0 to below 1.")
            for base, name in ((BERT, "hidden_dropout_prob"), (LLAMA, "attention_dropout"), (GPT2, "resid_pdrop"))
            for value in (2.0, -0.5, 1)
        ),
        (BERT, {"hidden_size": 2**20}, "GiB in float32, and this machine has"),
        (BERT, {"max_position_embeddings": 0}, "student.max_position_embeddings is 0; it must be at least 1."),
        (BERT, {"num_hidden_layers": 10**9}, "student.num_hidden_layers is 1000000000; it must be at least 1 and at most 1000."),
        (GPT2, {"n_layer": 0}, "student.n_layer is 0; it must be at least 1"),
        (GPT2, {"num_hidden_layers": -1}, "student.num_hidden_layers is -1; it must be at least 1"),
        (LLAMA, {"hidden_act": "foo"}, "student.hidden_act is 'foo', which is no activation that transformers knows; there are gelu, "),
        (LLAMA, {"hidden_act": "gelux"}, "'gelux', which is no activation that transformers knows; did you mean gelu?"),
        (GPT2, {"activation_function": "gelux"}, "student.activation_function is 'gelux', which is no activation"),
        (LLAMA, {"rope_parameters": {"rope_type": "foo"}}, "student.rope_parameters={'rope_type': 'foo'} makes no llama model: "),
        (BERT, {"vocab_size": 100}, "student.vocab_size has no effect: the vocabulary is the tokenizer's"),
        *(
            (base, {name: value}, f"student.{name}={value!r} names no token: ids are from 0 to {base.vocab_size - 1}. Give one of")
            for base, name, value in (
                (LLAMA, "eos_token_id", 99999),
                (LLAMA, "eos_token_id", [0, 700]),
                (LLAMA, "bos_token_id", -1),
                (BERT, "pad_token_id", 600),
            )
        ),
        *(
            (BERT, {name: "x"}, f"student.{name} has no effect")
            for name in ("dtype", "torch_dtype", "architectures", "_name_or_path", "transformers_version", "num_labels", "use_cache")
        ),
        (BERT, {"to_dict": 1}, "student.to_dict is not a setting of BertConfig"),
        (BERT, {"attribute_map": {}}, "student.attribute_map is not a setting of BertConfig"),
        (BERT, {"model_type": ["bert"]}, r"student.model_type=['bert'] is not an architecture"),
        (BERT, {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 0}, "student.num_attention_heads is 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_is_refused(base: Any, overrides: dict[str, Any], said: str) -> None:
    before = base.to_dict()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at below)
        student_config(base, overrides, None)
    assert said in str(caught.value) and base.to_dict() == before


@pytest.mark.parametrize(
    ("base", "overrides", "said"),
    [
        (
            LLAMA,
            {"num_key_value_heads": 3},
            "^student.num_key_value_heads=3 makes no llama model: its 4 attention heads cannot share its 3 heads of keys and values",
        ),
        (LLAMA, {"num_attention_heads": 8, "num_key_value_heads": 3}, "its 8 attention heads cannot share its 3 heads"),
        (LLAMA, {"hidden_size": 30}, "^student.hidden_size=30 makes no llama model: .*not a multiple of the number of attention heads"),
        (LLAMA, {"num_attention_heads": 3}, "^student.num_attention_heads=3 makes no llama model: "),
        (GPT_NEO, {"num_layers": 2}, "^student.num_layers=2 makes no gpt_neo model: .*attention_layers"),
        (
            GEMMA3,
            {"layer_types": ["full_attention"] * 2},
            r"^student.layer_types=.* makes no gemma3_text model: .*must be equal to the num",
        ),
        (
            GEMMA3,
            {"num_hidden_layers": 4},
            r"leaves no layer with full_attention.*set student.layer_types, such as \['sliding_attention', ",
        ),
        (
            tiny.transformer("qwen2", "CausalLM", use_sliding_window=False).config,
            {"sliding_window": 4},
            "student.sliding_window=4 has no",
        ),
        (BERT, {"initializer_range": -1.0}, "^student.initializer_range=-1.0 makes a model that does not run: .*std"),
        (LLAMA, {"num_atention_heads": 2}, "is not a setting of LlamaConfig; did you mean student.num_attention_heads"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_could_not_be_saved_or_run_is_refused_with_its_settings(base: Any, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_student(base, overrides, None, seed=0)


def test_what_a_class_derives_follows_the_other_settings() -> None:
    assert LLAMA.head_dim == 8
    config = student_config(LLAMA, {"hidden_size": 16}, None)
    assert (config.head_dim, config.hidden_size, config.num_key_value_heads) == (4, 16, 2)
    config = student_config(GEMMA3, {"num_hidden_layers": 7}, None)
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    suggested = ["sliding_attention"] * 3 + ["full_attention"]
    assert student_config(GEMMA3, {"num_hidden_layers": 4, "layer_types": suggested}, None).layer_types == suggested
    own = transformers.Gemma3TextConfig(**{**GEMMA3.to_dict(), "layer_types": ["full_attention", "sliding_attention"] * 3})
    config = student_config(own, {"num_hidden_layers": 3}, None)
    assert config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_ids_beyond_the_rows_are_none() -> None:
    """A library's defaults for a model that never uses them, such as GPT-2's 50256."""
    config = student_config(BERT, {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}, None, 600)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (600, None, None, 0)


VALUES: dict[type, Callable[[Any], list[Any]]] = {
    bool: lambda value: [not value, None, 2],
    int: lambda value: [value // 2, value - 1, value + 1, value * 2, 1, 2, 3, 0, -1, None, "x"],
    float: lambda value: [0.0, 0.5, 1.0, 2.0, -1.0, value * 10, None],
    str: lambda value: ["relu", "gelu", "silu", "foo", "", None],
    list: lambda value: [value[:-1], value * 2, value[::-1], [], None],
    dict: lambda value: [{}, {**value, "factor": 2.0}, None],
    type(None): lambda value: [1, 2, 8, 0.5, True, "gelu"],
}


@pytest.mark.parametrize("name", [*tiny.TRANSFORMERS, "gemma3", "gpt_neo"])
def test_a_student_is_refused_in_a_sentence_or_opens_as_it_was_saved(tmp_path: Path, name: str) -> None:
    """Random settings; what they are refused for is not looked at here, but that it is before the first step, by a ValueError."""
    head = "CausalLM" if name in tiny.DECODERS else "MaskedLM"
    base = {"gemma3": GEMMA3, "gpt_neo": GPT_NEO}.get(name) or tiny.transformer(name, head).config
    shared, draw, opened = transformers.PretrainedConfig().to_dict(), random.Random(name), 0
    names = [key for key in base.to_dict() if key not in {*shared, "model_type", "vocab_size"} and not key.startswith("_")]
    names = [key for key in names if not key.endswith("_token_id") and key != "use_cache"]
    for number in range(12):
        settings = {key: getattr(base, key) for key in draw.sample(names, 1 + number % 2)}
        overrides = {key: draw.choice(VALUES[type(value)](value)) for key, value in settings.items()}
        task = TaskHead("classification", 3) if number % 4 == 3 else None
        try:
            if task is None:
                student: Any = build_student(base, overrides, None, seed=0)
            else:
                with building(overrides):
                    student = build_task_model(student_config(base, overrides, None, head=task), task, seed=0, pad_id=0)
        except ValueError:
            continue
        folder = tmp_path / str(number)
        save_model(student, tiny.wordpiece(), folder)
        again = load_language_model(str(folder)) if task is None else load_task_model(str(folder), task, seed=1, needs_head=True)
        expected, found = student.model.state_dict(), again.model.state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected), overrides
        opened += 1
        ids = torch.arange(1, 4)[None]
        positions = longest_row(student)
        if positions is not None and positions < 3:
            continue
        with torch.no_grad():
            logits = [model.eval().model(input_ids=ids).logits for model in (student, again)]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert opened


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        (BERT, {"hidden_size": 16, "num_attention_heads": 2, "hidden_act": "relu", "type_vocab_size": 1}),
        (GPT2, {"n_embd": 16, "num_hidden_layers": 1}),
        (LLAMA, {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        (BERT, {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}),
    ],
)
def test_what_is_taken(base: Any, overrides: dict[str, Any]) -> None:
    config = student_config(base, overrides, None)
    assert isinstance(config, transformers.PretrainedConfig)
    for name, value in overrides.items():
        assert getattr(config, name) == value
