"""Write docs/configuration.md from the docstrings of the configuration. `make docs` runs it; a test says when it is due."""

from __future__ import annotations

from pathlib import Path

from fastkd.methods.registry import METHODS
from fastkd.train.config import RunConfig
from fastkd.train.schema import docs_table

HEAD = """# Configuration

Keys of a YAML file for `fastkd train`, and flags (`--key value`) that override it. Keys at the top hold for every stage that does not
set its own under `stages.NAME`; a flag overrides every stage, `--stages.NAME.key value` one of them.
"""


def page() -> str:
    parts = [HEAD, docs_table(RunConfig)]
    for name, method in METHODS.items():
        stages = ", ".join(f"`{spec.name}`" for spec in method.stages)
        parts += [f"\n## `options` of method `{name}`\n\nStages: {stages}.\n", docs_table(method.options)]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
