"""`patch_head`: transformers' own losses and gradients, without logits in training, and a count that holds under Trainer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastkd.integrations.hf import patch_head, unpatch_head
from tests import multimodal, tiny
from tests.wrappers import PeftStandIn

MODELS = [("bert", "MaskedLM"), ("modernbert", "MaskedLM"), ("roberta", "MaskedLM"), ("gpt2", "CausalLM"), ("qwen2", "CausalLM")]


def model_of(name: str, head: str, **settings: Any) -> Any:
    """Without dropout: in training mode it computes what it does in evaluation mode."""
    model = tiny.transformer(name, head, **settings)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in [name for name in vars(model.config) if "drop" in name or "pdrop" in name]:
        setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def batch(rows: int = 3, width: int = 10) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 200, (rows, width), generator=generator)
    mask = (torch.arange(width) < torch.tensor([[width], [6], [9]])[:rows]).long()
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.6, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), labels, -100)}


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def error(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_the_loss_and_gradients_are_the_models_own_and_logits_are_not_made(name: str, head: str):
    plain = model_of(name, head).train()
    model = patch_head(copy.deepcopy(plain))
    expected, given = plain(**batch()), model(**batch())
    assert given.logits is None and "logits" not in given
    torch.testing.assert_close(given.loss, expected.loss, rtol=1e-5, atol=0)
    expected.loss.backward()
    given.loss.backward()
    assert error(gradients(model), gradients(plain)) < 1e-5


def test_no_tensor_of_tokens_times_vocabulary_is_saved_for_backward():
    model = patch_head(model_of("gpt2", "CausalLM")).train()
    inputs, sizes = batch(), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    assert sizes and not [size for size in sizes if len(size) > 1 and size[-1] == 200]


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_the_rest_stays(name: str, head: str, tmp_path: Path):
    plain = model_of(name, head)
    model = patch_head(copy.deepcopy(plain))
    inputs = batch()
    unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
    assert torch.equal(model.train()(**unlabelled).logits, plain.train()(**unlabelled).logits)
    given, expected = model.eval()(**inputs), plain.eval()(**inputs)
    assert torch.equal(given.logits, expected.logits)
    torch.testing.assert_close(given.loss, expected.loss, rtol=1e-5, atol=0)
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], given.loss) and torch.equal(as_tuple[1], given.logits)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    model.save_pretrained(tmp_path)
    opened = type(plain).from_pretrained(tmp_path).eval()
    assert opened.config.architectures == [type(plain).__name__] and torch.equal(opened(**unlabelled).logits, expected.logits)


def test_positional_arguments_and_shifted_labels():
    plain = model_of("bert", "MaskedLM")
    model = patch_head(copy.deepcopy(plain))
    inputs = batch()
    torch.testing.assert_close(model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss, plain(**inputs).loss)
    decoder = model_of("qwen2", "CausalLM")
    patched = patch_head(copy.deepcopy(decoder)).train()
    labels = inputs.pop("labels")
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    loss = patched(**inputs, shift_labels=following).loss
    torch.testing.assert_close(loss, decoder(**inputs, labels=labels).loss, rtol=1e-5, atol=0)


def test_unpatching_gives_the_models_own_forward_back():
    model = model_of("gpt2", "CausalLM").train()
    own = type(model)
    assert patch_head(patch_head(model)) is model and type(model) is not own
    assert type(unpatch_head(model)) is own and model(**batch()).logits is not None
    assert unpatch_head(model) is model


class OwnDecoder(transformers.LlamaForCausalLM):
    """As of somebody who changes a line of it."""


@pytest.mark.parametrize("name", ["subclass", *multimodal.MODELS])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_the_loss_is_the_models_own_whatever_its_class(name: str, scale: float):
    """At 0 the logits tell no label from another, and all losses are log V: the shift is not to be read off them."""
    model = tiny.llama(100) if name == "subclass" else multimodal.multimodal(name)
    if name == "subclass":
        model.__class__ = OwnDecoder
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale).add_(1e-4 * torch.randn(100, 32, generator=torch.Generator().manual_seed(0)))
    plain = copy.deepcopy(model)
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    expected, given = plain.train()(**inputs).loss, patch_head(model).train()(**inputs).loss
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=0)
    expected.backward()
    given.backward()
    assert error(gradients(model), gradients(plain)) < 1e-4


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_copies_are_patched_and_apart(make_copy: Callable[[Any], Any]):
    model = patch_head(model_of("gpt2", "CausalLM")).train()
    copied = make_copy(model)
    assert type(copied) is type(model) and copied.training and copied.transformer.wte.weight is copied.lm_head.weight
    given = copied(**batch())
    assert given.logits is None and torch.equal(given.loss, model(**batch()).loss)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert not torch.equal(copied(**batch()).loss, model(**batch()).loss)
    assert unpatch_head(copied)(**batch()).logits is not None


def test_the_vocabulary_may_grow_afterwards():
    """Which replaces the head; untied ones too."""
    for tied in (True, False):
        plain = tiny.llama(100, tie_word_embeddings=tied).train()
        model = patch_head(copy.deepcopy(plain))
        for each in (plain, model):
            torch.manual_seed(0)
            each.resize_token_embeddings(130, mean_resizing=False)
        inputs = {"input_ids": torch.tensor([[3, 120, 7, 129]]), "labels": torch.tensor([[3, 120, 7, 129]])}
        given = model(**inputs)
        assert given.logits is None
        torch.testing.assert_close(given.loss, plain(**inputs).loss, rtol=1e-5, atol=0)


def test_a_wrapped_model_is_refused_and_may_be_wrapped_afterwards():
    model = model_of("gpt2", "CausalLM").train()
    expected = model(**batch()).loss
    for wrap in (lambda model: torch.compile(model, backend="eager"), PeftStandIn):
        with pytest.raises(TypeError, match=r"wrapped in a .*; patch the model inside, and wrap it then"):
            patch_head(wrap(model))
        torch.testing.assert_close(wrap(patch_head(model))(**batch()).loss, expected, rtol=1e-5, atol=0)
        unpatch_head(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "head"), [("bert", "MaskedLM"), ("gpt2", "CausalLM")])
def test_a_count_replaces_the_number_of_labels(name: str, head: str, training: bool):
    model = patch_head(model_of(name, head)).train(training)
    inputs = batch()
    labels = inputs["labels"][:, 1:] if head == "CausalLM" else inputs["labels"]
    total = model(**inputs).loss * (labels != -100).sum()
    for count in (77, torch.tensor(77)):
        torch.testing.assert_close(model(**inputs, num_items_in_batch=count).loss, total / 77)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ignored", [0, 5])
def test_ignored_labels_are_those_that_the_caller_says(training: bool, ignored: int):
    plain = model_of("gpt2", "CausalLM").train(training)
    model = patch_head(copy.deepcopy(plain))
    inputs = batch()
    inputs["labels"] = inputs["labels"].where(inputs["labels"] != -100, ignored)
    for count in (None, 7):
        named = {**inputs, "ignore_index": ignored, "num_items_in_batch": count}
        torch.testing.assert_close(model(**named).loss, plain(**named).loss, rtol=1e-5, atol=0)
    encoder = patch_head(model_of("bert", "MaskedLM")).train(training)  # which plainly has no such keyword
    torch.testing.assert_close(encoder(**inputs, ignore_index=ignored).loss, encoder(**batch()).loss)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "head"), [("bert", "MaskedLM"), ("gpt2", "CausalLM")])
@pytest.mark.parametrize("keyword", ["label_smoothing", "weight", "reduction", "own"])
def test_other_keywords_of_a_loss_are_refused_by_name(name: str, head: str, keyword: str, training: bool):
    plain = model_of(name, head)
    theirs = plain.loss_function

    def own_loss(logits: Any, labels: Any, vocab_size: int, own: float = 0.0, **kwargs: Any) -> Any:
        return theirs(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)

    plain.loss_function = own_loss
    model = patch_head(plain).train(training)
    with pytest.raises(ValueError, match=f"{type(plain).__name__} was called with {keyword}, and its patched loss is the mean"):
        model(**batch(), **{keyword: 0.5})


def test_other_models_are_refused_and_left_as_they_are():
    from transformers import BartConfig, BartForCausalLM, MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

    with pytest.raises(TypeError, match="patch_head was given a Linear; give a masked or causal language model of transformers"):
        patch_head(torch.nn.Linear(3, 3))  # type: ignore[type-var]
    with pytest.raises(TypeError, match="BertForSequenceClassification has a NoneType as its output embedding"):
        patch_head(tiny.transformer("bert"))
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        patch_head(T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixture = MixtralForCausalLM(MixtralConfig(vocab_size=50, num_local_experts=2, output_router_logits=True, **shape))
    with pytest.raises(ValueError, match=r"MixtralForCausalLM computes another loss .*output_router_logits"):
        patch_head(mixture)
    assert type(mixture) is MixtralForCausalLM
    mixture.config.output_router_logits = False
    ids = torch.arange(1, 13).view(2, 6)
    assert patch_head(mixture).train()(input_ids=ids, labels=ids).logits is None
    with pytest.raises(ValueError, match=r"BartForCausalLM computes another loss .* not shift its labels"):  # as it does not
        patch_head(
            BartForCausalLM(BartConfig(vocab_size=50, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16))
        )
    decoder = model_of("gpt2", "CausalLM")
    theirs = decoder.loss_function
    decoder.loss_function = lambda *given, **named: 1.001 * theirs(*given, **named)
    with pytest.raises(ValueError, match="GPT2LMHeadModel computes another loss"):
        patch_head(decoder)


@pytest.mark.parametrize("patched", [True, False])
def test_trainers_accumulation_over_an_encoder_is_right_with_it_alone(tmp_path: Path, patched: bool):
    """BertForMaskedLM takes num_items_in_batch and does not read it: Trainer then adds up the means of its micro-batches."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'fastkd[hf]'")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    found: list[torch.Tensor] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
            found.append(gradients(model))

    model = model_of("bert", "MaskedLM")
    whole = copy.deepcopy(model).train()
    whole(**batch()).loss.backward()
    rows = [{key: value[i] for key, value in batch().items()} for i in range(3)]
    if patched:
        patch_head(model)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        max_steps=1,
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[Keep()]).train()
    assert (error(found[0], gradients(whole)) < 1e-5) is patched
