"""Write everything in README and docs that follows from code and committed JSON. `make docs` runs it; tests say when it is due.

docs/configuration.md comes from the docstrings of the configuration, as does fastkd/cli/methods.json, docs/benchmarks.md with its plots
and the README's table from `fastkd bench report`, and what stands between comments that name a script of benchmarks/ from that script.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

from fastkd.benchmarks import page, quickstart_tables, report
from fastkd.benchmarks.claim import RESULTS
from fastkd.cli.train_help import METHODS_FILE
from fastkd.methods.registry import METHODS
from fastkd.train.config import RunConfig
from fastkd.train.schema import docs_table, key_rows

ROOT = Path(__file__).parent.parent
HEAD = """# Configuration

Keys of a YAML file for `fastkd train`, and flags (`--key value`) that override it. Keys at the top hold for every stage that does not
set its own under `stages.NAME`; a flag overrides every stage, `--stages.NAME.key value` one of them.
"""


def configuration() -> str:
    """docs/configuration.md."""
    parts = [HEAD, docs_table(RunConfig)]
    for name, method in METHODS.items():
        stages = ", ".join(f"`{spec.name}`" for spec in method.stages)
        parts += [f"\n## `options` of method `{name}`\n\nStages: {stages}.\n", docs_table(method.options)]
    return "\n".join(parts)


def methods() -> str:
    """fastkd/cli/methods.json: stages and options of every method, which `fastkd train --help` shows without importing torch."""
    found = {
        name: {"stages": [spec.name for spec in method.stages], "options": list(key_rows(method.options))}
        for name, method in METHODS.items()
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def pages() -> list[Path]:
    """Every page that people read, from the top of the repository."""
    return [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").rglob("*.md"))]


def run(script: str, target: Path) -> None:
    """Let a script of benchmarks/ write its block of the page anew."""
    module, *arguments = script.split()
    if import_module(f"fastkd.benchmarks.{module}").main([*arguments, "--write-docs", str(target)]) != 0:
        raise SystemExit(f"{target}: `{script}` failed.")


def main() -> None:
    os.chdir(ROOT)
    Path("docs/configuration.md").write_text(configuration(), encoding="utf-8")
    METHODS_FILE.write_text(methods(), encoding="utf-8")
    report.write_report(RESULTS, Path("docs"), Path("README.md"))
    quickstart_tables.draw(RESULTS, Path("docs/quickstart.png"))
    for target in pages():
        for script in page.scripts(target):
            run(script, target)


if __name__ == "__main__":
    main()
