"""Relative links of README and docs lead to files; `make site` checks their anchors and that the navigation has every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, name_of

LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    assert broken_links(page.read_text(encoding="utf-8"), page) == []


def broken_links(text: str, page: Path) -> list[str]:
    """Targets that are no files; of pages of the site also those outside docs/, which a site does not have."""
    without_code = re.sub(r"^( *)```.*?^\1```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = [link.partition("#")[0] for link in LINK.findall(without_code) if not re.match(r"https?:|mailto:", link)]
    files = {target: (page.parent / target).resolve() for target in targets if target}
    # CONTRIBUTING.md is also a page of the site, where links that hold at the top of the repository lead nowhere.
    within = ROOT / "docs" if page.is_relative_to(ROOT / "docs") or page.name == "CONTRIBUTING.md" else ROOT
    return [target for target, file in files.items() if not file.is_file() or not file.is_relative_to(within)]


def test_broken_links_are_found() -> None:
    text = "[a](docs/cache.md#masks) [b](docs/no.md) ![c](no.png) [d](https://example.org) `[e](no.md)`\n```text\n[f](no.md)\n```\n"
    assert broken_links(text, ROOT / "README.md") == ["docs/no.md", "no.png"]
    assert broken_links("[a](../README.md) [b](topk.md) [c](#here)", ROOT / "docs" / "cache.md") == ["../README.md"]
