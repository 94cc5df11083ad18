"""The documentation holds: its examples run, its links lead somewhere, it stays short and plain."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from saccade.parts.base import NAMES, PARTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget the names that a page's examples register."""
    names, parts = set(NAMES), set(PARTS)
    yield
    for name in NAMES.keys() - names:
        del NAMES[name]
    for name in PARTS.keys() - parts:
        del PARTS[name]


def examples(page: Path) -> str:
    """The text of the page with everything outside its python blocks blanked, so that line numbers stay."""
    text, kept = page.read_text(encoding="utf-8"), []
    at = 0
    for block in BLOCK.finditer(text):
        start = block.start(2) if block[1] == "python" else block.end(2)
        kept += ["\n" * text.count("\n", at, start), text[start : block.end(2)]]
        at = block.end(2)
    return "".join(kept)


@each_page
def test_examples_run(page: Path, registry: None) -> None:
    parser = doctest.DocTestParser()
    test = parser.get_doctest(examples(page), {"__name__": "__main__"}, page.name, str(page), 0)
    assert test.examples, f"{page.name} has no example"
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not failed, "".join(said)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))
    targets = [t.split("#")[0] for t in LINK.findall(prose) if not t.startswith(("http://", "https://", "#"))]
    missing = [t for t in targets if not (page.parent / t).is_file()]
    assert not missing, f"{page.name} points to files that do not exist: {', '.join(missing)}"


@each_page
def test_plain_ascii(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    odd = [number for number, line in enumerate(lines, 1) if not line.isascii()]
    assert not odd, f"{page.name} has characters beyond ASCII in lines {odd}"


def test_readme_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in PAGES[2:] if f"(docs/{p.name})" not in readme] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
