"""Results on a terminal: the verdict first, then one table that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
from result_objects import typed

from personaplug.analysis.results_file import Results, load_results
from personaplug.analysis.terminal import terminal_text

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PUBLISHED = [load_results(RESULTS / name) for name in ("quickstart.json", "personal-labels/Movie_stars.json")]


def _titles(results: Results, width: int) -> list[str]:
    lines = terminal_text(results, width=width).splitlines()
    head = next(line for line in lines if line.startswith("method"))
    return [title.strip() for title in head.split("  ") if title.strip()]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160, 250])
def test_no_line_is_wider_than_the_terminal_and_no_row_is_lost(width: int) -> None:
    for results in PUBLISHED:
        text = terminal_text(results, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert f"{results.leading_metric} " in " ".join(_titles(results, width))
        column = [line.split()[0] for line in text.splitlines() if line.strip()]
        assert all(any(row.name.startswith(start) for start in column) for row in results.rows)


def test_long_names_models_and_numbers_are_wrapped() -> None:
    rows = [{"method": "x" * 99, "n": 9, "metrics": {"mae": 1e30}, "intervals": {"mae": [1e30, 2e30]}}]
    text = terminal_text(typed({"rows": rows, "model": "m" * 200, "notes": ["n" * 200]}), width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert text.replace("\n", "").replace(" ", "").count("n" * 200) == 1


def test_width_is_columns_or_80(monkeypatch: pytest.MonkeyPatch) -> None:
    results = PUBLISHED[0]
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError))
    for columns in ("80", "160"):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal_text(results) == terminal_text(results, width=int(columns))
    monkeypatch.delenv("COLUMNS")
    assert terminal_text(results) == terminal_text(results, width=80)


def test_a_wider_terminal_has_more_columns_and_a_note_names_hidden_columns() -> None:
    results = PUBLISHED[0]
    narrow, wide, whole = (_titles(results, width) for width in (80, 160, 400))
    assert narrow == ["method", "mae ↓", "personal gain", "Holm p"]
    assert wide[:4] == whole[:4] == narrow
    assert len(narrow) < len(wide) < len(whole)
    assert {metric.split("@")[0] for metric in results.metric_names} <= {t.split()[0].split("@")[0] for t in whole}
    for width in (80, 160):
        flat = " ".join(terminal_text(results, width=width).split())
        left_out = [title for title in whole if title not in _titles(results, width)]
        assert f"Columns that do not fit the terminal: {', '.join(left_out)}." in flat
        assert "are in the results file (JSON)" in flat
    assert "do not fit" not in terminal_text(results, width=400)


def test_the_verdict_comes_first_and_few_users_cause_a_warning() -> None:
    rows = [{"method": name, "metrics": {"mae": 1.0}} for name in ("plug", "instruction-only")]
    lines = terminal_text(typed({"rows": rows, "users": 6}), width=200).splitlines()
    assert [line.partition("?")[0] for line in lines[:3]] == [
        "Is plug personal",
        "Is plug better than no history",
        "Is plug better than rivals that cost nothing",
    ]
    assert lines[3] == "6 users are too few for reliable intervals and p-values. Test on 20 users or more."
    assert terminal_text(typed({"rows": []})).endswith("No rows.")


def test_nonzero_rates_come_before_further_metrics() -> None:
    rows = [
        {"method": "plain", "metrics": {"mae": 1.0, "rmse": 1.0}, "invalid_rate": 0.25, "truncated_rate": 0.0},
        {"method": "copy", "metrics": {"mae": 1.0, "rmse": 1.0}},
    ]
    assert _titles(typed({"rows": rows}), 200) == ["method", "mae ↓", "invalid", "rmse ↓"]
