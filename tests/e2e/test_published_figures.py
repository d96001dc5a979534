"""The figures in docs/assets show the published results; `python benchmarks/published_figures.py` draws them again."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")
import published_figures as figures

from personaplug.analysis.figures.svg import data_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS, ASSETS = ROOT / "benchmarks" / "results", ROOT / "docs" / "assets"
STALE = "run `python benchmarks/published_figures.py`"


def _texts(svg: str) -> list[str]:
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(svg)
    return [element.text or "" for name in ("title", "desc", "text") for element in root.iter(f"{space}{name}")]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_has_the_numbers_of_the_results(name: str) -> None:
    published = (ASSETS / f"{name}.svg").read_text(encoding="utf-8")
    numbers = figures.FIGURES[name][0](RESULTS)
    found = data_of(published)
    assert _leaves(found) == pytest.approx(_leaves(numbers), abs=2e-4), STALE
    assert _texts(published) == _texts(figures.svg_of(name, found)), STALE
    assert len(published.encode()) < 60_000
    assert "prefers-color-scheme:dark" in published


def _leaves(value: object, path: str = "") -> dict[str, float]:
    """Return the numbers of nested dicts and lists, by their paths."""
    if isinstance(value, dict):
        return {key: number for name, part in value.items() for key, number in _leaves(part, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {key: number for i, part in enumerate(value) for key, number in _leaves(part, f"{path}/{i}").items()}
    assert isinstance(value, int | float), path
    return {path: value}


def test_drawing_twice_gives_the_same_file() -> None:
    numbers = data_of((ASSETS / "cold-start.svg").read_text(encoding="utf-8"))
    assert figures.svg_of("cold-start", numbers) == figures.svg_of("cold-start", numbers)


def test_cold_start_names_the_first_item_from_which_all_gains_are_above_zero() -> None:
    above, below = [0.2, 0.1, 0.3], [0.2, -0.1, 0.3]
    gains = {"A": {"0": below, "1": above, "2": below, "5": above}, "B": {"0": above, "1": above}, "C": {"0": below}}
    numbers = {name: {figures.PLUG: of_set, figures.STRANGER: of_set} for name, of_set in gains.items()}
    text = figures.cold_start(numbers).text
    assert "on: A 5, B 0, C never." in text
    assert "at 7 of 7 points" in text


def test_far_points_are_written_as_numbers_at_the_edge() -> None:
    far, near = [-1.5, -1.6, -1.4], [0.1, 0.0, 0.2]
    names = [*figures.LABEL_SETS, *figures.TEXT_SETS]
    numbers = {name: {figures.PLUG: near, figures.STRANGER: far, figures.RETRIEVAL: near} for name in names}
    assert _texts(figures.svg_of("personal-gain", numbers)).count("← -1.50") == len(names)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_documents_show_the_figure_with_an_alternative_text(name: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts = [
        text for page in pages for text in re.findall(rf"!\[([^]]+)\]\([^)]*assets/{name}\.svg\)", page.read_text())
    ]
    assert texts
    assert all(len(text.split()) > 8 for text in texts)
