"""The HTML page of a report: one file without requests, accessible, with no more than the results contain."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from result_objects import with_methods

pytest.importorskip("matplotlib")

from personaplug.analysis.report import write_report

PUBLISHED = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
VOID = ("meta",)


class _Outline(HTMLParser):
    """The headings, ids, links, tables and drawings of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables: list[set[str]] = []
        self.drawings: list[dict[str, str]] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.sources += [found[name] for name in ("src", "srcset", "poster", "data", "action") if name in found]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in ("a", "use", "link"):
            self.links.append(found["href"])
        if tag == "svg":
            self.drawings.append(found)
        if tag == "table":
            self.tables.append(set())
        if tag == "caption" or found.get("scope"):
            self.tables[-1].add(found.get("scope", "caption"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of published results with users, costs and subgroups."""
    files = [PUBLISHED / "conversations" / "Manners.json", PUBLISHED / "personal-labels-curves" / "Movie_stars.json"]
    return write_report(files, tmp_path_factory.mktemp("report"))[1].read_text(encoding="utf-8")


def test_page_requests_nothing(page: str) -> None:
    outline = _Outline(page)
    assert outline.sources == []
    assert [link for link in outline.links if not link.startswith("#")] == []
    assert re.findall(r"url\((?!#)", page) == []
    assert "<script" not in page
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_links_have_targets_and_ids_are_unique(page: str) -> None:
    outline = _Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert {link[1:] for link in outline.links} <= set(outline.ids)
    assert any("-user-" in link for link in outline.links)


def test_headings_tables_and_figures_are_accessible(page: str) -> None:
    outline = _Outline(page)
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(outline.headings, outline.headings[1:], strict=False))
    assert outline.tables
    assert all(parts == {"caption", "col", "row"} for parts in outline.tables)
    assert outline.drawings
    assert all(drawing["aria-label"] and drawing["role"] in ("img", "group") for drawing in outline.drawings)
    assert "prefers-color-scheme" in page


def test_verdict_comes_first_with_costs(page: str) -> None:
    first = page[: page.index(">Overview</h2>")]
    for question in ("Is plug personal?", "better than no history?", "that cost nothing?", "What does plug cost?"):
        assert first.count(question) == 2
    assert "8 extra tokens in each prompt, 17.2 KB for each user" in first
    assert "For comparison, bm25:4: 230.2 extra tokens in each prompt" in first


def test_figures_of_the_page_name_their_findings(page: str) -> None:
    texts = [drawing["aria-label"] for drawing in _Outline(page).drawings]
    assert any(text.startswith("Manners, manners (higher is better): own history 0.857 (plug), ") for text in texts)
    assert any(text.startswith("Movie_stars, user by user: ") for text in texts)
    [cold_start] = [text for text in texts if text.startswith("Cold start of Movie_stars, mae (lower is better): ")]
    assert "0 items +0.000" in cold_start
    assert "all items +0.3" in cold_start
    assert "Users above the diagonal score better with the own history: 74 of 76" in page
    assert "Users below the diagonal score better with the own history: " in page


def test_two_reports_of_the_same_results_are_equal(tmp_path: Path) -> None:
    file = PUBLISHED / "personal-labels-curves" / "Citation.json"
    pages = [write_report([file], tmp_path / name)[1].read_bytes() for name in ("one", "other")]
    assert pages[0] == pages[1]


def _page_of(folder: Path, *rows: dict[str, Any], **more: Any) -> str:
    (folder / "a.json").write_text(json.dumps(with_methods({"task": "T", "rows": list(rows)} | more)))
    return write_report([folder / "a.json"], folder / "out")[1].read_text(encoding="utf-8")


def test_page_shows_nothing_that_the_results_lack(tmp_path: Path) -> None:
    text = _page_of(tmp_path, {"method": "plain", "metrics": {"mae": 1.0}})
    assert ">Verdict<" not in text
    assert ">Overview<" not in text
    assert ">Users who gain or lose most<" not in text
    assert len(_Outline(text).drawings) == 1  # the bars of the scores
    assert _Outline(_page_of(tmp_path)).drawings == []


def test_damaged_trials_are_named_and_do_not_stop_the_report(tmp_path: Path) -> None:
    rows = [{"method": name, "metrics": {"mae": 1.0}, "seeds": [0]} for name in ("plug", "wrong-user")]
    (tmp_path / "a.trials.jsonl").write_text('{"groups": 1}\n', encoding="utf-8")
    text = _page_of(tmp_path, *rows)
    assert "Users one by one are not shown." in text
    assert "a.trials.jsonl" in text
    assert ">Users who gain or lose most<" not in text
