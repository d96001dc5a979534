"""The table for people: every number where it belongs, nothing invented for what is absent."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from personaplug.report import results_table


def row(condition: str, *, mae: float, **more: Any) -> dict[str, Any]:
    return {
        "condition": condition,
        "n": 250,
        "metrics": {"mae": mae, "accuracy": 0.5},
        "intervals": {"mae": [mae - 0.1, mae + 0.1], "accuracy": [0.45, 0.55]},
        "invalid_rate": 0.012,
        "truncated_rate": 0.0,
        "lost_history_rate": 0.25,
        "prompt_tokens_mean": 161.25,
        "seconds": 12.5,
        "peak_memory_bytes": 10**9,
    } | more


def pair(a: str, b: str, *, metric: str = "mae", difference: float = 0.2, p: float | None = 0.004) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "metric": metric,
        "difference": difference,
        "low": difference - 0.1,
        "high": difference + 0.15,
        "p": p,
    }


def results(rows: list[dict[str, Any]], *pairs: dict[str, Any], **more: Any) -> dict[str, Any]:
    about = {
        "task": "Movie_stars",
        "split": "dev",
        "model": "toy (width 64)",
        "encoder": "hash",
        "placement": "prefix",
        "seeds": [0, 1, 2],
        "versions": {},
    }
    return about | {"rows": rows, "pairs": list(pairs)} | more


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every Markdown table of a text: its lines by column title ("p#1" is the second "p")."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            titles = [
                f"{title}#{lines[0][:place].count(title)}" if title in lines[0][:place] else title
                for place, title in enumerate(lines[0])
            ]
            found.append([dict(zip(titles, line, strict=True)) for line in lines[2:]])
    return found


def test_a_row_shows_its_scores_intervals_and_rates() -> None:
    [[plain, plug]] = tables(results_table(results([row("plain", mae=1.0), row("plug", mae=0.7512)])))
    assert plug == {
        "condition": "plug",
        "mae ↓": "0.751 [0.651, 0.851]",
        "accuracy ↑": "0.500 [0.450, 0.550]",
        "invalid": "1.2%",
        "truncated": "0.0%",
        "no history": "25.0%",
        "prompt tokens": "161.2",
        "seconds": "12.5",
    }
    assert plain["condition"] == "plain"
    assert plain["mae ↓"].startswith("1.000 ")


def test_the_head_says_what_was_run() -> None:
    head = results_table(results([row("plug", mae=1)], users=50)).split("\n\n")[:2]
    assert head == [
        "task Movie_stars · split dev · samples 250 · users 50 · placement prefix · seeds 0, 1, 2",
        "- model: toy (width 64)\n- encoder: hash",
    ]


def test_columns_line_up_and_are_valid_markdown() -> None:
    text = results_table(results([row("plain", mae=1), row("instruction-only", mae=10.5)], pair("plug", "plain")))
    for block in (block for block in text.split("\n\n") if block.startswith("|")):
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({tuple(place for place, sign in enumerate(line) if sign == "|") for line in lines}) == 1
        assert set(lines[1]) <= set("|:- ")


@pytest.mark.parametrize(
    ("metric", "arrow"),
    [("accuracy", "↑"), ("f1", "↑"), ("rouge_1", "↑"), ("rouge_l", "↑"), ("mae", "↓"), ("rmse", "↓")],
)
def test_every_metric_shows_its_direction(metric: str, arrow: str) -> None:
    [[line]] = tables(results_table({"rows": [{"condition": "plug", "metrics": {metric: 0.5}}]}))
    assert line == {"condition": "plug", f"{metric} {arrow}": "0.500"}


def test_a_metric_of_others_has_no_arrow() -> None:
    assert tables(results_table({"rows": [{"metrics": {"bleu": 0.5}}]})) == [[{"condition": "–", "bleu": "0.500"}]]


def test_seeds_spread_and_decoding_show_only_where_they_are() -> None:
    spread = row("plug", mae=1, seed_spread={"mae": 0.0123}, decoding="scored")
    text = results_table(results([row("plain", mae=1), spread]))
    [[plain, plug]] = tables(text)
    assert (plain["± seeds"], plain["answers"]) == ("–", "–")
    assert (plug["± seeds"], plug["answers"]) == ("±0.012", "scored")
    assert "± seeds: standard deviation" in text
    bare = results_table(results([row("plain", mae=1)]))
    assert "±" not in bare
    assert "answers" not in bare


def test_rows_of_different_size_show_their_n() -> None:
    text = results_table(results([row("plain", mae=1), row("plug", mae=1, n=9)]))
    assert [line["n"] for line in tables(text)[0]] == ["250", "9"]
    assert "samples" not in text


@pytest.mark.parametrize("dropped", list(row("plug", mae=1)))
def test_any_key_of_a_row_may_be_missing(dropped: str) -> None:
    short = {key: value for key, value in row("plug", mae=1).items() if key != dropped}
    both = tables(results_table(results([row("plain", mae=1), short])))[0]
    assert len(both) == 2
    assert results_table(results([short]))


def test_every_key_of_the_object_and_of_a_pair_may_be_missing() -> None:
    assert results_table({}) == "No rows."
    assert results_table({"rows": [{}], "pairs": [{}], "notes": None, "seeds": None})
    whole = results([row("plug", mae=1)], pair("plug", "wrong-user"))
    for key in whole:
        assert results_table({name: value for name, value in whole.items() if name != key})
    for key in whole["pairs"][0]:
        assert results_table(whole | {"pairs": [{k: v for k, v in whole["pairs"][0].items() if k != key}]})


def test_the_personal_gain_comes_first_and_is_named() -> None:
    pairs = [
        pair("plug", "plain"),
        pair("plug", "wrong-user", p=0.0002),
        pair("plug", "plain", metric="accuracy", difference=-0.05, p=0.4),
    ]
    text = results_table(results([row("plug", mae=1)], *pairs))
    gain, other = tables(text)[1]
    assert gain == {
        "comparison": "plug against wrong-user (personal gain)",
        "mae ↓ advantage": "+0.200 [+0.100, +0.350]",
        "p": "<0.001",
        "accuracy ↑ advantage": "–",
        "p#1": "–",
    }
    assert other["comparison"] == "plug against plain"
    assert other["accuracy ↑ advantage"] == "-0.050 [-0.150, +0.100]"
    assert (other["p"], other["p#1"]) == ("0.004", "0.400")
    assert "not corrected for the 3 comparisons" in text
    assert "Personal gain:" in text


def test_the_personal_gain_is_turned_round_if_the_control_stands_first() -> None:
    [gain] = tables(results_table(results([row("plug", mae=1)], pair("wrong-user", "plug", difference=-0.2))))[1]
    assert gain["comparison"] == "plug against wrong-user (personal gain)"
    assert gain["mae ↓ advantage"] == "+0.200 [+0.050, +0.300]"


def test_a_stranger_against_another_row_is_no_personal_gain() -> None:
    text = results_table(results([row("plug", mae=1)], pair("shuffled", "wrong-user"), pair("wrong-user", "plain")))
    assert "ersonal gain" not in text


def test_no_pairs_no_comparisons() -> None:
    text = results_table(results([row("plug", mae=1)]))
    assert len(tables(text)) == 1
    assert "advantage" not in text


@pytest.mark.parametrize("hole", [None, math.nan])
def test_what_is_no_number_shows_as_nan(hole: float | None) -> None:
    broken = row("plug", mae=1) | {"metrics": {"mae": hole}, "intervals": {"mae": [hole, hole]}}
    unsure = pair("wrong-user", "plug") | dict.fromkeys(("difference", "low", "high", "p"), hole)
    (line,), (gain,) = tables(results_table(results([broken], unsure)))
    assert line["mae ↓"] == "nan [nan, nan]"
    assert gain["mae ↓ advantage"] == "nan [nan, nan]"
    assert gain["p"] == "nan"


def test_huge_errors_and_negative_zeros_stay_short() -> None:
    rows = [row("plug", mae=1) | {"metrics": {"mae": 1e30, "rmse": math.inf}, "intervals": {}}]
    (line,), (gain,) = tables(results_table(results(rows, pair("plug", "wrong-user", difference=-0.00001))))
    assert (line["mae ↓"], line["rmse ↓"]) == ("1e+30", "inf")
    assert gain["mae ↓ advantage"].startswith("+0.000 ")


def test_notes_stand_beneath_and_stay_lines() -> None:
    text = results_table(results([row("plug", mae=1)], notes=["two\nlines", "Bootstrap over 50 users."]))
    assert text.endswith("- two lines\n- Bootstrap over 50 users.")


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    text = results_table({"rows": [{"condition": "plug|x\ny"}]})
    assert r"plug\|x y" in text


def test_a_results_file_read_back_shows_the_same() -> None:
    whole = results([row("plug", mae=1, seed_spread={"mae": 0.1})], pair("plug", "wrong-user"), notes=["a"])
    assert results_table(json.loads(json.dumps(whole))) == results_table(whole)
