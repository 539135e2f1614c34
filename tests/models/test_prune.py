"""Pruned models: the logits of kept ids, dtypes, buffers and configurations are those of the whole model, or it is refused by name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import CONFIG_MAPPING, GenerationConfig

from fastkd.models.language_model import LanguageModel
from fastkd.models.load import auto_class, longest_row
from fastkd.models.prune import padding_ids, prune_model
from fastkd.models.student import build_student, student_config
from fastkd.vocab.map import VocabMap
from tests import tiny

IDS, KEPT = 200, 120
SHAPE = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "hidden_dim", "n_inner"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "vocab_size": IDS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
OWN = {
    "flaubert": {"mask_index": 3},
    "gemma4_text": {"vocab_size_per_layer_input": IDS, "hidden_size_per_layer_input": 8},
    "gemma3n_text": {
        "vocab_size_per_layer_input": IDS - 20,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "laurel_rank": 4,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 8},
    "xlm": {"mask_index": 3},
    "xmod": {"default_language": "en_XX"},
}
COUNTS_FROM_PAD = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip
ENCODERS = (
    *COUNTS_FROM_PAD, "albert", "bert", "big_bird", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert",
    "flaubert", "fnet", "gte", "layoutlm", "megatron-bert", "modernbert", "nomic_bert", "nystromformer", "rembert", "roformer",
    "squeezebert", "xlm", "yoso",
)  # fmt: skip
DECODERS = (
    "afmoe", "apertus", "biogpt", "bitnet", "bloom", "cohere", "cohere2", "diffllama", "ernie4_5", "exaone4", "falcon",
    "falcon_mamba", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_oss", "gptj", "granite", "jamba", "jetmoe", "lfm2", "llama", "mamba",
    "marian", "mistral", "mixtral", "modernbert-decoder", "moshi", "mpt", "nemotron", "olmo2", "olmoe", "openai-gpt", "opt",
    "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "recurrent_gemma", "rwkv", "smollm3", "stablelm",
    "starcoder2", "whisper", "xglm",
)  # fmt: skip
REFUSED = {"moshi": "model.embed_tokens.weight of MoshiForCausalLM is (201, 32) for 200 ids"}
FLOAT32_ONLY = ("deberta", "fnet")  # their own operations have no other kind


def family(kind: str, **settings):
    """A model of that architecture with 2 layers, 200 ids and large weights, none of which, such as biases, are all equal."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict().keys() | config_class.attribute_map.keys() | {"pad_token_id", "bos_token_id", "eos_token_id"}
    shape = {name: value for name, value in SHAPE.items() if name in known}
    torch.manual_seed(0)
    config = config_class(**{**shape, **OWN.get(kind, {}), **settings})
    model = auto_class(config).from_config(config).eval()
    # ESM adds its bias after the head, and fastkd refuses a model that does so.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{kind} {name}" != "esm lm_head.bias" and parameter.is_floating_point() and (parameter == parameter.flatten()[0]).all():
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def issue_map(pins: dict[int, int] | None = None) -> VocabMap:
    """120 of 200 ids, of which 1, the padding id, is the rarest."""
    counts = torch.arange(IDS)
    counts[1] = 0
    chosen = VocabMap.from_counts(counts, KEPT, protected=[0, 1, 2, 3], multiple_of=8, exclude=range(IDS - 20, IDS))
    return chosen.pin(pins or {}).assign_stand_ins(torch.randn(IDS, 4, generator=torch.Generator().manual_seed(0)))


def pinned_map(model) -> VocabMap:
    return issue_map({number: number for number in padding_ids(model) if number < 4})


def opened(model, folder, dtype=torch.float32):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def assert_same_logits(whole, pruned, vocab_map, length=20):
    """On rows of kept ids, one of which is padded."""
    slots = torch.randint(4, vocab_map.num_kept, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(slots)
    slots[1, -5:], mask[1, -5:] = vocab_map.id_to_slot[1], 0
    inputs = {"attention_mask": mask, **({"use_cache": False} if LanguageModel(pruned).causal else {})}
    expected = whole(input_ids=vocab_map.decode_ids(slots), **inputs).logits[..., vocab_map.kept_ids].float()
    found = pruned(input_ids=slots, **inputs).logits.float()
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max() * max(1e-5, 2 * torch.finfo(whole.dtype).eps)))


FAMILIES = [(kind, torch.float32) for kind in (*ENCODERS, *DECODERS)]
FAMILIES += [(kind, torch.bfloat16) for kind, _ in FAMILIES if kind not in FLOAT32_ONLY]


