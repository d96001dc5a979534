"""Reports: both formats have the same cells, all text is escaped, and text can be inserted into a page."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from result_objects import typed, with_methods

from personaplug.analysis.report import insert_between, overview_markdown, write_report
from personaplug.errors import ConfigError, MissingData, RecordError

REAL = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "paper-faithful").glob("*.json"))
drawing = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


def row(name: str, value: float, *, metric: str = "accuracy", costs: dict[str, Any] | None = None) -> dict[str, Any]:
    interval = {metric: [value - 0.03, value + 0.03]}
    return {"method": name, "n": 9, "metrics": {metric: value}, "intervals": interval, "costs": costs or {}}


def pair(a: str, b: str, difference: float, *, p: float, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    ends = {"low": difference - 0.1, "high": difference + 0.1}
    return {"a": a, "b": b, "metric": metric, "difference": difference, "p": p} | ends | more


def results(name: str, rows: list[dict[str, Any]], *pairs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"task": name, "split": "dev", "users": 9, "rows": rows, "pairs": list(pairs)} | more


def write_files(folder: Path, *results_list: dict[str, Any]) -> list[Path]:
    paths = [folder / f"results-{number}.json" for number in range(len(results_list))]
    for path, whole in zip(paths, results_list, strict=True):
        path.write_text(json.dumps(with_methods(whole)))
    return paths


def overview(*results_list: dict[str, Any]) -> str:
    return overview_markdown([typed(whole) for whole in results_list])


class Page(HTMLParser):
    """The tables and tags of a page; fails if a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every table, without the line below the titles."""
    tables = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
            cells = [[cell.strip().strip("*").replace("\\|", "|") for cell in line] for line in lines]
            tables.append([cells[0], *cells[2:]])
    return tables


def test_both_pages_have_the_same_cells(tmp_path: Path) -> None:
    files = write_files(tmp_path, *(json.loads(path.read_text(encoding="utf-8")) for path in REAL))
    [markdown, page] = write_report(files, tmp_path / "report", with_figures=False)
    tables = markdown_tables(markdown.read_text(encoding="utf-8"))
    assert len(tables) == 2 + 3 * len(REAL)
    assert Page(page.read_text(encoding="utf-8")).tables == tables
    for table in tables:
        assert len({len(line) for line in table}) == 1
        assert len(table) > 1


def test_overview_puts_sets_side_by_side(tmp_path: Path) -> None:
    one = results("One", [row("plain", 0.4), row("plug", 0.5)])
    other = results("Other", [row("plain", 2.0, metric="mae"), row("bm25:4", 1.5, metric="mae")])
    [scores] = markdown_tables(overview(one, other))
    assert scores == [
        ["method", "One: accuracy ↑", "Other: mae ↓"],
        ["plain", "0.400 [0.370, 0.430]", "2.000 [1.970, 2.030]"],
        ["plug", "0.500 [0.470, 0.530]", "–"],
        ["bm25:4", "–", "1.500 [1.470, 1.530]"],
    ]
    assert not overview(one).endswith("\n")
    paths = write_report(write_files(tmp_path, one, other), tmp_path / "out", title="My title", with_figures=False)
    text = paths[0].read_text(encoding="utf-8")
    assert text.startswith("# My title\n\n## Verdict\n\nYes and No: ")
    assert "\n### One\n\n- Is plug personal? Not measured: " in text.partition("## Overview")[0]
    assert re.findall("^## (.*)$", text, flags=re.MULTILINE) == ["Verdict", "Overview", "One", "Other"]
    assert "## Overview\n\n### Scores\n" in text
    assert (
        "Overview" not in write_report(write_files(tmp_path, one), tmp_path / "out", with_figures=False)[0].read_text()
    )


def bold(whole: dict[str, Any]) -> list[str]:
    return [line.split("|")[1].strip() for line in overview(whole).splitlines() if "**" in line]


def test_best_is_bold_only_if_it_is_significantly_better() -> None:
    rows = [row("plain", 0.4), row("bm25:4", 0.49), row("plug", 0.5), row("mean-persona", 0.9), row("all-knowing", 1.0)]
    assert bold(results("A", rows, pair("plug", "bm25:4", 0.01, p=0.01))) == ["plug"]
    assert bold(results("A", rows, pair("bm25:4", "plug", -0.01, p=0.01))) == ["plug"]
    assert bold(results("A", rows, pair("plug", "bm25:4", 0.01, p=0.01, p_holm=0.2))) == []
    assert bold(results("A", rows, pair("plug", "bm25:4", 0.01, p=0.6))) == []
    # Without a comparison, the intervals must not overlap.
    assert bold(results("A", rows)) == []
    assert bold(results("A", [row("plain", 0.4), row("plug", 0.5)])) == ["plug"]
    assert bold(results("A", [row("plain", 0.9, metric="mae"), row("plug", 0.5, metric="mae")])) == ["plug"]
    assert bold(results("A", [row("plug", 0.5)])) == []


def test_personal_gains_and_costs_have_separate_tables() -> None:
    costs = {"extra_prompt_tokens": 2.0, "bytes_per_user": 3000, "seconds_per_user": None}
    rows = [row("plain", 0.4), row("plug", 0.5, costs=costs), row("wrong-user", 0.4, costs=costs)]
    one = results("One", rows, pair("plug", "wrong-user", 0.1, p=0.001, p_holm=0.004))
    other_rows = [row("plug", 0.5, costs=costs | {"extra_prompt_tokens": 5.0, "bytes_per_user": None})]
    other_rows.append(row("wrong-user", 0.4))
    other = results("Other", other_rows, pair("plug", "wrong-user", -0.2, p=0.3))
    _, gains, cost_table = markdown_tables(overview(one, other))
    assert gains == [
        ["method", "One: accuracy ↑", "Other: accuracy ↑"],
        ["plug", "+0.100 [+0.000, +0.200], Holm p = 0.004", "-0.200 [-0.300, -0.100], p = 0.300"],
    ]
    assert cost_table == [
        ["method", "extra prompt tokens", "bytes per user"],
        ["plain", "–", "–"],
        ["plug", "3.5", "3.0 KB"],
    ]


def test_likelihood_gains_have_a_separate_table() -> None:
    rows = [row("plug", 0.5), row("wrong-user", 0.4)]
    gain = pair("plug", "wrong-user", 0.1, p=0.3)
    likelier = pair("plug", "wrong-user", 0.2, p=0.0001, metric="nll")
    page = overview(results("One", rows, gain, likelier), results("Other", rows, gain))
    assert "Personal gains in likelihood" in page
    assert markdown_tables(page)[2] == [["method", "One: nll ↓"], ["plug", "+0.200 [+0.100, +0.300], p < 0.001"]]
    assert "likelihood" not in overview(results("One", rows, gain))


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert('x')</script>"
    bad = results(
        attack,
        [row(attack, 0.5), row("a|b & c", 0.4)],
        pair(attack, "plain", 0.1, p=0.5),
        notes=[attack],
        model=attack,
        subgroups=[{"name": attack, "rows": [row(attack, 0.5)]}],
    )
    page = write_report(write_files(tmp_path, bad, bad), tmp_path / "out", title=attack, with_figures=False)[1]
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    parsed = Page(text)
    assert "script" not in parsed.tags
    assert attack in {line[0] for line in parsed.tables[0]}
    assert "a|b & c" in {line[0] for line in parsed.tables[0]}


@drawing
def test_figures_are_written_beside_the_pages(tmp_path: Path) -> None:
    parts = [{"name": name, "rows": [row("plug", 0.5), row("wrong-user", 0.4)]} for name in ("short", "long")]
    rows = [row("plain", 0.4), row("plug", 0.5), row("wrong-user", 0.4)]
    one = results("A set/../with <odd> name", rows, pair("plug", "wrong-user", 0.1, p=0.01), subgroups=parts)
    paths = write_report(write_files(tmp_path, one, results("B", rows)), tmp_path / "out")
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(paths)
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", paths[0].read_text(encoding="utf-8"))
    names = [picture.rpartition("-")[2] for picture in pictures]
    of_sets = [*["scores.png"] * 2, "subgroups.png", *["verdict.png"] * 2]
    assert sorted(names) == ["advantages.png", "figures/gains.png", *of_sets]
    assert {tmp_path / "out" / picture for picture in pictures} == set(paths[2:])


def test_page_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    paths = write_report(REAL, tmp_path / "out")
    assert [path.name for path in paths] == ["report.md", "report.html"]
    assert not (tmp_path / "out" / "figures").exists()
    text = paths[1].read_text(encoding="utf-8")
    assert "pip install &#39;personaplug[report]&#39;" in text
    assert "Is plug personal?" in text
    assert len(Page(text).tables) > 5
    assert "pip install" not in write_report(REAL, tmp_path / "out", with_figures=False)[1].read_text(encoding="utf-8")


def test_report_of_almost_empty_results(tmp_path: Path) -> None:
    paths = write_report(
        write_files(tmp_path, {"rows": []}, {"rows": [{"method": "x"}], "pairs": None}), tmp_path / "out"
    )
    assert len(paths) == 2
    Page(paths[1].read_text(encoding="utf-8"))


def test_report_of_no_file_or_a_broken_file_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": [{}]}')
    with pytest.raises(RecordError, match=r"a\.json, entry 1 of 'rows': the field 'method' is missing"):
        write_report([tmp_path / "a.json"], tmp_path / "out", with_figures=False)
    with pytest.raises(MissingData, match="at least one"):
        write_report([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_insertion_changes_only_the_text_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"# A\r\n<!-- begin one -->\nold\n<!-- end one -->\n<!-- begin two -->kept<!-- end two -->\nend\n")
    for _ in range(2):  # the second call finds the markers again
        insert_between(path, "one", "\n| new |\n")
        assert path.read_bytes() == (
            b"# A\r\n<!-- begin one -->\n\n| new |\n\n<!-- end one -->\n<!-- begin two -->kept<!-- end two -->\nend\n"
        )


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("no markers", "found 0 and 0"),
        ("<!-- begin x -->", "found 1 and 0"),
        ("<!-- begin x --><!-- begin x --><!-- end x -->", "found 2 and 1"),
        ("<!-- end x --> <!-- begin x -->", "in the wrong order"),
    ],
)
def test_missing_repeated_or_swapped_markers_are_refused(tmp_path: Path, page: str, message: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(page)
    with pytest.raises(RecordError, match=message):
        insert_between(path, "x", "text")
    assert path.read_text() == page


def test_text_with_its_own_marker_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("<!-- begin x --><!-- end x -->")
    with pytest.raises(ConfigError, match="must not contain"):
        insert_between(path, "x", "a <!-- end x --> b")
    with pytest.raises(MissingData, match=r"other\.md"):
        insert_between(tmp_path / "other.md", "x", "a")
