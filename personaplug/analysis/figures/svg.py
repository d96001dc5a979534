"""Figures as SVG: for a page that contains them, and as files for documents. Both follow light and dark mode.

matplotlib writes the drawing. Its colors become variables of a style sheet, its fonts those of the page.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from personaplug.analysis.figures.style import DARK_COLORS, INK, PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_POINTS_TO_PIXELS = 4 / 3
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_COLOR = re.compile("|".join(DARK_COLORS), flags=re.IGNORECASE)
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_FONT = re.compile(r"font: (?:(bold|italic|\d{3}) )*([\d.]+px) [^;]*")


def palette_css() -> str:
    """Return the variables of the figures' colors, for light and for dark mode."""
    light, dark = ("".join(f"{_variable(name)}:{color};" for name, color in pairs) for pairs in (
        [(name, name) for name in DARK_COLORS], list(DARK_COLORS.items()),
    ))  # fmt: skip
    return (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f".drawing *{{stroke-linejoin:round;stroke-linecap:butt}}.drawing text{{fill:var({_variable(INK)})}}"
    )


def inline_svg(figure: Figure, *, key: str, text: str, links: Mapping[str, str] | None = None) -> str:
    """Return a figure as an SVG element for a page with the styles of `palette_css`.

    Args:
        key: makes the ids in the element unique on the page; letters, digits and hyphens.
        text: the alternative text.
        links: for each target of a link in the drawing, the link's name for screen readers.
    """
    root = _drawn(figure, key=key)
    for link in root.iter("a"):
        link.attrib = {"href": link.attrib["href"], "aria-label": (links or {}).get(link.attrib["href"], "")}
    width = _size_of(root)[0] * _POINTS_TO_PIXELS
    # The role "img" would hide links in the drawing from screen readers.
    role = "group" if root.find(".//a") is not None else "img"
    root.attrib |= {"class": "drawing", "role": role, "aria-label": text, "style": f"max-width:{width:.0f}px"}
    return _text_of(root)


def standalone_svg(figure: Figure, *, key: str, title: str, text: str, data: Mapping[str, Any]) -> str:
    """Return a figure as an SVG file, with its title, its description and the drawn numbers as JSON metadata."""
    root = _drawn(figure, key=key)
    width, height = _size_of(root)
    root.attrib |= {"class": "drawing", "role": "img", "aria-label": text}
    root.attrib |= {"width": f"{width * _POINTS_TO_PIXELS:.0f}", "height": f"{height * _POINTS_TO_PIXELS:.0f}"}
    style = f"{palette_css()}text{{font-family:system-ui,-apple-system,'Segoe UI',sans-serif}}"
    elements = {"title": title, "desc": text, "metadata": json.dumps(data), "style": style}
    for place, (name, content) in enumerate(elements.items()):
        element = ElementTree.Element(name)
        element.text = content
        root.insert(place, element)
    card = {"width": "100%", "height": "100%", "rx": "8", "style": f"fill:var({_variable(PAPER)})"}
    root.insert(len(elements), ElementTree.Element("rect", card))
    return _text_of(root) + "\n"


def data_of(svg: str) -> Any:
    """Return the numbers in the metadata of a `standalone_svg`."""
    element = ElementTree.fromstring(svg).find(f"{{{_SVG}}}metadata")
    return None if element is None else json.loads(element.text or "null")


def _drawn(figure: Figure, *, key: str) -> ElementTree.Element:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    _remove(root, {"metadata", "style"})
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    used = {name for element in root.iter() for value in element.attrib.values() for name in _references(value)} & ids
    for element in root.iter():
        _clean(element, used=used, key=key)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib["xmlns"] = _SVG
    return root


def _remove(root: ElementTree.Element, names: set[str]) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in names:
                parent.remove(child)


def _references(value: str) -> list[str]:
    return re.findall(r"url\(#([^)]+)\)", value) + ([value[1:]] if value.startswith("#") else [])


def _clean(element: ElementTree.Element, *, used: set[str], key: str) -> None:
    """Remove an element's unused id, make the others unique, and replace colors and fonts."""
    attributes = dict(element.attrib)
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id":
            if value in used:
                element.attrib["id"] = f"{key}-{value}"
            continue
        for reference in set(_references(value)) & used:
            value = value.replace(f"#{reference}", f"#{key}-{reference}")
        if name == "style":
            value = _FONT.sub(lambda m: f"font-size: {m[2]}" + (f"; font-weight: {m[1]}" if m[1] else ""), value)
            value = _COLOR.sub(lambda m: f"var({_variable(m[0].lower())})", value)
        if name in ("d", "x", "y", "transform", "viewBox"):
            value = " ".join(_LONG_NUMBER.sub(lambda m: f"{float(m[0]):.2f}", value).split())
        element.attrib["href" if name == _HREF else name] = value


def _variable(color: str) -> str:
    return f"--figure-{color[1:]}"


def _size_of(root: ElementTree.Element) -> tuple[float, float]:
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    return width, height


def _text_of(root: ElementTree.Element) -> str:
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))
