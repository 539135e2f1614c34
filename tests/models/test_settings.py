"""Settings of a new student: which are refused, by which name, and that no weight is made for it."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from fastkd.models.student import build_student, student_config
from tests import tiny

BERT = tiny.bert().config
LLAMA = tiny.llama().config
GPT2 = tiny.transformer("gpt2", "CausalLM").config


@pytest.mark.parametrize(
    ("base", "overrides", "said"),
    [
        (BERT, {"hidden_size": 33.0}, "student.hidden_size cannot be 33.0: "),
        (BERT, {"hidden_size": None}, "student.hidden_size cannot be None: "),
        (BERT, {"hidden_size": True}, "student.hidden_size cannot be True: "),
        (BERT, {"classifier_dropout": "much"}, "student.classifier_dropout cannot be 'much': "),
        (BERT, {"hidden_size": 33, "intermediate_size": 8}, "student.hidden_size=33 makes no bert model: ValueError: The hidden size"),
        (BERT, {"hidden_dropout_prob": 2.0}, "student.hidden_dropout_prob=2.0 makes no bert model: "),
        (BERT, {"hidden_size": 2**20}, "GiB in float32, and this machine has"),
        (BERT, {"max_position_embeddings": 0}, "student.max_position_embeddings is 0; it must be at least 1."),
        (BERT, {"num_hidden_layers": 10**9}, "student.num_hidden_layers is 1000000000; it must be at least 1 and at most 1000."),
        (GPT2, {"n_layer": 0}, "student.n_layer is 0; it must be at least 1"),
        (GPT2, {"num_hidden_layers": -1}, "student.num_hidden_layers is -1; it must be at least 1"),
        (LLAMA, {"hidden_act": "foo"}, "student.hidden_act='foo' makes no llama model: "),
        (LLAMA, {"rope_parameters": {"rope_type": "foo"}}, "student.rope_parameters={'rope_type': 'foo'} makes no llama model: "),
        (BERT, {"vocab_size": 100}, "student.vocab_size has no effect: the vocabulary is the tokenizer's"),
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


def test_what_builds_and_does_not_run_is_refused_with_its_settings() -> None:
    with pytest.raises(ValueError, match=r"^student.num_key_value_heads=3 makes a model that does not run: "):
        build_student(LLAMA, {"num_key_value_heads": 3}, None, seed=0)


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        (BERT, {"hidden_size": 16, "num_attention_heads": 2, "hidden_act": "relu", "type_vocab_size": 1, "pad_token_id": None}),
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
