"""Draw the figure of the README: the gain in the right answer's log-likelihood from a history.

    python benchmarks/personal_gain_figure.py --results benchmarks/results --out docs/assets/personal-gain.svg

A point is the difference to `instruction-only`: soft tokens trained on the same samples without a history. Its interval
is from a bootstrap over users and trainings.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from personaplug.analysis.likelihood_metrics import NegativeLogLikelihood
from personaplug.analysis.results import Settings, build_results
from personaplug.analysis.results_file import Comparison
from personaplug.analysis.trials import TrialFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "personal-labels": (
        "One of a fixed list: nats an answer",
        ("Movie_stars", "Critic_rating", "News_category", "Citation"),
    ),
    "personal-texts": ("Written text: nats a token", ("Scholarly_title", "LaMP_7", "LaMP_4", "News_headline")),
}
LOWEST = -0.45
"""A point below this value is written as a number at the edge."""

NO_HISTORY = "instruction-only"
SERIES: Mapping[str, tuple[str, str, str]] = {
    "plug": ("plug, the user's own history", "#0072b2", "o"),
    "wrong-user": ("plug, a stranger's history", "#8c8c8c", "x"),
    "instruction+bm25:4": ("four retrieved texts in the prompt", "#e69f00", "s"),
}


def gains_of(trials_file: Path) -> dict[str, Comparison]:
    """Return each series' gain over no history in the right answer's log-likelihood."""
    samples, trials = TrialFile(trials_file).load()
    if samples is None:
        raise SystemExit(f"{trials_file} is missing or empty. Run `personaplug bench {trials_file.parent.name}`.")
    selected = [trial for trial in trials if trial.method.name in {NO_HISTORY, *SERIES}]
    settings = Settings([NegativeLogLikelihood()], resamples=2000, seed=0)
    pairs = build_results(samples, selected, settings=settings).pairs  # all pairs, because there are few rows
    return {pair.a: pair for pair in pairs if pair.b == NO_HISTORY} | {
        pair.b: replace(pair, difference=-pair.difference, low=-pair.high, high=-pair.low)
        for pair in pairs
        if pair.a == NO_HISTORY and pair.low is not None and pair.high is not None
    }


def draw(results: Path, out: Path) -> None:
    """Draw the panels into an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "personaplug", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(10, 3.4), layout="constrained")
    for axes, (experiment, (title, sets)) in zip(panels, PANELS.items(), strict=True):
        for position, name in enumerate(sets):
            _draw_set(axes, gains_of(results / experiment / f"{name}.trials.jsonl"), position=position)
        axes.set_yticks(range(len(sets)), sets)
        axes.invert_yaxis()
        axes.axvline(0, color="#222222", linewidth=1)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color="#e3e3e3")
        axes.set_axisbelow(True)
    figure.supxlabel("how much likelier the right answer is than without a history (right is better)", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=len(SERIES), frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def _draw_set(axes: Axes, gains: Mapping[str, Comparison], *, position: int) -> None:
    for shift, (name, (label, color, marker)) in zip((-0.2, 0.0, 0.2), SERIES.items(), strict=True):
        gain = gains[name]
        if gain.difference < LOWEST:
            axes.annotate(f"← {gain.difference:.2f}", (LOWEST, position + shift), color=color, va="center", fontsize=9)
            continue
        ends = [[gain.difference - (gain.low or 0)], [(gain.high or 0) - gain.difference]]
        axes.errorbar(gain.difference, position + shift, xerr=ends, fmt=marker, color=color, label=label, capsize=2)


def main() -> None:
    """Draw the figure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/assets/personal-gain.svg"))
    arguments = parser.parse_args()
    draw(arguments.results, arguments.out)


if __name__ == "__main__":
    main()
