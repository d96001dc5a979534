"""Results on a terminal: a verdict in three lines, and tables that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from result_objects import typed

from personaplug.analysis.results_file import load_results
from personaplug.analysis.terminal import terminal_text

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
ROWS = {"plain": 2.0, "instruction-only": 1.0, "wrong-user": 1.5, "plug": 0.5, "user-median": 0.75}


def _results(names: list[str], **more: Any) -> Any:
    rows = [
        {
            "method": name,
            "n": 9,
            "metrics": {"mae": ROWS[name]},
            "intervals": {"mae": [ROWS[name] - 0.1, ROWS[name] + 0.1]},
        }
        for name in names
    ]
    return typed({"task": "T", "rows": rows, "pairs": [], "notes": ["a note " * 40]} | more)


def _gain(**more: Any) -> dict[str, Any]:
    return {
        "a": "plug",
        "b": "wrong-user",
        "metric": "mae",
        "difference": 1.0,
        "low": 0.5,
        "high": 1.5,
        "p": 0.02,
    } | more


def test_the_verdict_names_the_best_row_the_gain_and_the_free_rival() -> None:
    lines = terminal_text(_results(list(ROWS), pairs=[_gain()]), width=200).splitlines()
    assert lines[:3] == [
        "Best row: plug (mae ↓ 0.500 [0.400, 0.600]); better than user-median (mae ↓ 0.750 [0.650, 0.850])",
        "Personal gain: plug +1.000 [+0.500, +1.500], p = 0.020 over its own wrong-user control",
        "Best free rival: user-median (mae ↓ 0.750 [0.650, 0.850])",
    ]


def test_the_verdict_says_what_is_not_shown() -> None:
    close = {"a": "plug", "b": "user-median", "metric": "mae", "difference": 0.25, "p": 0.2}
    lines = terminal_text(_results(["plug", "user-median"], pairs=[close]), width=200).splitlines()
    assert "not clearly better than user-median" in lines[0]
    assert lines[1].startswith("Personal gain: not measured")
    lines = terminal_text(_results(["plain"]), width=200).splitlines()
    assert lines[0] == "Best row: plain (mae ↓ 2.000 [1.900, 2.100])"
    assert lines[2].startswith("Best free rival: none in this table")
    assert terminal_text(_results([])).endswith("No rows.")


@pytest.mark.parametrize("width", [80, 100, 120, 250])
def test_published_tables_fit_and_lose_no_row_or_metric(width: int) -> None:
    for path in [RESULTS / "quickstart.json", *sorted((RESULTS / "personal-labels").glob("*.json"))]:
        results = load_results(path)
        text = terminal_text(results, width=width)
        assert max(map(len, text.splitlines())) <= width
        titles = [cell.strip() for line in text.splitlines() if line.startswith("| method") for cell in line.split("|")]
        assert {metric.split()[0] for metric in results.metric_names} <= {title.split(" ")[0] for title in titles}
        assert all(f"| {row.name} " in text for row in results.rows)


def test_columns_of_the_wide_form_and_their_notes_are_left_out() -> None:
    results = load_results(RESULTS / "quickstart.json")
    text = terminal_text(results, width=120)
    for absent in ("per user:", "McNemar"):
        assert absent not in text
    assert "mae ↓ advantage" in text
    assert "rmse ↓ advantage" not in text
