"""What README and docs have from code and from committed JSON is what these say; `make docs` writes it anew."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from fastkd.benchmarks import page, quickstart_tables
from fastkd.cli.train_help import METHODS_FILE
from tests.docs.pages import PAGES, ROOT, name_of

RESULTS = ROOT / "benchmarks" / "results"
WRITTEN = [(name_of(path), script) for path in PAGES for script in page.scripts(path)]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_that_of_the_docstrings(generate: ModuleType) -> None:
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == generate.configuration(), "run `make docs`"


def test_the_help_of_train_has_the_options_of_the_methods(generate: ModuleType) -> None:
    assert METHODS_FILE.read_text(encoding="utf-8") == generate.methods(), "run `make docs`"


@pytest.mark.parametrize(("name", "script"), WRITTEN, ids=lambda value: str(value))
def test_figures_are_those_of_the_committed_results(
    name: str, script: str, generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    copy = tmp_path / name
    (copy.parent / "img").mkdir(parents=True)  # plots are drawn beside the page, and not compared
    shutil.copy(ROOT / name, copy)
    generate.run(script, copy)
    assert copy.read_bytes() == (ROOT / name).read_bytes(), "run `make docs`"


def test_the_readme_and_the_pages_with_figures_are_known() -> None:
    assert {*WRITTEN} >= {
        ("README.md", "quickstart_tables glmd"),
        ("README.md", "quickstart_tables tasks"),
        ("docs/cache.md", "teacher_cache"),
        ("docs/scaling.md", "scaling_on_paper"),
        ("docs/topk.md", "topk_bias"),
    }


def test_another_result_is_another_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in RESULTS.glob("quickstart*_seed*.json"):
        shutil.copy(file, tmp_path)
    readme, arguments = tmp_path / "README.md", ["--results", str(tmp_path), "--write-docs", str(tmp_path / "README.md")]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    readme.write_text(text, encoding="utf-8")
    record = json.loads((tmp_path / "quickstart_seed1.json").read_text())
    record["results"]["student_distilled"] = 123.44
    (tmp_path / "quickstart_seed1.json").write_text(json.dumps(record))
    record = json.loads((tmp_path / "quickstart_ted_seed2.json").read_text())
    record["student_kd"] = 0.9
    (tmp_path / "quickstart_ted_seed2.json").write_text(json.dumps(record))
    assert quickstart_tables.main(["glmd", *arguments]) == quickstart_tables.main(["tasks", *arguments]) == 0
    old, new = text.splitlines(), readme.read_text(encoding="utf-8").splitlines()
    changed = [(was, now) for was, now in zip(old, new, strict=True) if was != now]
    assert len(changed) == 2
    assert changed[0][1] == changed[0][0].replace("| 167.7 (116.8) |", "| 123.4 (116.8) |")
    # (55.4 + 52.6 + 90.0) / 3, where TED and CR-ILD had the same three before.
    assert changed[1][1] == "| student, plain KD | 66.0 (55.4, 52.6, 90.0) | 54.5 (55.4, 52.6, 55.4) |"
    readme.write_text("no comments", encoding="utf-8")
    assert quickstart_tables.main(["glmd", *arguments]) == 2 and "lacks the two lines" in capsys.readouterr().err


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quickstart_tables.draw(RESULTS, tmp_path / "quickstart.png")
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
