"""Pictures that are drawn by rule: some objects of one color, shape and texture on a grey background."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import numpy.typing as npt

from personaplug.data.pictures import Picture
from personaplug.data.tastes import COLORS
from personaplug.errors import MissingExtra

Plane = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

SIDE = 128
"""Pixels of a side of a drawn picture."""

_SAMPLES = 2  # of each pixel in each direction, so that edges are smooth
_HUES = dict(zip(COLORS, (0, 28, 54, 85, 130, 178, 222, 272, 325), strict=True))  # degrees
_MAX_OBJECTS = 3
_REACH = 1.15  # of an object with radius 1; a corner of a square is outside of the radius


def draw(color: str, shape: str, texture: str, *, rng: np.random.Generator) -> Picture:
    """Draw a PNG of one to three objects; their number, places, sizes, angles and the background are random.

    Args:
        color: one of `tastes.COLORS`; likewise the shape and the texture.

    Raises:
        MissingExtra: if Pillow is not installed.
    """
    canvas = _background(rng)
    for _ in range(int(rng.integers(1, _MAX_OBJECTS + 1))):
        tones = _tones(color, rng)
        frame, right, down, radius = _placed(rng)
        inside = _inside(shape, right, down)
        part = canvas[frame]
        part[inside] = tones[0]
        part[inside & _second_tone(texture, right, down, scale=radius)] = tones[1]
    pixels = canvas.reshape(SIDE, _SAMPLES, SIDE, _SAMPLES, 3).mean(axis=(1, 3))
    return Picture(_png((pixels * 255).round().astype(np.uint8)))


def _background(rng: np.random.Generator) -> Plane:
    """Return a grey that changes from one side to the other, (SIDE · _SAMPLES, SIDE · _SAMPLES, 3)."""
    start, end = rng.uniform(0.15, 0.95, 2)
    tint = rng.uniform(-0.04, 0.04, 3)
    shades = np.linspace(start, (start + end) / 2, SIDE * _SAMPLES)
    plane = np.broadcast_to(shades, (len(shades), len(shades)))
    plane = plane.T if rng.random() < 0.5 else plane
    return np.clip(plane[..., None] + tint, 0, 1)


def _tones(color: str, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Return the color, and a much lighter or darker tone of it."""
    hue = (_HUES[color] + rng.uniform(-6, 6)) % 360 / 360
    saturation, value = rng.uniform(0.75, 1), rng.uniform(0.7, 0.95)
    light = (hue, saturation * 0.2, 1.0)
    dark = (hue, saturation, value * 0.3)
    second = light if rng.random() < 0.5 else dark
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value)), np.array(colorsys.hsv_to_rgb(*second))


def _placed(rng: np.random.Generator) -> tuple[tuple[slice, slice], Plane, Plane, float]:
    """Place and turn an object at random.

    Return the part of the canvas around it, coordinates of this part in which the object has radius 1, and its radius
    in sides of the canvas.
    """
    radius, angle = rng.uniform(0.18, 0.34), rng.uniform(0, 2 * math.pi)
    middle = rng.uniform(radius, 1 - radius, 2)
    axis = (np.arange(SIDE * _SAMPLES) + 0.5) / (SIDE * _SAMPLES)
    across, along = ((axis - each) / radius for each in middle)
    columns, rows = (slice(*np.flatnonzero(abs(each) < _REACH)[[0, -1]] + [0, 1]) for each in (across, along))
    right, down = np.meshgrid(across[columns], along[rows])
    sine, cosine = math.sin(angle), math.cos(angle)
    return (rows, columns), cosine * right + sine * down, cosine * down - sine * right, float(radius)


def _inside(shape: str, right: Plane, down: Plane) -> Mask:
    distance, angle = np.hypot(right, down), np.arctan2(down, right)
    longest, shortest = np.maximum(abs(right), abs(down)), np.minimum(abs(right), abs(down))
    if shape == "circles":
        return distance < 0.9
    if shape == "squares":
        return longest < 0.78
    if shape == "triangles":
        height: Plane = distance * np.cos((angle % (2 * math.pi / 3)) - math.pi / 3)
        return height < 0.5
    if shape == "crosses":
        return (shortest < 0.3) & (longest < 0.95)
    turn = abs((angle % (2 * math.pi / 5)) - math.pi / 5) / (math.pi / 5)  # of a star, the other shape
    reach: Plane = distance * (math.sin(math.pi / 5) * turn + (1 - turn) * 1.1 + turn * 0.41)
    return reach < 0.5 + 0.5 * turn**2


def _second_tone(texture: str, right: Plane, down: Plane, *, scale: float) -> Mask:
    """Return where the texture shows its second tone; its pattern has the same size on large and small objects."""
    across, along = right * scale * 12, down * scale * 12
    column: Plane = np.floor(across) % 2
    row: Plane = np.floor(along) % 2
    if texture == "striped":
        return column < 1
    if texture == "checkered":
        return abs(column - row) < 1
    if texture == "dotted":
        from_dot: Plane = np.hypot(across % 1.4 - 0.7, along % 1.4 - 0.7)
        return from_dot < 0.42
    return np.zeros(right.shape, dtype=bool)


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise MissingExtra("Drawing pictures", extra="pictures") from None
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