@pytest.mark.parametrize(("kind", "dtype"), FAMILIES)
def test_every_family_opens_with_the_logits_that_it_had_or_is_refused(kind, dtype, tmp_path):
    whole = opened(family(kind), tmp_path / "whole", dtype)
    if kind in REFUSED:
        with pytest.raises(ValueError, match=re.escape(REFUSED[kind])):
            prune_model(whole, pinned_map(whole))
        return
    vocab_map = pinned_map(whole)
    pruned = prune_model(whole, vocab_map)
    assert pruned.model.dtype == dtype and pruned.vocabulary == KEPT
    assert_same_logits(whole, opened(pruned.model, tmp_path / "pruned", dtype), vocab_map)


@pytest.mark.parametrize("kind", COUNTS_FROM_PAD)
def test_models_whose_padding_id_is_counted_from_are_refused_where_it_moved(kind):
    with pytest.raises(ValueError, match=r" on 120 ids has other logits .* count from the number of its padding id, .*vocab_map\.pin"):
        prune_model(family(kind), issue_map())


@pytest.mark.parametrize("kind", [*COUNTS_FROM_PAD, "xglm"])
def test_a_padding_slot_beyond_the_positions_is_refused_in_a_sentence(kind):
    """Where the architecture itself fails with an AssertionError or an IndexError."""
    with pytest.raises(ValueError, match=r" on 120 ids .* count from the number of its padding id, .*vocab_map\.pin"):
        prune_model(family(kind, max_position_embeddings=32), issue_map({1: 110}))


def test_the_remedy_that_is_named_gives_the_logits_as_they_were():
    """Without any further call, such as eval(): the pruned model is in the mode of the whole one."""
    torch.manual_seed(0)
    model, counts = family("roberta", max_position_embeddings=114), torch.arange(IDS)
    counts[1] = 0
    chosen = VocabMap.from_counts(counts, 0.6, protected=[0, 1, 2, 3], multiple_of=8).assign_stand_ins(torch.randn(IDS, 4))
    with pytest.raises(ValueError, match=r"vocab_map\.pin\(\{1: 1\}\)\.$"):
        prune_model(model, chosen)
    pinned = chosen.pin({1: 1})
    assert_same_logits(model, prune_model(model, pinned).model, pinned, length=112)


def test_a_padding_id_that_is_not_kept_is_named():
    model = family("roberta")
    chosen = VocabMap.from_counts(torch.arange(IDS), KEPT, protected=[0, 2, 3], multiple_of=8)
    with pytest.raises(ValueError, match=r"padding id, 1\. Let it stay: protect it"):
        prune_model(model, chosen)


def test_every_id_kept_in_another_order():
    """The number of rows does not say which tables are by id."""
    model = family("gemma4_text")
    everything = VocabMap.from_counts(torch.arange(IDS), IDS)
    assert_same_logits(model, prune_model(model, everything).eval().model, everything)


@pytest.mark.parametrize("tied", [True, False])
def test_the_bias_of_a_head_beside_it_is_gathered(tied, tmp_path):
    model = tiny.bert(IDS, tie_word_embeddings=tied)
    vocab_map = issue_map()
    pruned = opened(prune_model(model, vocab_map).model, tmp_path)
    assert_same_logits(model, pruned, vocab_map)
    assert len(pruned.cls.predictions.bias) == KEPT


