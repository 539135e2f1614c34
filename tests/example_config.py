"""A config with every kind of field that a config may have, and what the tests ask of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from fastkd.train.schema import ConfigError, apply_flags, from_mapping, load_yaml


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 5e-5
    """Peak learning rate. Reached after `warmup_steps`."""

    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay rates of
    the moments."""

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be at least 0")
        if len(self.betas) > 2:
            raise ValueError("there are more than two betas")


@dataclass(frozen=True)
class Stage:
    max_steps: int
    """Optimizer steps of the stage."""

    optimizer: Optimizer = field(default_factory=Optimizer)
    """How the stage updates the student."""


def default_stages() -> dict[str, Stage]:
    return {"pretrain": Stage(100, Optimizer(1e-4)), "fine-tune": Stage(10)}


@dataclass
class Models:
    model_name_or_path: str
    """The student: a Hub name or a folder."""


@dataclass
class Run(Models):
    method: Literal["glmd", "crild", "ted"] = "glmd"
    """The method, e.g. glmd | ted."""

    bf16: bool = False
    """Train in bfloat16."""

    run_name: str | None = None
    """Name in the logs."""

    save_steps: int | float = 500
    """Steps between checkpoints; below 1, a fraction of all."""

    text_columns: list[str] = field(default_factory=list)
    """Columns that hold text."""

    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Handed to the model."""

    optimizer: Optimizer = field(default_factory=lambda: Optimizer(betas=(0.8, 0.9)))
    """How the student is updated."""

    teacher: Models | None = None
    """The teacher; none trains alone."""

    stages: dict[str, Stage] = field(default_factory=default_stages)
    """The stages in their order."""


STUDENT = {"model_name_or_path": "student"}


def problems(data: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Run, {**STUDENT, **data}, **options)
    return str(caught.value).splitlines()


def read_text(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_yaml(path)


def flags(*argv: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    return apply_flags(data or {}, argv, Run)
