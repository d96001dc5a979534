"""The look of figures: colors, names of axes, a new figure, its legend.

The colors are from the palette of Okabe and Ito for color-blind readers. matplotlib is an optional dependency, so it is
imported inside functions. No figure needs a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.metrics import metric_class
from personaplug.analysis.rendering import one_line
from personaplug.analysis.results_file import Results
from personaplug.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRAY, PALE, GRID, BLUE = "#222222", "#6b6b6b", "#d2d2d2", "#e3e3e3", "#0072b2"
PAPER, ORANGE = "#ffffff", "#d55e00"
DARK_COLORS = {
    **{INK: "#e6e8ea", GRAY: "#a4abb2", PALE: "#565d64", GRID: "#343a40", PAPER: "#181b1f"},
    **{BLUE: "#4aa8e0", ORANGE: "#ff8f4a", "#8c8c8c": "#9aa1a8", "#9a9a9a": "#8b9299", "#e69f00": "#f2b73d"},
    **{"#009e73": "#2fc99a", "#56b4e9": "#9ad7f7", "#8c6d31": "#c9a55c", "#cc79a7": "#e39cc4"},
}
"""For each color of the figures, the color on a dark page."""

FAMILIES = {
    "none": ("no personalization", "#8c8c8c"),
    "plug": ("plug", BLUE),
    "prompt": ("items or profile in the prompt", "#e69f00"),
    "weights": ("fine-tuned weights", "#009e73"),
    "counts": ("counts of the user's words or labels", "#56b4e9"),
    "no-lm": ("no language model", "#8c6d31"),
    "control": ("control", PALE),
    "oracle": ("best possible", "#cc79a7"),
}
OTHER = ("other", "#56b4e9")


def family_style(method: MethodInfo) -> tuple[str, str]:
    """Return the label in the legend, and the color."""
    return FAMILIES.get("control" if method.is_control else method.family, OTHER)


def figure_title(results: Results) -> str:
    """Return the set, the split and the model's short name."""
    about = results.about
    # From "owner/name (weights …, width …)", the title has the name only.
    model = about.model.split(" (")[0].rpartition("/")[2]
    parts = (about.set or about.task, about.variant, about.split, model)
    return literal(" · ".join(one_line(part) for part in parts if part))


def directed(metric: str) -> str:
    """Return a metric's name with its direction, for an axis."""
    kind = metric_class(metric)
    direction = "" if kind is None else f", {'higher' if kind.greater_is_better else 'lower'} is better"
    return literal(f"{metric}{direction}")


def literal(text: str) -> str:
    """Escape text for matplotlib, which parses text between two dollar signs as a formula."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches; raise MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingExtra("Drawing figures", extra="report") from None
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def finished(figure: Figure, legend: Sequence[dict[str, Any]]) -> Figure:
    """Add a legend, given as line styles, and remove frames and tick marks."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style) for style in legend]
    look = {"frameon": False, "fontsize": 8, "labelcolor": INK, "handlelength": 1.8, "columnspacing": 1.4}
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), **look)
    for axes in figure.axes:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(PALE)
        axes.tick_params(length=0, labelsize=9)
        axes.set_axisbelow(True)
    return figure