def test_weights_and_buffers_are_copied_in_their_dtypes(tmp_path):
    """Positions 1900 to 2000 of a 16-bit model: its rotary frequencies are float32."""
    model = opened(family("llama", max_position_embeddings=2048), tmp_path, torch.bfloat16)
    vocab_map = issue_map()
    pruned = prune_model(model, vocab_map).eval()
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in [*pruned.model.named_parameters(), *pruned.model.named_buffers()]:
        expected = named[name][vocab_map.kept_ids] if len(tensor) == KEPT else named[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    ids = vocab_map.kept_ids[torch.randint(KEPT, (1, 2000), generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        likeliest = [logits[0, 1900:].argmax(-1) for logits in (model(ids).logits[..., vocab_map.kept_ids], pruned(ids))]
    assert torch.equal(*likeliest)


def test_the_generation_configuration_goes_on_with_slots(tmp_path):
    model = family("llama")
    # As published models have it: transformers warns of a temperature without sampling, and saves it as long as nothing was changed.
    generation = {"eos_token_id": [4, 190, 5], "bos_token_id": 3, "pad_token_id": 1, "temperature": 0.6, "max_new_tokens": 7}
    ids = {"suppress_tokens": [6, 191], "begin_suppress_tokens": [192], "bad_words_ids": [[7, 8], [7, 193]], "forced_eos_token_id": 194}
    ids["sequence_bias"] = [[[9], -2.0], [[9, 195], 1.0]]
    (tmp_path / "generation_config.json").write_text(json.dumps({**generation, **ids}))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    chosen = VocabMap.from_counts(torch.arange(IDS, 0, -1), KEPT, protected=[9, 8, 7, 3], multiple_of=8)
    pruned = prune_model(model, chosen).model
    pruned.save_pretrained(tmp_path / "pruned")
    found = GenerationConfig.from_pretrained(tmp_path / "pruned")
    slot = chosen.id_to_slot.tolist()
    assert found.eos_token_id == [slot[4], slot[5]] and found.bos_token_id == slot[3] and found.pad_token_id == slot[1]
    assert found.suppress_tokens == [slot[6]] and found.begin_suppress_tokens is None and found.forced_eos_token_id is None
    assert found.bad_words_ids == [[slot[7], slot[8]]] and found.sequence_bias == [[[slot[9]], -2.0]]
    assert found.temperature == 0.6 and found.max_new_tokens == 7
    assert model.generation_config.eos_token_id == [4, 190, 5]


def test_special_ids_become_slots_and_dropped_ones_none():
    config = family("llama", eos_token_id=[190, 4], bos_token_id=191).config
    student = student_config(config, {}, issue_map())
    assert student.bos_token_id is None and student.eos_token_id is None  # both are dropped
    assert student_config(config, {}, VocabMap.identity(IDS)).eos_token_id == [190, 4]
    model = family("xlm", mask_index=190)
    with pytest.raises(ValueError, match="mask_index=190 of XLMConfig is not kept; name it in protected"):
        prune_model(model, issue_map())


@pytest.mark.parametrize(("kind", "pins"), [("roberta", {}), ("roberta", {1: 1}), ("roberta", {1: 90}), ("esm", {1: 90}), ("bert", {})])
def test_new_students_have_as_many_positions_as_their_teacher(kind, pins):
    teacher = family(kind)
    student = build_student(teacher.config, {"num_hidden_layers": 1}, issue_map(pins), seed=0)
    assert longest_row(student.model) == longest_row(teacher) == (64 if kind == "bert" else 62)
    student(torch.full((1, longest_row(teacher)), 150))


def test_a_mapped_student_is_pruned_by_a_map_over_its_ids():
    whole = family("roberta")
    mapped = prune_model(whole, issue_map({1: 1}))
    first = mapped.vocab_map
    order = first.kept_ids.tolist()
    kept = torch.tensor([order[3], 1, *order[70:90]])
    slots = first.id_to_slot.clone().fill_(-1).index_copy_(0, kept, torch.arange(len(kept)))
    both = VocabMap(kept, slots)
    mapped.slot_bias = torch.randn(KEPT)  # as of a student that answers for all ids
    pruned = prune_model(mapped, both)
    assert_same_logits(whole, pruned.eval().model, both)
    assert torch.equal(pruned.slot_bias, mapped.slot_bias[first.id_to_slot[kept]])
    lost = int((~first.is_kept).nonzero()[0])
    kept[4] = lost
    slots = slots.fill_(-1).index_copy_(0, kept, torch.arange(len(kept)))
    with pytest.raises(ValueError, match=f"keeps id {lost}, which the model has no row of its own for: it keeps 120 of 200 ids"):
        prune_model(mapped, VocabMap(kept, slots))


def test_what_has_no_row_and_what_is_another_model_is_refused():
    with pytest.raises(ValueError, match=r"keeps id 209, and model.embed_tokens.weight of LlamaForCausalLM is \(200, 32\)"):
        prune_model(family("llama"), VocabMap.from_counts(torch.arange(210), 20, multiple_of=1))
    changed = family("llama")
    changed.model.layers.append(changed.model.layers[0])
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM has model\.layers\.2.* and the model that its configuration describes has not"
    ):
        prune_model(changed, issue_map())
    with pytest.raises(TypeError, match="encoder-decoder"):
        prune_model(family("bart"), issue_map())


def test_a_model_that_computes_with_ids_is_refused():
    from transformers import LlamaForCausalLM

    class Parity(LlamaForCausalLM):
        def forward(self, input_ids, **inputs):
            return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) * (1 + input_ids % 2)[..., None], **inputs)

    with pytest.raises(ValueError, match=r"Parity on 120 ids has other logits than before .* it computes with the numbers of ids"):
        prune_model(Parity(family("llama", pad_token_id=None).config).eval(), issue_map())


@pytest.mark.parametrize("training", [True, False])
def test_pruning_leaves_the_model_and_the_generator_as_they_were(training):
    model = family("llama").train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    pruned = prune_model(model, issue_map())
    assert torch.equal(torch.get_rng_state(), state) and model.training is pruned.training is training
    with torch.no_grad():
        for parameter in pruned.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
