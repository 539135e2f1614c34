"""The LM head that hands its hidden states to a loss: same logits, same gradients, on every kind of head."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastkd
from fastkd.models.language_model import LanguageModel
from fastkd.models.load import load_language_model
from fastkd.vocab.map import VocabMap
from tests import tiny
from tests.oracle import assert_close

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make(name: str, **settings):
    config = transformers.CONFIG_MAPPING[name](**{**SMALL, **SPECIAL, **settings})
    kind = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return kind.from_config(config)


ENCODERS = ("bert", "roberta", "deberta-v2", "modernbert", "distilbert", "electra")
MODELS = {
    "bert": {},
    "roberta": {"max_position_embeddings": 64},
    "deberta-v2": {},
    "modernbert": {"sep_token_id": 2, "cls_token_id": 1},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.3, "query_pre_attn_scalar": 8},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_at_the_head_equals_the_loss_of_the_logits(name):
    """Through the head, value and every parameter's gradient are those of transformers' own logits."""
    model = make(name, **MODELS[name]).eval()
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(2))
    expected = torch.nn.functional.cross_entropy(model(ids).logits.double().flatten(0, 1), labels.flatten())
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wrapped = LanguageModel(model)
    assert wrapped.causal == (name not in ENCODERS)
    transform = wrapped.transform

    def at_head(hidden, weight, bias):
        return fastkd.linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=transform.softcap, logit_scale=transform.scale)

    loss = wrapped(ids, torch.ones_like(ids), at_head)
    loss.backward()
    assert_close(loss, expected, 1e-5)
    scale = torch.stack([g.norm() for g in gradients.values()]).max()
    for n, p in model.named_parameters():
        # Key biases cannot change attention: their gradient is rounding noise around zero.
        if n in gradients and gradients[n].norm() > 1e-6 * scale:
            assert_close(p.grad, gradients[n], 1e-4, n)
    assert set(gradients) == {n for n, p in model.named_parameters() if p.grad is not None}


def test_plain_calls_and_saved_weights_are_untouched(tmp_path):
    model = tiny.bert()
    ids = torch.arange(5, 15)[None]
    before, keys = model(ids).logits, set(model.state_dict())
    wrapped = LanguageModel(model)
    assert torch.equal(wrapped(ids), before) and set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert torch.equal(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)(ids).logits, before)


def test_what_enters_the_head_may_be_a_parameter():
    """And may be handed out: nn.Module would take it for one of its own."""
    model = LanguageModel(tiny.llama())
    hidden = torch.nn.Parameter(torch.randn(3, 32))
    assert model.through_head(hidden, lambda hidden, weight, bias: hidden) is hidden
    assert model.through_head(hidden, lambda hidden, weight, bias: hidden @ weight.T).requires_grad
    assert "result" not in dict(model.head.named_parameters())


def test_an_unknown_operation_after_the_head_is_refused():
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits = output.logits * 2.0
            return output

    model = tiny.llama()
    model.__class__ = Doubled
    with pytest.raises(ValueError, match="does not know"):
        LanguageModel(model)


def test_weights_that_are_not_numbers_are_refused_by_the_models_name(tmp_path):
    model = tiny.bert()
    torch.nn.init.constant_(model.bert.encoder.layer[1].output.dense.bias, float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"logits of BertForMaskedLM {tmp_path} are not finite: weights hold NaN or infinity"):
        load_language_model(str(tmp_path))


def test_an_encoder_decoder_is_refused_as_what_it_is():
    small = {"vocab_size": 60, "d_model": 8, "d_ff": 8, "d_kv": 8, "num_layers": 1, "num_heads": 1}
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder; give a masked or a causal"):
        LanguageModel(transformers.T5ForConditionalGeneration(transformers.T5Config(**small)))


def test_ids_become_slots_and_back():
    kept = VocabMap.from_counts(torch.arange(700, 0, -1), keep=256, multiple_of=1)
    vocab_map = kept.assign_stand_ins(torch.randn(700, 8, generator=torch.Generator().manual_seed(0)))
    model = LanguageModel(tiny.llama(256), vocab_map)
    ids = torch.tensor([[3, 600, 255, 699]])
    assert torch.equal(model(ids), model.model(vocab_map.id_to_slot[ids]).logits)
    labels = torch.tensor([[-100, 600]])
    assert model.to_slots(labels, ignore_index=-100).tolist() == [[-100, int(vocab_map.id_to_slot[600])]]
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    slots = model.model.generate(vocab_map.id_to_slot[ids], max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(generated, vocab_map.decode_ids(slots))


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match="keeps 64"):
        LanguageModel(tiny.llama(256), VocabMap.identity(64))
