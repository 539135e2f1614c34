"""The generated page is up to date, and the README's Python runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_the_configuration_page_is_generated_from_the_docstrings():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == generate.page(), "run `make docs`"


def test_the_readmes_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    names = {
        "torch": torch,
        "student_backbone": torch.nn.Embedding(50, 8),
        "teacher_backbone": torch.nn.Embedding(50, 16),
        "student_head": torch.nn.Linear(8, 50, bias=False),
        "teacher_head": torch.nn.Linear(16, 50, bias=False),
        "input_ids": torch.randint(50, (2, 7)),
        "attention_mask": torch.ones(2, 7),
    }
    exec(snippet, names)
    assert names["loss"].isfinite() and names["student_head"].weight.grad.abs().sum() > 0
