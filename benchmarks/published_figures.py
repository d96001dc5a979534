"""Draw the figures of the documents from the published results.

    python benchmarks/published_figures.py

| file | finding | results |
|---|---|---|
| `personal-gain.svg` | how much likelier a history makes the right answer | `personal-labels`, `personal-texts` |
| `cold-start.svg` | the same by the number of items | `personal-labels-curves` |
| `soft-token-cost.svg` | what soft tokens cost beside retrieved texts | the first two and `serving.json` |

Each file is an SVG for light and dark mode. Its metadata contains the drawn numbers, which a test compares with the
results. The files are the same on every run of one version of matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from personaplug.analysis.figures.style import BLUE, GRAY, GRID, INK, ORANGE, finished, new_figure
from personaplug.analysis.figures.svg import standalone_svg
from personaplug.analysis.likelihood_metrics import NegativeLogLikelihood
from personaplug.analysis.results import Settings, build_results
from personaplug.analysis.results_file import Comparison, ResultPart, load_results
from personaplug.analysis.trials import TrialFile
from personaplug.infra.atomic_io import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
LABEL_SETS = ("Movie_stars", "Critic_rating", "News_category", "Citation")
TEXT_SETS = ("Scholarly_title", "LaMP_7", "LaMP_4", "News_headline")
PANELS = {
    "personal-labels": ("One of a fixed list: nats an answer", LABEL_SETS),
    "personal-texts": ("Written text: nats a token", TEXT_SETS),
}
LOWEST = -0.45
"""A point below this value is written as a number at the edge."""

NO_HISTORY, PLUG, STRANGER, RETRIEVAL = "instruction-only", "plug", "wrong-user", "instruction+bm25:4"
YELLOW = "#e69f00"
SERIES: Mapping[str, tuple[str, str, str]] = {
    PLUG: ("plug, the user's own history", BLUE, "o"),
    STRANGER: ("plug, a stranger's history", "#8c8c8c", "x"),
    RETRIEVAL: ("four retrieved texts in the prompt", YELLOW, "s"),
}
_SERVED = {"plain": ("plain prompt", "#8c8c8c"), "persona": ("plug", BLUE), "retrieval": ("four texts", YELLOW)}

Numbers = dict[str, Any]


class Drawing(NamedTuple):
    """A figure with its title, its description and its numbers."""

    title: str
    text: str
    data: Numbers
    figure: Figure


def gains_of(trials_file: Path) -> dict[str, Comparison]:
    """Return each series' gain over no history in the right answer's log-likelihood."""
    samples, trials = TrialFile(trials_file).load()
    if samples is None:
        raise SystemExit(f"{trials_file} is missing or empty. Run `personaplug bench {trials_file.parent.name}`.")
    selected = [trial for trial in trials if trial.method.name in {NO_HISTORY, *SERIES}]
    settings = Settings([NegativeLogLikelihood()], resamples=2000, seed=0)
    results = build_results(samples, selected, settings=settings)  # compares all pairs, because there are few rows
    gains = {name: results.comparison(name, NO_HISTORY, NegativeLogLikelihood.name) for name in SERIES}
    return {name: gain for name, gain in gains.items() if gain is not None}


def personal_gain_numbers(results: Path) -> Numbers:
    """Return the gain of each series over no history, with its interval, on each set."""
    return {
        name: {row: _rounded(gain) for row, gain in gains_of(results / experiment / f"{name}.trials.jsonl").items()}
        for experiment, (_, sets) in PANELS.items()
        for name in sets
    }


def personal_gain(numbers: Numbers) -> Drawing:
    """Draw how much likelier the right answer is with each history than without one."""
    figure = _padded_figure(4.0)
    for axes, (title, sets) in zip(figure.subplots(1, len(PANELS)), PANELS.values(), strict=True):
        for position, name in enumerate(sets):
            _draw_gains(axes, numbers[name], position=position)
        axes.set_yticks(range(len(sets)), sets)
        axes.invert_yaxis()
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_title(title, loc="left", color=INK, fontsize=10)
        axes.set_xlabel("how much likelier than without a history (right is better)", color=GRAY)
        axes.grid(axis="x", color=GRID)
    ahead = [name for name, of_set in numbers.items() if of_set[PLUG][0] > of_set[STRANGER][0]]
    text = (
        f"On {len(ahead)} of {len(numbers)} sets the own history makes the right answer likelier than a stranger's. "
        + "Gain over no history with the own history: "
        + ", ".join(f"{name} {of_set[PLUG][0]:+.2f}" for name, of_set in numbers.items())
    )
    legend = [_legend(*series) for series in SERIES.values()]
    return Drawing("Gain in likelihood on eight data sets", f"{text}.", numbers, finished(figure, legend))


def cold_start_numbers(results: Path) -> Numbers:
    """Return the gain over no history by the number of items shown, with its interval, on each set."""
    numbers: Numbers = {}
    for name in LABEL_SETS:
        whole = load_results(results / "personal-labels-curves" / f"{name}.json")
        parts = [part for part in whole.subgroups if part.name.startswith("items=")]
        numbers[name] = {
            row: {part.name.removeprefix("items="): _rounded(_gain(part, row)) for part in parts}
            for row in (PLUG, STRANGER)
        }
    return numbers


def cold_start(numbers: Numbers) -> Drawing:
    """Draw the gain over no history by the number of items, with the own history and with a stranger's."""
    figure = _padded_figure(3.8)
    lowest = -0.75
    for axes, (name, of_rows) in zip(figure.subplots(1, len(numbers), sharey=True), numbers.items(), strict=True):
        for row, color, marker in ((PLUG, BLUE, "o"), (STRANGER, ORANGE, "s")):
            _draw_curve(axes, list(of_rows[row].values()), color=color, marker=marker, lowest=lowest)
        axes.set_xticks(range(len(of_rows[PLUG])), of_rows[PLUG])
        axes.set_xlabel("items shown", color=GRAY)
        axes.set_ylim(lowest, 0.65)
        axes.axhline(0, color=INK, linewidth=1, zorder=1)
        axes.set_title(name, loc="left", color=INK, fontsize=10)
        axes.grid(axis="y", color=GRID)
    figure.supylabel("likelier than without (nats)", color=GRAY, fontsize=10)
    firsts = ", ".join(f"{name} {first}" for name, first in _first_gains(numbers).items())
    pairs = [pair for of_rows in numbers.values() for pair in zip(*map(dict.values, of_rows.values()), strict=True)]
    text = (
        "The right answer becomes likelier than without a history, with an interval above zero, from this number of "
        f"the user's own items on: {firsts}. The own items help at least as much as a stranger's at "
        f"{sum(own[0] >= stranger[0] for own, stranger in pairs)} of {len(pairs)} points."
    )
    legend = [_legend("the user's own items", BLUE, "o"), _legend("a stranger's items", ORANGE, "s")]
    return Drawing("Cold start: gain in likelihood by items of history", text, numbers, finished(figure, legend))


