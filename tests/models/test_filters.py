"""Filter banks: what they compute, where their numbers come from, their files; and the heads that train them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DebertaV2Config

from fastkd.models.filters import FilterBank, FilterHeads, SequenceHead, hidden_width, reads_last_token
from fastkd.models.language_model import LanguageModel
from fastkd.models.task_model import TaskHead, TaskModel, build_task_model
from fastkd.tasks.encoded import TaskBatch
from fastkd.tasks.text import TextBatch
from tests import tiny
from tests.oracle import assert_close


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def task_model(head: TaskHead, make=tiny.bert, **settings) -> TaskModel:
    return build_task_model(make(90, **settings).config, head, seed=0, pad_id=0)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(tiny.bert(90, hidden_size=48, hidden_act="gelu_new").double())


@pytest.mark.parametrize("nonlinear", [False, True])
def test_a_filter_is_its_features_and_one_linear(model, nonlinear):
    bank = FilterBank.of(model, (1, 2), seeded(), filter_width=24, nonlinear=nonlinear)
    states = torch.randn(2, 5, 48, dtype=torch.float64, generator=seeded())
    for k in range(2):
        weights = dict(bank.named_parameters())
        features = states
        if nonlinear:
            inner = states @ weights[f"first.{k}.0.weight"].T + weights[f"first.{k}.0.bias"]
            features = torch.nn.functional.gelu(inner, approximate="tanh")
        assert_close(bank.features(k, states), features, 1e-12)
        expected = features @ weights[f"last.{k}.weight"].T + weights[f"last.{k}.bias"]
        assert_close(bank.filtered(k, states), expected, 1e-12)
        last = bank.last_linear(k)
        assert_close(torch.nn.functional.linear(bank.features(k, states), last.weight, last.bias), expected, 1e-12)
    assert FilterBank.of(model, (1, 2), seeded()).shape.filter_width == 48 == hidden_width(model)


def test_numbers_come_from_the_given_generator_alone(model):
    before = torch.get_rng_state()
    bank, same, other = (FilterBank.of(model, (1, 2), seeded(seed), filter_width=64, nonlinear=True) for seed in (1, 1, 2))
    heads = FilterHeads(model, bank.shape, seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in bank.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        if name.endswith("bias"):
            assert not value.any()
            continue
        assert not torch.equal(value, other.state_dict()[name])
        assert float(value.std()) == pytest.approx(model.model.config.initializer_range, rel=0.1) and abs(float(value.mean())) < 0.02
    assert not torch.equal(bank.last[0].weight, bank.last[1].weight)
    assert all(p.dtype == torch.float64 and p.requires_grad for p in (*bank.parameters(), *heads.parameters()))


def test_files_hold_the_same_bits_and_say_what_they_belong_to(model, tmp_path):
    bank = FilterBank.of(model, (1, 2), seeded(), filter_width=24, nonlinear=True)
    bank.save(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    metadata = json.loads((tmp_path / "filters.json").read_text())["metadata"]
    assert metadata == {"layers": [1, 2], "width": 48, "filter_width": 24, "nonlinear": True, "activation": "gelu_new"}
    loaded = FilterBank.load(tmp_path, layers=(1, 2), width=48)
    assert loaded.shape == bank.shape
    for name, value in bank.state_dict().items():
        assert value.dtype == torch.float64 and torch.equal(value, loaded.state_dict()[name])


def test_files_of_another_model_are_refused(model, tmp_path):
    FilterBank.of(model, (1, 2), seeded()).save(tmp_path)
    with pytest.raises(ValueError, match=r"for layers \[1, 2\], and layers \[2\] is needed"):
        FilterBank.load(tmp_path, layers=[2])
    with pytest.raises(ValueError, match="for width 48, and width 32 is needed"):
        FilterBank.load(tmp_path, width=32)
    with pytest.raises(FileNotFoundError, match="no filters"):
        FilterBank.load(tmp_path / "elsewhere")
    (tensors,) = tmp_path.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="was changed after it was written"):
        FilterBank.load(tmp_path)


def test_heads_read_only_the_positions_that_they_need():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    batch = TaskBatch(mask * 7, mask, None, torch.tensor([0, 1, 2]))
    encoder, decoder = (task_model(TaskHead("classification", 3), make) for make in (tiny.bert, tiny.llama))
    questions = task_model(TaskHead("question_answering", 2))
    assert [reads_last_token(m) for m in (encoder, decoder, questions)] == [False, True, False]
    positions = [heads_of(m).positions(batch) for m in (encoder, decoder, questions)]
    assert positions[0].tolist() == [0, 4, 8] and positions[1].tolist() == [2, 7, 8] and positions[2] is None
    labels = torch.tensor([[-100, 5, -100, -100], [-100, -100, -100, 6], [-100] * 4])
    text = heads_of(LanguageModel(tiny.llama(90))).positions(TextBatch(mask * 7, mask, labels))
    assert text.tolist() == [1, 7]


def heads_of(model, filter_width: int = 20) -> FilterHeads:
    return FilterHeads(model, FilterBank.of(model, (1, 2), seeded(), filter_width=filter_width).shape, seeded())


@pytest.mark.parametrize(
    ("kind", "outputs", "expected"),
    [("classification", 3, (6, 3)), ("regression", 1, (6,)), ("multiple_choice", 1, (2, 3)), ("question_answering", 2, (6, 2, 8))],
)
def test_scores_have_the_task_models_shape(kind, outputs, expected):
    heads = heads_of(task_model(TaskHead(kind, outputs)))
    filtered = torch.randn(*((6, 8, 20) if kind == "question_answering" else (6, 20)))
    assert heads.scores(1, filtered, 3).shape == expected


def test_a_language_models_head_costs_no_vocabulary():
    model = LanguageModel(tiny.bert(600))
    heads = heads_of(model)
    assert sum(p.numel() for p in heads.parameters()) == 2 * (20 * 32 + 32)
    assert heads.scores(0, torch.randn(5, 20)).shape == (5, 32)


def test_a_sequence_head_is_debertas_pooler_and_classifier():
    config = DebertaV2Config(pooler_dropout=0.2, cls_dropout=0.3, pooler_hidden_act="tanh", hidden_dropout_prob=0.1)
    head = SequenceHead(6, 2, config)
    assert (head.pooler_dropout.p, head.dropout.p) == (0.2, 0.3)
    assert SequenceHead(6, 2, DebertaV2Config(hidden_dropout_prob=0.1)).dropout.p == 0.1
    for p in head.parameters():
        torch.nn.init.normal_(p)
    token = torch.randn(3, 6)
    expected = head.classifier(torch.tanh(head.dense(token)))
    assert torch.equal(head.eval()(token), expected)
