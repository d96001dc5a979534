"""Links between the pages: files and headings exist, and the navigation of the site lists every page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from repository_pages import PAGES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PATHS = [*(ROOT / path for path in PAGES), *sorted(DOCS.rglob("*.md"))]
GENERATED = ("reference/cli.md", "reference/settings.md", "reference/http.md", "reference/python.md")
_FENCED = re.compile(r"^ *(```|~~~).*?^ *\1", flags=re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^()\s]+)\)")


def _links(path: Path) -> Iterator[str]:
    """Yield the links of a page to files and headings of the project."""
    text = _INLINE.sub("", _FENCED.sub("", path.read_text(encoding="utf-8")))
    yield from (link for link in _LINK.findall(text) if not re.match(r"[a-z]+:", link))


def _anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as the site makes them."""
    text = _FENCED.sub("", path.read_text(encoding="utf-8"))
    headings = (re.sub(r"[^\w\s-]", "", heading).strip() for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[-\s]+", "-", heading.lower()) for heading in headings}


def _broken(path: Path) -> list[str]:
    broken = []
    for link in _links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if target.is_relative_to(DOCS) and str(target.relative_to(DOCS)) in (*GENERATED, *PAGES.values()):
            continue  # a page that only the site has
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in _anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    assert _broken(path) == []


def test_a_broken_link_is_detected(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A: *b* c\n\n[x](#a-b-c) [x](#d) [x](b.md) `[x](c.md)` [x](https://d.example/)")
    assert _broken(tmp_path / "a.md") == ["#d", "b.md"]


def _pages(navigation: object) -> Iterator[str]:
    if isinstance(navigation, str):
        yield navigation
    elif isinstance(navigation, list | dict):
        for part in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from _pages(part)


def test_the_navigation_lists_every_page_once() -> None:
    listed = sorted(_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert listed == sorted(
        [*(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")), *GENERATED, *PAGES.values()]
    )
