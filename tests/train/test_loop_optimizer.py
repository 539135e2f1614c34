"""The optimizer without bias correction, BertAdam, against its formula in float64, and across a stop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastkd.methods.objective import Objective, Stage
from fastkd.recipes import config_path, recipe_titles
from fastkd.train.batches import counter_torch_generator
from fastkd.train.config import StageArguments, read_config
from fastkd.train.loop import StageTrainer
from fastkd.train.schema import load_yaml
from tests.oracle import assert_close, relative_error
from tests.runs import same_bits
from tests.train.test_loop import Toy, same_end

STEPS, RATE, DECAY, BETAS, EPSILON = 200, 0.01, 0.1, (0.9, 0.999), 1e-6
SHAPES = {"matrix": (4, 3), "vector": (3,), "rare": (3,)}


@dataclass(frozen=True)
class Pull:
    """A batch that says what every parameter's gradient is."""

    input_ids: Tensor
    attention_mask: Tensor
    gradients: dict[str, Tensor]

    def to(self, device: torch.device | str) -> Pull:
        return self


def pull(generator: torch.Generator) -> Pull:
    """The third parameter has a gradient in some of the steps."""
    gradients = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    if gradients["vector"][0] < 0:
        del gradients["rare"]
    return Pull(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64), gradients)


class Pulled(Objective):
    """A linear loss, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        start = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        self.student = nn.ParameterDict(start)

    def weight(self, batch: Pull) -> float:
        return 1.0

    def forward(self, batch: Pull, denominator: float) -> Tensor:
        return torch.stack([(self.student[name] * gradient).sum() for name, gradient in batch.gradients.items()]).sum()


def trained(folder: Path, **settings: Any) -> dict[str, Tensor]:
    objective = Pulled()
    folder.mkdir()
    stage = Stage("pulled", objective, np.ones(STEPS), lambda indices, generator: pull(generator), None, "none", True)
    arguments = StageArguments(
        learning_rate=RATE,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        **settings,
    )
    StageTrainer(stage, arguments, folder, seed=0).run()
    return {name: value.detach() for name, value in objective.student.items()}


def bert_adam() -> dict[str, Tensor]:
    """The weights after all steps, by BertAdam's formula."""
    weights = {name: value.detach().clone() for name, value in Pulled().student.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    for step in range(STEPS):
        for name, gradient in pull(counter_torch_generator(0, step)).gradients.items():
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            update = first[name] / (second[name].sqrt() + EPSILON)
            weights[name] = weights[name] - RATE * (update + (DECAY * weights[name] if name == "matrix" else 0))
    return weights


def test_without_bias_correction_it_is_bert_adam(tmp_path: Path) -> None:
    start, truth = Pulled().student, bert_adam()
    found, corrected = trained(tmp_path / "without", bias_correction=False), trained(tmp_path / "with")
    for name, value in truth.items():
        assert_close(found[name], value, 1e-12, name)
        assert relative_error(corrected[name] - start[name], value - start[name]) > 0.2


def test_a_stop_changes_no_bit_of_it(tmp_path: Path) -> None:
    whole, stopped = (Toy(tmp_path / name, bias_correction=False, save_steps=2) for name in ("whole", "stopped"))
    result = whole.run()

    def stop(number: int) -> None:
        if number == 5:
            raise InterruptedError

    stopped.objective.on_batch = stop
    with pytest.raises(InterruptedError):
        stopped.run()
    resumed = Toy(tmp_path / "stopped", bias_correction=False, save_steps=2)
    assert same_end(whole, resumed, (result, resumed.run()))
    corrected = Toy(tmp_path / "corrected")
    corrected.run()
    assert not same_bits(whole.weights(), corrected.weights())


@pytest.mark.parametrize("name", [name for name in recipe_titles() if name.startswith("crild/") and "stdlib" not in name])
def test_recipes_of_cr_ild_have_the_optimizer_and_the_padding_of_its_code(name: str) -> None:
    for stage in read_config(load_yaml(config_path(name))).stages.values():
        assert stage.dataset is not None and (stage.bias_correction, stage.dataset.pad_to_max_length) == (False, True)
