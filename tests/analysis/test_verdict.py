"""The verdict on a table: yes, no, not shown, or not measured with the row to add."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from result_objects import method_of, typed

from personaplug.analysis.method_info import main_row
from personaplug.analysis.verdict import price, rows_of_verdict, verdict

SCORES = {"instruction-only": 0.8, "wrong-user": 1.5, "plug": 0.5, "user-mean": 0.9, "user-median": 0.75}
RIVALS = ("wrong-user", "instruction-only", "user-median")


def _pair(b: str, difference: float, p: float | None, **more: Any) -> dict[str, Any]:
    return {"a": "plug", "b": b, "metric": "mae", "difference": difference, "low": -2.0, "high": 2.0, "p": p} | more


def _verdict(
    pairs: list[dict[str, Any]], *, metric: str = "mae", scores: Mapping[str, float | None] = SCORES
) -> list[str]:
    rows = [{"method": name, "metrics": {} if score is None else {metric: score}} for name, score in scores.items()]
    pairs = [pair | {"metric": metric} for pair in pairs]
    answers = verdict(typed(json.loads(json.dumps({"rows": rows, "pairs": pairs}))))  # a file may contain NaN
    return [str(answer) for answer in answers]


def test_each_answer_has_its_scores_and_its_rival() -> None:
    pairs = [_pair("wrong-user", 1.0, 0.02), _pair("instruction-only", -0.3, 0.0004), _pair("user-median", 0.25, 0.05)]
    assert _verdict(pairs) == [
        "Is plug personal? Yes: mae ↓ 0.500 against 1.500 of wrong-user; advantage +1.000 [-2.000, +2.000], p = 0.020.",
        "Is plug better than no history? No: mae ↓ 0.500 against 0.800 of instruction-only; "
        "advantage -0.300 [-2.000, +2.000], p < 0.001.",
        "Is plug better than rivals that cost nothing? Not shown: mae ↓ 0.500 against 0.750 of user-median, "
        "the best of 2 such rows; advantage +0.250 [-2.000, +2.000], p = 0.050.",
    ]


@pytest.mark.parametrize("rival", range(3))
@pytest.mark.parametrize(
    ("difference", "p", "holm", "word"),
    [
        (0.2, 0.049, None, "Yes"),
        (-0.2, 0.049, None, "No"),
        (0.2, 0.051, None, "Not shown"),
        (-0.2, 0.9, None, "Not shown"),
        (0.2, 0.01, 0.06, "Not shown"),
        (0.2, 0.01, 0.04, "Yes"),
        (math.nan, math.nan, None, "Not shown"),
        (0.2, None, None, "Not shown"),
    ],
)
def test_the_corrected_p_and_the_sign_decide(
    rival: int, difference: float, p: float | None, holm: float | None, word: str
) -> None:
    pair = _pair(RIVALS[rival], difference, p) | ({} if holm is None else {"p_holm": holm})
    sentence = _verdict([pair])[rival]
    assert f"? {word}: mae ↓ 0.500 against" in sentence
    assert ("Holm p" in sentence) == (holm is not None)
    assert ("without a p:" in sentence) == (p is None or math.isnan(p))


def test_a_reversed_pair_is_turned_around() -> None:
    reversed_pair = _pair("plug", -0.25, 0.01, low=-0.4, high=-0.1) | {"a": "user-median"}
    assert _verdict([reversed_pair])[2].endswith("advantage +0.250 [+0.100, +0.400], p = 0.010.")


@pytest.mark.parametrize(
    ("metric", "best", "add"),
    [
        ("mae", "user-median", "user-mean,user-median,user-majority"),
        ("accuracy", "user-mean", "user-majority,classical"),
        ("rouge_1", "user-mean", "copy,user-words"),
    ],
)
def test_the_metric_determines_the_best_rival_and_the_rows_to_add(metric: str, best: str, add: str) -> None:
    pairs = [_pair(name, 0.1, 0.01) for name in ("user-median", "user-mean")]
    assert f" of {best}, the best of 2 such rows" in _verdict(pairs, metric=metric)[2]
    assert _verdict([], metric=metric, scores={"plug": 0.5}) == [
        "Is plug personal? Not measured: add the row plug@wrong-user to --methods.",
        "Is plug better than no history? Not measured: add the row instruction-only to --methods.",
        f"Is plug better than rivals that cost nothing? Not measured: add the rows {add} to --methods.",
    ]


def test_rows_that_count_labels_are_rivals() -> None:
    scores = {"plug": 0.5, "user-majority": 0.9, "user-majority@wrong-user": 0.1, "all-knowing": 0.05}
    sentence = _verdict([_pair("user-majority", 0.4, 0.01)], scores=scores)[2]
    assert "0.900 of user-majority;" in sentence
    for name in ("instruction+labels", "instruction+neighbors"):
        sentence = _verdict([_pair(name, 0.1, 0.2)], scores=scores | {name: 0.6})[2]
        assert f"Not shown: mae ↓ 0.500 against 0.600 of {name}, the best of 2 such rows" in sentence


def test_missing_and_nan_scores_give_no_verdict() -> None:
    pairs = [_pair(name, math.nan, math.nan) for name in ("user-mean", "wrong-user")]
    personal, no_history, free = _verdict(pairs, scores={**SCORES, "wrong-user": math.nan, "user-median": math.nan})
    assert "Not shown: mae ↓ 0.500 against nan of wrong-user; advantage nan, without a p" in personal
    assert no_history.endswith(
        "Not measured: the results do not compare plug with instruction-only. Evaluate both in one table."
    )
    assert " of user-mean;" in free
    likelihood = _verdict([], metric="nll", scores={"plug": 1.0, "copy": None})
    assert likelihood[2].endswith("Not measured: copy has no nll.")


def test_a_table_without_a_personal_row_is_not_measured() -> None:
    assert _verdict([], scores={"plain": 1.0}) == _verdict([], scores={}) == []
    (sentence,) = _verdict([], scores={"plain": 1.0, "user-mean": 0.5, "random-vectors": 0.4})
    assert (
        sentence == "Is it personal? Not measured: no row uses the user's own history. Add the row plug to --methods."
    )


@pytest.mark.parametrize(
    ("names", "main"),
    [
        (["plain", "bm25:4", "plug+bm25:1", "wrong-user", "plug", "paper-plug"], "plug"),
        (["bm25:4", "plug+bm25:1", "user-mean"], "plug+bm25:1"),
        (["user-mean", "instruction+labels", "bm25:4", "profile"], "bm25:4"),
        (["plain", "lora", "wrong-user", "population-persona", "classical"], None),
    ],
)
def test_the_main_row_is_the_first_plug_or_else_the_first_row_with_own_history(
    names: list[str], main: str | None
) -> None:
    row = main_row([method_of(name) for name in names])
    assert (row.name if row else None) == main


def _costly(name: str, score: float, tokens: float | None, *, size: float | None = None) -> dict[str, Any]:
    costs = {"extra_prompt_tokens": tokens, "bytes_per_user": size, "seconds_per_user": None}
    return {"method": name, "metrics": {"mae": score}, "costs": costs}


def test_price_names_the_main_row_and_the_best_row_with_texts_in_the_prompt() -> None:
    rows = [_costly("plug", 0.5, 8, size=24_300), _costly("bm25:4", 0.6, 130.24), _costly("recency:4", 0.7, 90)]
    assert str(price(typed({"rows": rows}))) == (
        "What does plug cost? 8 extra tokens in each prompt, 24.3 KB for each user. "
        "For comparison, bm25:4: 130.2 extra tokens in each prompt."
    )
    assert str(price(typed({"rows": [*rows[1:]]}))).startswith("What does bm25:4 cost? 130.2 extra tokens")
    assert price(typed({"rows": [_costly("plug", 0.5, None), *rows[1:]]})) is None
    assert price(typed({"rows": [{"method": "user-mean", "metrics": {"mae": 0.5}}]})) is None


def test_rows_of_the_verdict_have_roles_and_the_best_rival_follows_the_metric() -> None:
    scores = {"plug": 0.5, "wrong-user": 0.8, "user-mean": 0.9, "user-median": 0.7}
    for metric, best in (("mae", "user-median"), ("accuracy", "user-mean")):
        rows = [{"method": name, "metrics": {metric: score}} for name, score in scores.items()]
        roles = {role: row.name for role, row in rows_of_verdict(typed({"rows": rows})).items()}
        assert roles == {
            "own history": "plug",
            "a stranger's history": "wrong-user",
            "best rival at no cost": best,
        }
    assert rows_of_verdict(typed({"rows": [{"method": "plain", "metrics": {"mae": 1.0}}]})) == {}