def soft_token_cost_numbers(results: Path) -> Numbers:
    """Return tokens and bytes of the plug and of retrieved texts on each set, and the requests a second of vLLM."""
    costs: dict[str, Numbers] = {"extra_prompt_tokens": {}, "bytes_per_user": {}}
    for experiment, (_, sets) in PANELS.items():
        for name in sets:
            rows = load_results(results / experiment / f"{name}.json").by_name
            for cost, of_cost in costs.items():
                of_cost[name] = [round(getattr(rows[row].diagnostics, cost), 1) for row in (PLUG, RETRIEVAL)]
    served = json.loads((results / "serving.json").read_text(encoding="utf-8"))["vllm"]
    return {**costs, "requests_per_second": {row: served[row]["requests_per_second"] for row in _SERVED}}


def soft_token_cost(numbers: Numbers) -> Drawing:
    """Draw the tokens, the bytes and the throughput of eight soft tokens beside those of four retrieved texts."""
    figure = _padded_figure(3.9)
    tokens, storage, served = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 0.8))
    _draw_dumbbells(tokens, numbers["extra_prompt_tokens"], title="extra tokens in each prompt")
    _draw_dumbbells(
        storage, {n: [x / 1000 for x in of] for n, of in numbers["bytes_per_user"].items()}, title="KB a user"
    )
    storage.set_yticklabels([])
    for place, (row, rate) in enumerate(numbers["requests_per_second"].items()):
        served.bar(place, rate, color=_SERVED[row][1], width=0.6, zorder=2)
        served.annotate(f"{rate:.2f}", (place, rate), xytext=(0, 3), textcoords="offset points", ha="center", color=INK)
    served.set_xticks(range(len(_SERVED)), [label for label, _ in _SERVED.values()])
    served.set_title("requests a second, vLLM", loc="left", color=INK, fontsize=10)
    served.grid(axis="y", color=GRID)
    served.margins(y=0.12)
    legend = [_legend("plug, soft tokens", BLUE, "o"), _legend("four retrieved texts", YELLOW, "s")]
    return Drawing("Cost of soft tokens and of retrieved texts", _cost_text(numbers), numbers, finished(figure, legend))


FIGURES: Mapping[str, tuple[Callable[[Path], Numbers], Callable[[Numbers], Drawing]]] = {
    "personal-gain": (personal_gain_numbers, personal_gain),
    "cold-start": (cold_start_numbers, cold_start),
    "soft-token-cost": (soft_token_cost_numbers, soft_token_cost),
}
"""For each file, the function that reads its numbers and the one that draws them."""


