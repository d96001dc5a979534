"""Results objects: rows and comparisons of cells, whole and in slices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from personaplug.analysis.metrics import Array, get_metric
from personaplug.analysis.results import Settings, build_results, compared_pairs, history_thirds, with_subgroups
from personaplug.analysis.significance import holm
from personaplug.analysis.trials import EvalSamples, Trial

ACCURACY = get_metric("accuracy", labels=("1", "2"))
SETTINGS = Settings([ACCURACY], resamples=200, seed=0)
GROUPS = [0, 0, 1, 2, 2, 2, 3, 4]
SCORED = EvalSamples(GROUPS, history_items=[1, 1, 5, 3, 3, 3, 9, 9], about={"task": "T", "split": "dev"})


def _hits(*values: int) -> dict[str, Array]:
    return {"accuracy": np.array(values, dtype=np.float64)[:, None]}


PLAIN = Trial("plain", 0, _hits(0, 0, 0, 1, 0, 0, 1, 0), invalid_rate=0.5, decoding="scored", extra_prompt_tokens=0.0)
WRONG = [Trial("wrong-user", s, _hits(1, 0, 0, 1, 0, s, 1, 0), invalid_rate=0.0, decoding="scored") for s in (0, 1)]
PLUG = [
    Trial("plug", s, _hits(1, 1, 1, 1, s, 0, 1, 1), invalid_rate=0.0, seconds=1.0 + s, bytes_per_user=10.0 * s)
    for s in (0, 1)
]


def test_rows_average_over_seeds_and_keep_their_spread() -> None:
    results = build_results(SCORED, [PLAIN, *WRONG, *PLUG], settings=SETTINGS)
    rows = {row["condition"]: row for row in results["rows"]}
    assert list(rows) == ["plain", "wrong-user", "plug"]
    assert results["task"] == "T"
    assert results["seeds"] == [0, 1]
    assert "Two training seeds, which are few: wrong-user, plug." in results["notes"]
    assert rows["plug"]["metrics"]["accuracy"] == pytest.approx((6 / 8 + 7 / 8) / 2)
    assert [one["accuracy"] for one in rows["plug"]["per_seed"]] == [6 / 8, 7 / 8]
    assert rows["plug"]["seed_spread"]["accuracy"] == pytest.approx(np.std([6 / 8, 7 / 8], ddof=1))
    assert (rows["plug"]["seconds"], rows["plug"]["costs"]["bytes_per_user"]) == (1.5, 5.0)
    assert "per_seed" not in rows["plain"]
    low, high = rows["plug"]["intervals"]["accuracy"]
    assert low <= rows["plug"]["metrics"]["accuracy"] <= high
    # users 0..4 hit 1, 1, (1 + s)/3, 1, 1 of their own
    assert rows["plug"]["per_user"]["accuracy"] == pytest.approx((1 + 1 + (1 / 3 + 2 / 3) / 2 + 1 + 1) / 5)


def test_notes_name_the_rows_whose_trainings_are_few() -> None:
    def notes(*cells: Trial) -> list[str]:
        return [str(note) for note in build_results(SCORED, cells, settings=SETTINGS)["notes"]]

    control = [Trial("instruction-only", s, _hits(*[0, 1] * 4), invalid_rate=0.0) for s in (0, 1, 2)]
    drawn = "Of rows with several training seeds, the bootstrap draws the trainings too."
    assert notes(PLAIN) == []
    assert notes(PLAIN, *control) == [drawn]
    assert notes(PLAIN, PLUG[0], control[0]) == ["One training seed: what trainings differ by is not covered."]
    assert notes(PLAIN, *control, *WRONG, PLUG[0]) == [
        drawn,
        "Two training seeds, which are few: wrong-user.",
        "One training seed, whose chance is not covered: plug.",
    ]


def test_a_gain_of_one_of_two_trainings_is_no_sure_one() -> None:
    even = [Trial("wrong-user", s, _hits(*[0, 1] * 4), invalid_rate=0.0) for s in (0, 1)]
    lucky = [Trial("plug", s, _hits(*[s, 1] * 4), invalid_rate=0.0) for s in (0, 1)]
    results = build_results(SCORED, [*even, *lucky], settings=SETTINGS)
    (pair,) = results["pairs"]
    assert pair["difference"] == 0.25
    assert pair["low"] == 0  # every user gains, but not by every training
    assert pair["p"] > 0.3


def test_pairs_carry_holms_correction_within_their_family_and_mcnemar_per_seed() -> None:
    results = build_results(SCORED, [PLAIN, *WRONG, *PLUG], settings=SETTINGS)
    pairs = {(pair["a"], pair["b"]): pair for pair in results["pairs"]}
    assert set(pairs) == {("wrong-user", "plain"), ("plug", "plain"), ("plug", "wrong-user")}
    # one method, so one claim a family; a control against a base is no claim
    assert all(pair["p_holm"] == pair["p"] for pair in pairs.values())
    two = [PLAIN, *WRONG, *PLUG, replace(PLUG[0], condition="bm25:4"), replace(PLUG[1], condition="random:4")]
    corrected = build_results(SCORED, two, settings=SETTINGS)["pairs"]
    against_plain = [pair for pair in corrected if pair["b"] == "plain" and pair["a"] != "wrong-user"]
    assert len(against_plain) == 3
    assert [pair["p_holm"] for pair in against_plain] == holm([pair["p"] for pair in against_plain])
    # seed 0: the plug alone is right on 3 samples, a stranger's history on none; exact p = 2 / 2³
    assert pairs["plug", "wrong-user"]["mcnemar_p"][0] == pytest.approx(0.25)
    assert len(pairs["plug", "plain"]["mcnemar_p"]) == 2
    assert pairs["plug", "plain"]["difference"] == pytest.approx((6 / 8 + 7 / 8) / 2 - 2 / 8)


def test_a_personal_gain_is_the_methods_whatever_the_order_of_rows() -> None:
    for names in (["plain", "plug", "wrong-user"], ["wrong-user", "plain", "plug"]):
        pairs = compared_pairs(names)
        assert ("plug", "wrong-user") in pairs
        assert ("wrong-user", "plug") not in pairs
        assert len(pairs) == 3


def test_rows_are_compared_on_the_seeds_that_both_have() -> None:
    half = build_results(SCORED, [PLAIN, WRONG[0], *PLUG], settings=SETTINGS)
    pairs = {(pair["a"], pair["b"]): pair for pair in half["pairs"]}
    assert pairs["plug", "wrong-user"]["difference"] == pytest.approx(3 / 8)
    assert len(pairs["plug", "wrong-user"]["mcnemar_p"]) == 1
    assert len(pairs["plug", "plain"]["mcnemar_p"]) == 2  # the plain model has no seeds and meets each
    assert [row["seeds"] for row in half["rows"]] == [[0], [0], [0, 1]]
    nothing = build_results(SCORED, [WRONG[0], PLUG[1]], settings=SETTINGS)
    assert nothing["pairs"] == []


def test_many_rows_are_compared_where_it_tells_something() -> None:
    names = [
        "plain",
        "instruction-only",
        "plug",
        "wrong-user",
        "shuffled",
        "bm25:4",
        "bm25:4@wrong-user",
        "lora",
        "lora-per-user",
    ]
    pairs = compared_pairs(names)
    assert pairs[:2] == [("plug", "wrong-user"), ("bm25:4", "bm25:4@wrong-user")]
    assert ("instruction-only", "plain") in pairs
    assert {("bm25:4", "plain"), ("bm25:4", "instruction-only"), ("plug", "bm25:4"), ("plug", "lora")} <= set(pairs)
    assert ("lora-per-user", "lora-per-user@wrong-user") not in pairs  # that row was not filled
    assert not any("@" in a or a in ("wrong-user", "shuffled") for a, _ in pairs)
    assert ("plug", "shuffled") in pairs
    assert len(pairs) == len(set(pairs))


def test_rows_with_phrases_are_compared_with_the_same_without() -> None:
    names = ["instruction-only", "plug", "wrong-user", "plug+bm25:4", "instruction+bm25:4"]
    pairs = compared_pairs([*names, "plug+bm25:4+phrases", "instruction+bm25:4+phrases"])
    assert ("plug+bm25:4+phrases", "plug+bm25:4") in pairs
    assert ("plug+bm25:4+phrases", "instruction+bm25:4+phrases") in pairs
    assert ("instruction+bm25:4+phrases", "instruction+bm25:4") in pairs
    assert len(pairs) == len(set(pairs))


def test_columns_that_not_all_cells_hold_are_left_out_and_named() -> None:
    settings = replace(SETTINGS, metrics=[ACCURACY, get_metric("accuracy@median", labels=("1", "2"))])

    def told(cell: Trial) -> Trial:
        hits = cell.statistics["accuracy"]
        return replace(cell, statistics={"accuracy": hits, "accuracy@median": 1 - hits})

    before = build_results(SCORED, [PLAIN, *PLUG], settings=SETTINGS)
    assert build_results(SCORED, [PLAIN, *PLUG], settings=settings) == before
    mixed = build_results(SCORED, [PLAIN, told(PLUG[0]), PLUG[1]], settings=settings)
    assert (mixed["rows"], mixed["pairs"]) == (before["rows"], before["pairs"])
    assert [note for note in mixed["notes"] if note not in before["notes"]] == [
        "accuracy@median: left out, since some rows were filled before there was such a column."
    ]
    whole = [told(cell) for cell in (PLAIN, *PLUG)]
    after = build_results(SCORED, whole, settings=settings)
    assert after["notes"] == before["notes"]
    for row in after["rows"]:
        for key in ("metrics", "intervals", "per_user"):
            assert list(row[key]) == ["accuracy", "accuracy@median"]
        assert row["metrics"]["accuracy@median"] == pytest.approx(1 - row["metrics"]["accuracy"])
    found = {pair["metric"]: pair for pair in after["pairs"]}
    assert found["accuracy@median"]["difference"] == pytest.approx(-found["accuracy"]["difference"])
    assert found["accuracy@median"]["mcnemar_p"] == found["accuracy"]["mcnemar_p"]
    sliced = with_subgroups(
        after, SCORED, [*whole[:2], PLUG[1]], slices=history_thirds(SCORED.history_items), settings=settings
    )
    assert all(list(row["metrics"]) == ["accuracy"] for part in sliced["slices"] for row in part["rows"])


def test_rows_without_a_language_model_are_compared_with_and_make_no_claims() -> None:
    names = ["plain", "plug", "wrong-user", "bm25:4", "classical", "classical@wrong-user", "classical:text", "copy"]
    pairs = compared_pairs(names)
    assert ("classical", "classical@wrong-user") in pairs
    assert {("plug", "classical"), ("plug", "copy"), ("classical", "classical:text")} <= set(pairs)
    assert {("plug", "plain"), ("bm25:4", "plain")} <= set(pairs)
    assert not {("classical", "plain"), ("copy", "plain")} & set(pairs)
    rules = [replace(PLUG[0], condition=name) for name in ("classical", "classical@wrong-user", "user-median")]
    found = build_results(SCORED, [PLAIN, *WRONG, *PLUG, *rules], settings=SETTINGS)["pairs"]
    by_rows = {(pair["a"], pair["b"]): pair for pair in found}
    for pair in (by_rows["plug", "wrong-user"], by_rows["plug", "plain"], by_rows["classical", "classical@wrong-user"]):
        assert pair["p_holm"] == pair["p"]


def test_slices_are_the_same_rows_on_parts_of_the_samples() -> None:
    cells = [PLAIN, *PLUG]
    whole = build_results(SCORED, cells, settings=SETTINGS)
    sliced = with_subgroups(whole, SCORED, cells, slices=history_thirds(SCORED.history_items), settings=SETTINGS)
    assert [(part["name"], part["samples"]) for part in sliced["slices"]] == [
        ("short (1–3 items)", 5),
        ("medium (5–5 items)", 1),
        ("long (9–9 items)", 2),
    ]
    plug = [part["rows"][1]["metrics"]["accuracy"] for part in sliced["slices"]]
    assert plug == pytest.approx([(3.5) / 5, 1.0, 1.0])
    assert sum(part["samples"] for part in sliced["slices"]) == len(GROUPS)


def test_histories_of_one_length_are_one_slice() -> None:
    assert [(name, len(places)) for name, places in history_thirds([4, 4, 4])] == [("short (4–4 items)", 3)]
