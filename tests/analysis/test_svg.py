"""Figures as SVG: colors follow light and dark mode, ids are unique, links have names, the output is the same twice."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from personaplug.analysis.figures.style import BLUE, DARK_COLORS, PAPER
from personaplug.analysis.figures.svg import data_of, inline_svg, palette_css, standalone_svg


def _figure() -> Figure:
    figure = Figure(figsize=(2, 2), facecolor=PAPER)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], "o", color=BLUE)
    axes.scatter([0.5], [0.5], color=BLUE).set_urls(["#there"])
    axes.set_title("a < b & c", color="#222222")
    return figure


def test_colors_are_variables_with_a_dark_value() -> None:
    svg = inline_svg(_figure(), key="a", text="A line")
    assert BLUE not in svg
    used = set(re.findall(r"var\((--figure-[0-9a-f]{6})\)", svg))
    assert "--figure-0072b2" in used
    light, dark = palette_css().split("prefers-color-scheme:dark")
    for name in used:
        assert f"{name}:#" in light
        assert f"{name}:#" in dark
    assert f"--figure-0072b2:{DARK_COLORS[BLUE]};" in dark


def test_two_figures_share_no_id_and_every_reference_has_a_target() -> None:
    both = [inline_svg(_figure(), key=key, text="A line") for key in ("a", "b")]
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in both]
    assert ids[0]
    assert not {*ids[0]} & {*ids[1]}
    for svg, own in zip(both, ids, strict=True):
        targets = re.findall(r'href="#([^"]+)"', svg) + re.findall(r"url\(#([^)]+)\)", svg)
        assert {*targets} - {"there"} == {*own}


def test_links_have_names_and_stay_in_the_page() -> None:
    svg = inline_svg(_figure(), key="a", text="A line", links={"#there": "User 1"})
    assert '<a href="#there" aria-label="User 1">' in svg
    root = ElementTree.fromstring(svg)
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("group", "A line")
    assert "target" not in svg
    assert {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")} >= {"a < b & c"}


def test_file_has_title_description_and_data_and_is_the_same_twice() -> None:
    one, other = (
        standalone_svg(_figure(), key="a", title="Lines", text="It rises.", data={"y": [0, 1]}) for _ in range(2)
    )
    assert one == other
    assert data_of(one) == {"y": [0, 1]}
    root = ElementTree.fromstring(one)
    space = "{http://www.w3.org/2000/svg}"
    assert [root.findtext(f"{space}{name}") for name in ("title", "desc")] == ["Lines", "It rises."]
    assert root.find(f"{space}rect") is not None  # the card, so that the text has a background everywhere
    assert "http" not in one.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"\d{4}-\d\d-\d\dT", one)
