"""Tables show each number in its cell, and a dash for unknown values."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from result_objects import typed

from personaplug.analysis.rendering import Table
from personaplug.analysis.results_file import Comparison, Results
from personaplug.analysis.tables import gain_cell, results_table, set_names


def row(method: str, *, mae: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
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


def text_of(results: dict[str, Any]) -> str:
    return results_table(typed(results))


def tables(text: str) -> list[list[dict[str, str]]]:
    """Return the lines of every Markdown table by column title; "p#1" is the second "p"."""
    all_tables = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            titles = [
                f"{title}#{lines[0][:index].count(title)}" if title in lines[0][:index] else title
                for index, title in enumerate(lines[0])
            ]
            all_tables.append([dict(zip(titles, line, strict=True)) for line in lines[2:]])
    return all_tables


def test_row_shows_its_scores_intervals_and_rates() -> None:
    (plain, plug), (_, rates) = tables(text_of(results([row("plain", mae=1.0), row("plug", mae=0.7512)])))
    assert plug == {
        "method": "plug",
        "mae ↓": "0.751 [0.651, 0.851]",
        "accuracy ↑": "0.500 [0.450, 0.550]",
    }
    assert rates == {
        "method": "plug",
        "invalid": "1.2%",
        "truncated": "0.0%",
        "no history": "25.0%",
        "prompt tokens": "161.2",
        "seconds": "12.5",
    }
    assert plain["method"] == "plain"
    assert plain["mae ↓"].startswith("1.000 ")


def test_head_describes_the_run() -> None:
    head = text_of(results([row("plug", mae=1)], users=50)).split("\n\n")[:2]
    assert head == [
        "task Movie_stars · split dev · samples 250 · users 50 · placement prefix · seeds 0, 1, 2",
        "- model: toy (width 64)\n- encoder: hash",
    ]


def test_columns_line_up_and_are_valid_markdown() -> None:
    text = text_of(results([row("plain", mae=1), row("instruction-only", mae=10.5)], pair("plug", "plain")))
    for block in (block for block in text.split("\n\n") if block.startswith("|")):
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({tuple(index for index, char in enumerate(line) if char == "|") for line in lines}) == 1
        assert set(lines[1]) <= set("|:- ")


@pytest.mark.parametrize(
    ("metric", "arrow"),
    [("accuracy", "↑"), ("f1", "↑"), ("rouge_1", "↑"), ("rouge_l", "↑"), ("mae", "↓"), ("rmse", "↓")],
)
def test_every_metric_shows_its_direction(metric: str, arrow: str) -> None:
    [[line]] = tables(text_of({"rows": [{"method": "plug", "metrics": {metric: 0.5}}]}))
    assert line == {"method": "plug", f"{metric} {arrow}": "0.500"}


def test_unknown_metric_has_no_arrow() -> None:
    rows = [{"method": "x", "metrics": {"bleu": 0.5}}]
    assert tables(text_of({"rows": rows})) == [[{"method": "x", "bleu": "0.500"}]]


def test_seed_spread_and_decoding_are_shown_if_known() -> None:
    spread = row("plug", mae=1, seed_spread={"mae": 0.0123}, decoding="scored")
    text = text_of(results([row("plain", mae=1), spread]))
    (plain, plug), (plain_rates, plug_rates) = tables(text)
    assert (plain["± seeds"], plain_rates["answers"]) == ("–", "–")
    assert (plug["± seeds"], plug_rates["answers"]) == ("±0.012", "scored")
    assert "± seeds: standard deviation" in text
    bare = text_of(results([row("plain", mae=1)]))
    assert "±" not in bare
    assert "answers" not in bare


def test_rows_of_different_size_show_their_n() -> None:
    text = text_of(results([row("plain", mae=1), row("plug", mae=1, n=9)]))
    assert [line["n"] for line in tables(text)[0]] == ["250", "9"]
    assert "samples" not in text


@pytest.mark.parametrize("dropped", [key for key in row("plug", mae=1) if key != "method"])
def test_row_without_an_optional_field_is_shown(dropped: str) -> None:
    short = {key: value for key, value in row("plug", mae=1).items() if key != dropped}
    both = tables(text_of(results([row("plain", mae=1), short])))[0]
    assert len(both) == 2
    assert text_of(results([short]))


def test_results_without_optional_fields_are_shown() -> None:
    assert text_of({"rows": []}) == "No rows."
    assert text_of({"rows": [{"method": "x"}], "pairs": None, "notes": None, "seeds": None})
    whole = results([row("plug", mae=1), row("wrong-user", mae=1)], pair("plug", "wrong-user"))
    for key in whole.keys() - {"rows"}:
        assert text_of({name: value for name, value in whole.items() if name != key})
    for key in ("low", "high", "p"):
        assert text_of(whole | {"pairs": [{k: v for k, v in whole["pairs"][0].items() if k != key}]})


def test_personal_gain_comes_first_and_is_named() -> None:
    pairs = [
        pair("plug", "plain"),
        pair("plug", "wrong-user", p=0.0002),
        pair("plug", "plain", metric="accuracy", difference=-0.05, p=0.4),
    ]
    text = text_of(results([row("plug", mae=1), row("wrong-user", mae=1)], *pairs))
    gain, other = tables(text)[2]
    assert gain == {
        "comparison": "plug against wrong-user (personal gain)",
        "mae ↓ advantage": "+0.200 [+0.100, +0.350]",
        "p": "< 0.001",
        "accuracy ↑ advantage": "–",
        "p#1": "–",
    }
    assert other["comparison"] == "plug against plain"
    assert other["accuracy ↑ advantage"] == "-0.050 [-0.150, +0.100]"
    assert (other["p"], other["p#1"]) == ("0.004", "0.400")
    assert "not corrected for the number of comparisons, 3." in text
    assert "Personal gain:" in text


def test_control_against_another_row_is_not_a_personal_gain() -> None:
    rows = [row(name, mae=1) for name in ("plain", "plug", "wrong-user", "shuffled")]
    text = text_of(results(rows, pair("shuffled", "wrong-user"), pair("wrong-user", "plain")))
    assert "ersonal gain" not in text


def test_results_without_pairs_have_no_comparisons() -> None:
    text = text_of(results([row("plug", mae=1)]))
    assert len(tables(text)) == 2
    assert "advantage" not in text


@pytest.mark.parametrize("value", [None, math.nan])
def test_missing_numbers_are_shown_as_nan(value: float | None) -> None:
    broken = row("plug", mae=1) | {"metrics": {"mae": value}, "intervals": {"mae": [value, value]}}
    unsure = pair("wrong-user", "plug") | dict.fromkeys(("difference", "low", "high", "p"), value)
    (line, _), _, (gain,) = tables(text_of(results([broken, row("wrong-user", mae=1)], unsure)))
    assert line["mae ↓"] == "nan [nan, nan]"
    assert gain["mae ↓ advantage"] == "nan [nan, nan]"
    assert gain["p"] == "nan"


def test_huge_errors_and_negative_zeros_stay_short() -> None:
    rows = [row("plug", mae=1) | {"metrics": {"mae": 1e30, "rmse": math.inf}, "intervals": {}}]
    (line,), _, (gain,) = tables(text_of(results(rows, pair("plug", "wrong-user", difference=-0.00001))))
    assert (line["mae ↓"], line["rmse ↓"]) == ("1e+30", "inf")
    assert gain["mae ↓ advantage"].startswith("+0.000 ")


def test_columns_of_point_estimates_have_a_direction_and_a_note() -> None:
    metrics = {"mae": 1.0, "mae@median": 0.8, "accuracy@median": 0.4}
    text = text_of(
        results([row("plug", mae=1, metrics=metrics)], pair("plug", "plain", metric="mae@median", difference=0.25))
    )
    scores, _, compared = tables(text)
    assert (scores[0]["mae ↓"], scores[0]["mae@median ↓"]) == ("1.000 [0.900, 1.100]", "0.800")
    assert scores[0]["accuracy@median ↑"] == "0.400"
    assert compared[0]["mae@median ↓ advantage"].startswith("+0.250")
    assert "all metrics score the same predictions" in text
    assert "score the same predictions" not in text_of(results([row("plug", mae=1)]))


def test_notes_come_last_with_one_line_each() -> None:
    text = text_of(results([row("plug", mae=1)], notes=["two\nlines", "Bootstrap over 50 users."]))
    assert text.endswith("- two lines\n- Bootstrap over 50 users.")


def test_bar_in_a_name_does_not_break_the_table() -> None:
    text = text_of({"rows": [{"method": "plug|x\ny"}]})
    assert r"plug\|x y" in text


def test_table_does_not_change_after_a_round_trip() -> None:
    rows = [row("plug", mae=1, seed_spread={"mae": 0.1}), row("wrong-user", mae=1)]
    whole = typed(results(rows, pair("plug", "wrong-user"), notes=["a"]))
    assert results_table(Results.from_json(json.loads(json.dumps(whole.to_json())))) == results_table(whole)


def test_costs_are_shown_in_readable_units() -> None:
    rows = [
        row("plain", mae=1, costs={"extra_prompt_tokens": 0.0, "bytes_per_user": None, "seconds_per_user": None}),
        row("plug", mae=1, costs={"extra_prompt_tokens": 2.0, "bytes_per_user": 1234, "seconds_per_user": 0.01234}),
        row("lora", mae=1, costs={"extra_prompt_tokens": 2.0, "bytes_per_user": 3_400_000, "seconds_per_user": 1234.5}),
        row("bm25:4", mae=1, cut_items_rate=0.034, costs={"extra_prompt_tokens": 212.34, "bytes_per_user": 880}),
    ]
    plain, plug, lora, retrieval = tables(text_of(results(rows)))[1]
    titles = ("extra prompt tokens", "bytes per user", "seconds to add a user")
    assert [plain[title] for title in titles] == ["0.0", "–", "–"]
    assert [plug[title] for title in titles] == ["2.0", "1.2 KB", "0.0123"]
    assert [lora[title] for title in titles] == ["2.0", "3.4 MB", "1,234"]
    assert [retrieval[title] for title in titles] == ["212.3", "880 B", "–"]
    assert (retrieval["cut items"], plain["cut items"]) == ("3.4%", "–")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1.0 KB"), (999_960, "1.0 MB"), (10**9, "1.0 GB"), (2.5e12, "2,500.0 GB")],
)
def test_size_has_the_next_unit_if_it_rounds_up(size: float, text: str) -> None:
    [[line]] = tables(text_of({"rows": [{"method": "x", "costs": {"bytes_per_user": size}}]}))[1:]
    assert line["bytes per user"] == text


def test_averages_over_users_are_shown_if_users_have_several_samples() -> None:
    row_with_averages = row("plug", mae=1, per_user={"mae": 0.875, "accuracy": None})
    text = text_of(results([row_with_averages], users=50))
    [line] = tables(text)[0]
    assert line["per user"] == "0.875"
    assert "per user#1" not in line
    assert "each user counts once" in text
    assert "per user" not in text_of(results([row_with_averages], users=250))


def test_personal_gain_is_shown_beside_its_method() -> None:
    rows = [row(name, mae=1) for name in ("plain", "plug", "wrong-user", "bm25:4", "bm25:4@wrong-user")]
    pairs = [
        pair("plug", "wrong-user") | {"p_holm": 0.012},
        pair("plug", "wrong-user", metric="accuracy", difference=0.7),
        pair("bm25:4", "plain", difference=0.9),
        pair("bm25:4", "bm25:4@wrong-user", p=0.0001),
        pair("plug", "bm25:4@wrong-user", difference=0.5),
    ]
    lines = {line["method"]: line for line in tables(text_of(results(rows, *pairs)))[0]}
    assert lines["plug"]["personal gain (mae)"] == "+0.200 [+0.100, +0.350], Holm p = 0.012"
    assert lines["bm25:4"]["personal gain (mae)"] == "+0.200 [+0.100, +0.350], p < 0.001"
    assert [lines[name]["personal gain (mae)"] for name in ("plain", "wrong-user", "bm25:4@wrong-user")] == ["–"] * 3
    assert list(typed(results(rows, *pairs)).personal_gains("accuracy")) == ["plug"]


def test_corrected_and_uncorrected_p_have_columns_and_notes() -> None:
    pairs = [
        pair("plug", "plain", metric="accuracy") | {"p_holm": 0.0004, "mcnemar_p": [0.03, 0.0001, None, 0.02]},
        pair("plug", "lora", metric="accuracy") | {"mcnemar_p": [0.5]},
        pair("plug", "profile", metric="accuracy") | {"mcnemar_p": [0.25]},
        pair("plug", "plain") | {"p_holm": None, "mcnemar_p": None},
    ]
    text = text_of(results([row("plug", mae=1)], *pairs))
    line, single, bare = tables(text)[2]
    assert (line["p"], line["Holm p"], line["McNemar p"]) == ("0.004", "< 0.001", "< 0.001 to 0.030")
    assert (single["McNemar p"], bare["McNemar p"], bare["Holm p"]) == ("0.500", "0.250", "–")
    assert (line["p#1"], "Holm p#1" in line, "McNemar p#1" in line) == ("0.004", False, False)
    assert "corrected by Holm's method" in text
    assert "not corrected for" not in text
    assert "personal gains; against plain" in text
    assert "assumes independent samples" in text


def test_subgroups_are_shown_side_by_side() -> None:
    parts = [
        {
            "name": name,
            "rows": [row("plug", mae=mae, n=80), row("wrong-user", mae=1, n=80)],
            "pairs": [pair("plug", "wrong-user", difference=1 - mae)],
        }
        for name, mae in (("short", 0.9), ("long", 0.6))
    ]
    parts.append({"name": "none"})
    text = text_of(results([row("plug", mae=1)], subgroups=parts))
    scores, gains = tables(text)[2:]
    assert "mae ↓ by subgroup:" in text
    assert scores[0]["method"] == "plug"
    assert scores[0]["short (n = 80)"] == "0.900 [0.800, 1.000]"
    assert scores[0]["long (n = 80)"] == "0.600 [0.500, 0.700]"
    assert [line["method"] for line in gains] == ["plug"]
    assert gains[0]["long (n = 80)"] == "+0.400 [+0.300, +0.550], p = 0.004"


def test_bold_cells_are_marked_and_still_line_up() -> None:
    lines = Table(("row", "a"), (("x", "1"), ("y|z", None)), frozenset({(0, 1)})).to_markdown().splitlines()
    assert lines[2:] == ["| x    | **1** |", "| y\\|z |     – |"]
    assert len({len(line) for line in lines}) == 1


def test_significance_uses_the_corrected_p() -> None:
    pair = Comparison("a", "b", "mae", 0.5)
    assert replace(pair, p=0.04).is_significant
    assert not replace(pair, p=0.04, p_holm=0.08).is_significant
    assert not replace(pair, p=math.nan).is_significant
    assert not pair.is_significant


def test_gain_without_p_shows_only_the_difference() -> None:
    assert gain_cell(Comparison("a", "b", "mae", 0.5)) == "+0.500"
    assert gain_cell(None) is None


def test_controls_are_distinguished_from_methods() -> None:
    controls = ["wrong-user", "shuffled", "random-vectors", "mean-persona", "population-persona", "bm25:4@wrong-user"]
    methods = ["plain", "instruction-only", "plug", "random:4", "profile", "lora-per-user", "all-knowing"]
    whole = typed({"rows": [{"method": name} for name in controls + methods]})
    assert [row.name for row in whole.rows if row.method.is_control] == controls


def test_sets_get_distinct_names() -> None:
    facts = [{"set": "A", "task": "T"}, {"task": "T"}, {"task": "T", "variant": "head"}, {"task": "T"}, {}]
    assert set_names([typed({"rows": [], **named}) for named in facts]) == ["A", "T #1", "T (head)", "T #2", "–"]
    rows = [{"method": "a"}, {"method": "b", "metrics": {"f1": 1, "mae": 2}}]
    assert typed({"rows": rows}).leading_metric == "f1"
    assert typed({"rows": []}).leading_metric == ""


def test_third_party_row_has_its_gain_and_control() -> None:
    mine = row("mine", mae=1, family="plug", history="own")
    control = row("strange", mae=1.2, family="plug", history="wrong-user", control_of="mine")
    lines = tables(text_of(results([mine, control], pair("mine", "strange"))))
    assert lines[0][0]["personal gain (mae)"].startswith("+0.200")
    assert lines[2][0]["comparison"] == "mine against strange (personal gain)"
