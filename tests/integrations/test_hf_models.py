"""What a transformers model is for is asked of its class and of those that it is derived from, through whatever wraps it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fastkd.integrations.hf_models import as_fastkd_model, batch_of
from fastkd.integrations.hf_objectives import make_objective
from fastkd.models.language_model import LanguageModel
from fastkd.models.task_model import TaskModel
from tests import multimodal, tiny
from tests.wrappers import PeftStandIn


def derived(model: Any) -> Any:
    """The model as one of a subclass of its class, which is in no list of transformers."""
    model.__class__ = type("Own", (type(model),), {})
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "subclass": derived,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "PEFT": PeftStandIn,
    "all": lambda model: torch.compile(PeftStandIn(derived(model)), backend="eager"),
}
TASKS = {"classification": ("SequenceClassification", 3), "regression": ("SequenceClassification", 1)}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_tasks_model_is_one_in_every_wrapping(wrap: Any):
    for kind, (head, labels) in {**TASKS, "question_answering": ("QuestionAnswering", 2)}.items():
        found = as_fastkd_model(wrap(tiny.transformer("bert", head, num_labels=labels)))
        assert isinstance(found, TaskModel) and found.kind == kind
    assert isinstance(as_fastkd_model(wrap(tiny.transformer("bert", "MaskedLM"))), LanguageModel)


@pytest.mark.parametrize("name", ["llama", *multimodal.MODELS])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_decoders_loss_is_the_one_that_transformers_computes(name: str, wrap: Any):
    """Labels that are not shifted teach it to repeat what it reads."""
    model = tiny.llama(100) if name == "llama" else multimodal.multimodal(name)
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    expected = model(**inputs).loss
    objective = make_objective(wrap(model), None, "lm", {})
    batch = batch_of(inputs, objective.student)
    torch.testing.assert_close(objective(batch, objective.weight(batch)), expected, rtol=1e-5, atol=0)


def test_what_is_no_model_is_refused_by_name():
    with pytest.raises(TypeError, match="'runs/student' is a str; give a model, as transformers' from_pretrained returns it"):
        as_fastkd_model("runs/student")  # type: ignore[arg-type]
    widths = ("hidden_size", "embedding_size", "intermediate_size", "true_hidden_size", "intra_bottleneck_size")
    shape = {**dict.fromkeys(widths, 16), "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(vocab_size=60, **shape))
    with pytest.raises(TypeError, match="MobileBertForMaskedLM computes its logits without calling its output embedding"):
        as_fastkd_model(model)
