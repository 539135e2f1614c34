"""Numbers of the authors' own code (tests/fixtures/authors, whose README says what they are), and how ours are held against them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracle import assert_close

FOLDER = Path(__file__).parent / "fixtures" / "authors"
ZERO_ON_PAPER = 1e-9
"""Share of the largest gradient: what rounding leaves of one that is zero, such as that of a key's bias under a softmax."""


@functools.cache
def _tensors(file: str) -> dict[str, Tensor]:
    return load_file(FOLDER / file)


@dataclass(frozen=True)
class Case:
    """One entry of index.json."""

    name: str
    settings: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name in the case's file."""
        return _tensors(self["file"])[name]

    def own(self, name: str) -> Tensor:
        """The case's own tensor of this name."""
        return self.tensor(self["prefix"] + name)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin with `prefix`, by what follows it."""
        return {name.removeprefix(prefix): x for name, x in _tensors(self["file"]).items() if name.startswith(prefix)}

    def gradients(self, of: str = "grad/") -> dict[str, Tensor]:
        """The authors' gradients, by the names of what they are taken for."""
        return self.under(self["prefix"] + of)


def cases(method: str, *stages: str) -> list[Case]:
    """The cases of these stages of a method."""
    found = [Case(entry["case"], entry) for entry in json.loads((FOLDER / "index.json").read_text())["cases"]]
    return [case for case in found if case["method"] == method and case["stage"] in stages]


def assert_authors(case: Case, loss: Tensor, parameters: Mapping[str, Tensor], of: str = "grad/") -> None:
    """The loss is the authors', and so is its gradient for each of `parameters`, which have the authors' names."""
    assert_close(loss, case.own("loss"), case["tolerance"]["value"], "loss")
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    assert_gradients(dict(zip(parameters, found, strict=True)), case.gradients(of), case["tolerance"]["gradient"])


def assert_gradients(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Each gradient is the expected one. None is expected where there is no entry, or one that is zero but for rounding."""
    assert expected.keys() <= found.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in found.items():
        truth = expected.get(name)
        if truth is not None and float(truth.norm()) > 1e-7 * largest:
            assert gradient is not None, name
            assert_close(gradient, truth, tolerance, name)
        elif gradient is not None:
            assert float(gradient.norm()) <= max(tolerance, ZERO_ON_PAPER) * largest, name