def svg_of(name: str, numbers: Numbers) -> str:
    """Return the text of a figure's file."""
    title, text, data, figure = FIGURES[name][1](numbers)
    return standalone_svg(figure, key=name, title=title, text=text, data=data)


def _padded_figure(height: float) -> Figure:
    """Return an empty figure, ten inches wide, with a margin inside its card."""
    figure = new_figure(10, height)
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.12, h_pad=0.12)
    return figure


def _gain(part: ResultPart, row: str) -> Comparison:
    gain = part.comparison(row, NO_HISTORY, NegativeLogLikelihood.name)
    if gain is None:
        raise SystemExit(f"The results do not compare {row} with {NO_HISTORY}. Run `personaplug bench` again.")
    return gain


def _rounded(gain: Comparison) -> list[float]:
    """Return the difference and the ends of its interval with four digits."""
    low, high = (gain.difference if end is None else end for end in (gain.low, gain.high))
    return [round(value, 4) + 0.0 for value in (gain.difference, low, high)]


def _legend(label: str, color: str, marker: str) -> dict[str, Any]:
    return {"label": label, "color": color, "marker": marker, "linestyle": ""}


def _draw_gains(axes: Axes, gains: Numbers, *, position: int) -> None:
    for shift, (name, (_, color, marker)) in zip((-0.2, 0.0, 0.2), SERIES.items(), strict=True):
        gain, low, high = gains[name]
        if gain < LOWEST:
            place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
            axes.annotate(f"← {gain:.2f}", (0.01, position + shift), color=color, **place)
            continue
        axes.errorbar(gain, position + shift, xerr=[[gain - low], [high - gain]], fmt=marker, color=color, capsize=2)


def _draw_curve(axes: Axes, gains: Sequence[Sequence[float]], *, color: str, marker: str, lowest: float) -> None:
    shift = 0.06 if marker == "s" else -0.06
    shown = [(place, *gain) for place, gain in enumerate(gains) if gain[0] >= lowest]
    places, heights = [place for place, *_ in shown], [gain for _, gain, *_ in shown]
    axes.plot(places, heights, marker=marker, markersize=4, color=color, zorder=3)
    for place, _, low, high in shown:
        axes.vlines(place + shift, low, high, color=color, linewidth=1, zorder=2)
    hidden = [gain[0] for gain in gains if gain[0] < lowest]
    if hidden:
        label = f"↓ {max(hidden):.2f} to {min(hidden):.2f}"
        axes.annotate(label, (1, 0.03), xycoords="axes fraction", color=color, ha="right", fontsize=9)


def _draw_dumbbells(axes: Axes, values: Mapping[str, Sequence[float]], *, title: str) -> None:
    for place, (plug, texts) in enumerate(values.values()):
        axes.hlines(place, min(plug, texts), max(plug, texts), color=GRID, linewidth=3, zorder=1)
        axes.plot(plug, place, "o", color=BLUE, zorder=3)
        axes.plot(texts, place, "s", color=YELLOW, zorder=2)
    axes.set_yticks(range(len(values)), values)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.grid(axis="x", color=GRID)


def _first_gains(numbers: Numbers) -> dict[str, str]:
    """Return for each set the number of items from which on all gains have intervals above zero, or "never"."""
    firsts = {}
    for name, of_rows in numbers.items():
        items = list(of_rows[PLUG])
        is_above = [low > 0 for _, low, _ in of_rows[PLUG].values()]
        firsts[name] = next((item for place, item in enumerate(items) if all(is_above[place:])), "never")
    return firsts


def _cost_text(numbers: Numbers) -> str:
    ends = {
        cost: [(min(values), max(values)) for values in zip(*numbers[cost].values(), strict=True)]
        for cost in ("extra_prompt_tokens", "bytes_per_user")
    }
    (tokens, more), (size, texts) = ends["extra_prompt_tokens"], ends["bytes_per_user"]
    rates = numbers["requests_per_second"]
    return (
        f"Soft tokens add {tokens[0]:.0f} to {tokens[1]:.0f} tokens to a prompt, four retrieved texts {more[0]:.0f} to "
        f"{more[1]:.0f}. A user's vectors take {size[0] / 1000:.0f} to {size[1] / 1000:.0f} KB, the texts "
        f"{texts[0] / 1000:.0f} to {texts[1] / 1000:.0f} KB. vLLM answers {rates['plain']:.2f} requests a second with "
        f"plain prompts, {rates['persona']:.2f} with the plug, {rates['retrieval']:.2f} with the texts."
    )


def main() -> None:
    """Draw all figures from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets")
    arguments = parser.parse_args()
    for name, (read, _) in FIGURES.items():
        path = arguments.out / f"{name}.svg"
        write_text(path, svg_of(name, read(arguments.results)))
        print(path)


if __name__ == "__main__":
    main()
