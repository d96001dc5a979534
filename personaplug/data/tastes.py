"""Tastes: attributes that a user prefers. Rules write them as keywords, and read them from any text.

A picture shows the color, the shape and the texture. A text tells the theme and the mood.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

COLORS = ("red", "orange", "yellow", "lime", "green", "teal", "blue", "purple", "pink")
SHAPES = ("circles", "squares", "triangles", "stars", "crosses")
TEXTURES = ("plain", "striped", "dotted", "checkered")
THEMES = ("sea", "forest", "city", "space", "desert", "winter")
MOODS = ("calm", "cheerful", "mysterious", "elegant")

COLOR_GROUPS: Mapping[str, tuple[str, ...]] = {"warm": COLORS[:3], "fresh": COLORS[3:6], "cool": COLORS[6:]}
"""The colors of each group."""


@dataclass(frozen=True)
class Taste:
    """What a user prefers, or what an item has; each attribute is one of the words in `ATTRIBUTES`."""

    color: str
    shape: str
    texture: str
    theme: str
    mood: str

    @property
    def keywords(self) -> str:
        """The attributes in a fixed order, for a generator of pictures."""
        return ", ".join(getattr(self, name) for name in ATTRIBUTES)

    @property
    def collection(self) -> str:
        """The collection of the taste: the group of its color, and its theme."""
        return f"{color_group(self.color)} {self.theme}"


ATTRIBUTES: Mapping[str, tuple[str, ...]] = dict(
    zip((field.name for field in fields(Taste)), (COLORS, SHAPES, TEXTURES, THEMES, MOODS), strict=True)
)
"""The words of each attribute."""

PICTURED = ("color", "shape", "texture")
"""The attributes that only pictures show."""

TOLD = ("theme", "mood")
"""The attributes that only texts tell."""

COLLECTIONS = tuple(f"{group} {theme}" for group in COLOR_GROUPS for theme in THEMES)

_WORD = re.compile(r"[a-z]+")


def color_group(color: str) -> str:
    """Return the group of a color."""
    return next(group for group, colors in COLOR_GROUPS.items() if color in colors)


def read_keywords(text: str) -> dict[str, str]:
    """Return the first word of each attribute in a text; an attribute without a word is left out."""
    words = _WORD.findall(text.lower())
    first = {name: next((word for word in words if word in values), None) for name, values in ATTRIBUTES.items()}
    return {name: word for name, word in first.items() if word is not None}


def keywords_met(text: str, reference: str) -> dict[str, bool]:
    """Return, for each attribute of the reference, whether the text has the same word for it."""
    found = read_keywords(text)
    return {name: found.get(name) == word for name, word in read_keywords(reference).items()}
