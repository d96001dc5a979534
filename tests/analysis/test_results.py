"""Build results from trials: rows and comparisons, on all samples and on subgroups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from result_objects import method_of

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.metrics import Array, get_metric
from personaplug.analysis.results import Settings, build_results, compared_pairs, history_thirds
from personaplug.analysis.results_file import Comparison, Results
from personaplug.analysis.significance import holm
from personaplug.analysis.trials import Diagnostics, EvalSamples, Provenance, Trial

ACCURACY = get_metric("accuracy", labels=("1", "2"))
SETTINGS = Settings([ACCURACY], resamples=200, seed=0)
GROUPS = [0, 0, 1, 2, 2, 2, 3, 4]
ABOUT = Provenance(task="T", split="dev")
SAMPLES = EvalSamples(GROUPS, history_items=[1, 1, 5, 3, 3, 3, 9, 9], about=ABOUT)


def _hits(*values: int) -> dict[str, Array]:
    return {"accuracy": np.array(values, dtype=np.float64)[:, None]}


def trial(name: str, seed: int, hits: dict[str, Array], *, invalid_rate: float = 0.0, **more: float) -> Trial:
    return Trial(method_of(name), seed, hits, invalid_rate, diagnostics=Diagnostics(**more))  # type: ignore[arg-type]


PLAIN = trial("plain", 0, _hits(0, 0, 0, 1, 0, 0, 1, 0), invalid_rate=0.5, extra_prompt_tokens=0.0)
WRONG_USER = [trial("wrong-user", s, _hits(1, 0, 0, 1, 0, s, 1, 0)) for s in (0, 1)]
PLUG = [trial("plug", s, _hits(1, 1, 1, 1, s, 0, 1, 1), seconds=1.0 + s, bytes_per_user=10.0 * s) for s in (0, 1)]


def pairs_of(results: Results) -> dict[tuple[str, str], Comparison]:
    return {(pair.a, pair.b): pair for pair in results.pairs}


def compared_names(names: Sequence[str]) -> list[tuple[str, str]]:
    return compared_pairs([method_of(name) for name in names])


def test_rows_average_over_seeds_and_keep_their_spread() -> None:
    results = build_results(SAMPLES, [PLAIN, *WRONG_USER, *PLUG], settings=SETTINGS)
    rows = results.by_name
    assert list(rows) == ["plain", "wrong-user", "plug"]
    assert results.about.task == "T"
    assert results.about.seeds == [0, 1]
    assert "Only two training seeds: wrong-user, plug." in results.about.notes
    assert rows["plug"].metrics["accuracy"] == pytest.approx((6 / 8 + 7 / 8) / 2)
    assert [one["accuracy"] for one in rows["plug"].per_seed] == [6 / 8, 7 / 8]
    assert rows["plug"].seed_spread["accuracy"] == pytest.approx(np.std([6 / 8, 7 / 8], ddof=1))
    assert rows["plug"].diagnostics == Diagnostics(seconds=1.5, bytes_per_user=5.0)
    assert rows["plain"].per_seed == []
    low, high = rows["plug"].intervals["accuracy"]
    assert low <= rows["plug"].metrics["accuracy"] <= high
    # the accuracies of users 0..4 are 1, 1, (1 + s)/3, 1, 1
    assert rows["plug"].per_user["accuracy"] == pytest.approx((1 + 1 + (1 / 3 + 2 / 3) / 2 + 1 + 1) / 5)


def test_seed_spread_divides_by_n_minus_1_and_is_nan_for_infinite_scores() -> None:
    mae = get_metric("mae", labels=("1", "2"))

    def spread(*errors: float) -> float:
        trials = [trial("plug", seed, {"mae": np.full((8, 1), error)}) for seed, error in enumerate(errors)]
        rows = build_results(SAMPLES, trials, settings=replace(SETTINGS, metrics=[mae])).rows
        return rows[0].seed_spread["mae"]

    assert spread(1.0, 2.0, 6.0) == pytest.approx(np.sqrt((4 + 1 + 9) / 2))
    assert spread(0.5, 0.5) == 0
    assert np.isnan(spread(0.5, np.inf))


def test_notes_name_rows_with_few_trainings() -> None:
    def notes(*trials: Trial) -> list[str]:
        return build_results(SAMPLES, trials, settings=SETTINGS).about.notes

    control = [trial("instruction-only", s, _hits(*[0, 1] * 4)) for s in (0, 1, 2)]
    resampled = "For rows with several training seeds, the bootstrap also resamples the trainings."
    assert notes(PLAIN) == []
    assert notes(PLAIN, *control) == [resampled]
    assert notes(PLAIN, PLUG[0], control[0]) == [
        "One training seed: intervals do not include the variance between trainings."
    ]
    assert notes(PLAIN, *control, *WRONG_USER, PLUG[0]) == [
        resampled,
        "Only two training seeds: wrong-user.",
        "One training seed, so intervals do not include the variance between trainings: plug.",
    ]


def test_gain_of_only_one_of_two_trainings_is_not_significant() -> None:
    control_trials = [trial("wrong-user", s, _hits(*[0, 1] * 4)) for s in (0, 1)]
    plug_trials = [trial("plug", s, _hits(*[s, 1] * 4)) for s in (0, 1)]
    results = build_results(SAMPLES, [*control_trials, *plug_trials], settings=SETTINGS)
    (pair,) = results.pairs
    assert pair.difference == 0.25
    assert pair.low == 0  # every user gains, but not in every training
    assert pair.p is not None
    assert pair.p > 0.3


def test_pairs_have_a_holm_p_per_family_and_a_mcnemar_p_per_seed() -> None:
    results = build_results(SAMPLES, [PLAIN, *WRONG_USER, *PLUG], settings=SETTINGS)
    pairs = pairs_of(results)
    assert set(pairs) == {("wrong-user", "plain"), ("plug", "plain"), ("plug", "wrong-user")}
    # Each family has one claim, because there is one method, and a control makes no claim against a base.
    assert all(pair.p_holm == pair.p for pair in pairs.values())
    trials = [PLAIN, *WRONG_USER, *PLUG, replace(PLUG[0], method=method_of("bm25:4"))]
    trials.append(replace(PLUG[1], method=method_of("random:4")))
    corrected = build_results(SAMPLES, trials, settings=SETTINGS).pairs
    against_plain = [pair for pair in corrected if pair.b == "plain" and pair.a != "wrong-user"]
    assert len(against_plain) == 3
    assert [pair.p_holm for pair in against_plain] == holm([pair.p or 0 for pair in against_plain])
    # With seed 0, only the plug is right on 3 samples, and only the control on none: the exact p is 2 / 2³.
    assert pairs["plug", "wrong-user"].mcnemar_p[0] == pytest.approx(0.25)
    assert len(pairs["plug", "plain"].mcnemar_p) == 2
    assert pairs["plug", "plain"].difference == pytest.approx((6 / 8 + 7 / 8) / 2 - 2 / 8)


def test_personal_gain_does_not_depend_on_the_order_of_rows() -> None:
    for names in (["plain", "plug", "wrong-user"], ["wrong-user", "plain", "plug"]):
        pairs = compared_names(names)
        assert ("plug", "wrong-user") in pairs
        assert ("wrong-user", "plug") not in pairs
        assert len(pairs) == 3


def test_rows_are_compared_on_the_seeds_that_both_have() -> None:
    results = build_results(SAMPLES, [PLAIN, WRONG_USER[0], *PLUG], settings=SETTINGS)
    pairs = pairs_of(results)
    assert pairs["plug", "wrong-user"].difference == pytest.approx(3 / 8)
    assert len(pairs["plug", "wrong-user"].mcnemar_p) == 1
    assert len(pairs["plug", "plain"].mcnemar_p) == 2  # the plain model has no seeds and is paired with each trial
    assert [row.seeds for row in results.rows] == [[0], [0], [0, 1]]
    without_common_seed = build_results(SAMPLES, [WRONG_USER[0], PLUG[1]], settings=SETTINGS)
    assert without_common_seed.pairs == []


def test_many_rows_have_selected_comparisons() -> None:
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
    pairs = compared_names(names)
    assert pairs[:2] == [("plug", "wrong-user"), ("bm25:4", "bm25:4@wrong-user")]
    assert ("instruction-only", "plain") in pairs
    assert {("bm25:4", "plain"), ("bm25:4", "instruction-only"), ("plug", "bm25:4"), ("plug", "lora")} <= set(pairs)
    assert ("lora-per-user", "lora-per-user@wrong-user") not in pairs  # that row is missing
    assert not any("@" in a or a in ("wrong-user", "shuffled") for a, _ in pairs)
    assert ("plug", "shuffled") in pairs
    assert len(pairs) == len(set(pairs))


def test_rows_with_a_copy_head_are_compared_with_rows_without_one() -> None:
    names = ["plain", "instruction-only", "plug", "wrong-user", "plug+copy-head", "instruction+copy-head"]
    pairs = compared_names([*names, "plug+copy-head@wrong-user"])
    assert ("plug+copy-head", "plug") in pairs
    assert ("plug+copy-head", "instruction+copy-head") in pairs
    assert ("plug+copy-head", "plug+copy-head@wrong-user") in pairs
    assert ("instruction+copy-head", "instruction-only") in pairs
    assert len(pairs) == len(set(pairs))


def test_notes_name_the_rows_that_lack_a_metric() -> None:
    settings = replace(SETTINGS, metrics=[ACCURACY, get_metric("accuracy@median", labels=("1", "2"))])

    def with_median(trial: Trial) -> Trial:
        hits = trial.statistics["accuracy"]
        return replace(trial, statistics={"accuracy": hits, "accuracy@median": 1 - hits})

    without = build_results(SAMPLES, [PLAIN, *PLUG], settings=SETTINGS)
    assert build_results(SAMPLES, [PLAIN, *PLUG], settings=settings) == without
    mixed = build_results(SAMPLES, [with_median(PLAIN), with_median(PLUG[0]), PLUG[1]], settings=settings)
    assert [list(row.metrics) for row in mixed.rows] == [["accuracy", "accuracy@median"], ["accuracy"]]
    assert mixed.pairs == without.pairs
    assert [note for note in mixed.about.notes if note not in without.about.notes] == [
        "accuracy@median: missing for plug."
    ]
    with_medians = [with_median(trial) for trial in (PLAIN, *PLUG)]
    results = build_results(SAMPLES, with_medians, settings=settings)
    assert results.about.notes == without.about.notes
    for row in results.rows:
        for column in (row.metrics, row.intervals, row.per_user):
            assert list(column) == ["accuracy", "accuracy@median"]
        assert row.metrics["accuracy@median"] == pytest.approx(1 - row.metrics["accuracy"])
    by_metric = {pair.metric: pair for pair in results.pairs}
    assert by_metric["accuracy@median"].difference == pytest.approx(-by_metric["accuracy"].difference)
    assert by_metric["accuracy@median"].mcnemar_p == by_metric["accuracy"].mcnemar_p


def test_rows_without_a_language_model_need_no_likelihood() -> None:
    nll = {"nll": np.ones((8, 2))}
    settings = replace(SETTINGS, metrics=[ACCURACY, get_metric("nll")])
    trials = [replace(PLAIN, statistics=PLAIN.statistics | nll), trial("copy", 0, _hits(*[0, 1] * 4))]
    oracle = Trial(MethodInfo("best", family="oracle"), 0, _hits(*[1] * 8), 0.0)
    results = build_results(SAMPLES, [*trials, oracle], settings=settings)
    assert [list(row.metrics) for row in results.rows] == [["accuracy", "nll"], ["accuracy"], ["accuracy"]]
    assert results.about.notes == []
    missing = build_results(SAMPLES, [*trials, *PLUG], settings=settings)
    assert "nll: missing for plug." in missing.about.notes


def test_third_party_rows_are_compared_by_their_method_info() -> None:
    mine = MethodInfo("mine", family="plug", history="own", parents=("older",), is_seeded=True)
    control = replace(mine, name="strange mine", history="wrong-user", control_of="mine", parents=())
    rivals = [MethodInfo(name, family="prompt", history="own") for name in ("older", "b", "c")]
    base, counted = MethodInfo("nobody"), MethodInfo("counted", family="no-lm", history="own")
    pairs = compared_pairs([base, *rivals, mine, control, counted])
    assert pairs[0] == ("mine", "strange mine")
    assert {("b", "nobody"), ("mine", "nobody"), ("mine", "older")} <= set(pairs)
    assert [pair for pair in pairs[1:] if "counted" in pair or "strange mine" in pair] == [("mine", "counted")]


def test_rows_without_a_language_model_make_no_claims_against_bases() -> None:
    names = ["plain", "plug", "wrong-user", "bm25:4", "classical", "classical@wrong-user", "classical:text", "copy"]
    pairs = compared_names(names)
    assert ("classical", "classical@wrong-user") in pairs
    assert {("plug", "classical"), ("plug", "copy"), ("classical", "classical:text")} <= set(pairs)
    assert {("plug", "plain"), ("bm25:4", "plain")} <= set(pairs)
    assert not {("classical", "plain"), ("copy", "plain")} & set(pairs)
    rules = [replace(PLUG[0], method=method_of(name)) for name in ("classical", "classical@wrong-user", "user-median")]
    by_rows = pairs_of(build_results(SAMPLES, [PLAIN, *WRONG_USER, *PLUG, *rules], settings=SETTINGS))
    for pair in (by_rows["plug", "wrong-user"], by_rows["plug", "plain"], by_rows["classical", "classical@wrong-user"]):
        assert pair.p_holm == pair.p


def test_subgroups_have_the_same_rows_on_parts_of_the_samples() -> None:
    trials, thirds = [PLAIN, *PLUG], history_thirds(SAMPLES.history_items)
    subgroups = build_results(SAMPLES, trials, settings=SETTINGS, subgroups=thirds).subgroups
    assert [(subgroup.name, subgroup.samples) for subgroup in subgroups] == [
        ("short (1–3 items)", 5),
        ("medium (5–5 items)", 1),
        ("long (9–9 items)", 2),
    ]
    plug = [subgroup.by_name["plug"].metrics["accuracy"] for subgroup in subgroups]
    assert plug == pytest.approx([(3.5) / 5, 1.0, 1.0])
    assert sum(subgroup.samples or 0 for subgroup in subgroups) == len(GROUPS)


def test_histories_of_equal_length_are_one_subgroup() -> None:
    assert [(name, len(indices)) for name, indices in history_thirds([4, 4, 4])] == [("short (4–4 items)", 3)]
