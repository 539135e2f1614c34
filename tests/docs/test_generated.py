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
        ("README.md", "quickstart_tables readme"),
        ("docs/quickstart.md", "quickstart_tables glmd"),
        ("docs/quickstart.md", "quickstart_tables tasks"),
        ("docs/cache.md", "teacher_cache"),
        ("docs/scaling.md", "scaling_on_paper"),
        ("docs/topk.md", "topk_bias"),
    }


def test_another_result_is_another_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in RESULTS.glob("quickstart*_seed*.json"):
        shutil.copy(file, tmp_path)
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    written, arguments = tmp_path / "quickstart.md", ["--results", str(tmp_path), "--write-docs", str(tmp_path / "quickstart.md")]
    written.write_text(text, encoding="utf-8")
    for name, key, value in (("quickstart_seed1", "student_distilled", 123.44), ("quickstart_ted_seed2", "student_kd", 0.9)):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        record["results"][key] = value
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert quickstart_tables.main(["glmd", *arguments]) == quickstart_tables.main(["tasks", *arguments]) == 0
    old, new = text.splitlines(), written.read_text(encoding="utf-8").splitlines()
    (glmd_was, glmd), (ted_was, ted) = [(was.split(" | "), now.split(" | ")) for was, now in zip(old, new, strict=True) if was != now]
    assert glmd[2].startswith("123.4 (") and glmd[:2] + glmd[3:] == glmd_was[:2] + glmd_was[3:] and "GLMD" in glmd[0]
    assert ted[1].endswith(", 90.0)") and "plain KD" in ted[0] == ted_was[0]
    written.write_text("no comments", encoding="utf-8")
    assert quickstart_tables.main(["glmd", *arguments]) == 2 and "lacks the two lines" in capsys.readouterr().err


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quickstart_tables.draw(RESULTS, tmp_path / "quickstart.png")
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
