"""Pooled personal gains: known means, each set counts alike, and no pooling of sets that do not belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from result_objects import method_of

from personaplug.analysis.metrics import get_metric
from personaplug.analysis.pooled import pooled_gains
from personaplug.analysis.report import write_report
from personaplug.analysis.results import Settings, build_results
from personaplug.analysis.results_file import load_results, write_results
from personaplug.analysis.significance import PairedStatistics, paired_bootstrap, pooled_bootstrap
from personaplug.analysis.trials import EvalSamples, Provenance, Trial, TrialFile

ROUGE, NLL = get_metric("rouge_1"), get_metric("nll")


def _trials(name: str, rng: np.random.Generator, *, users: int, shift: float, seeds: int = 2) -> list[Trial]:
    trials = []
    for seed in range(seeds):
        rouge = rng.normal(0.3 + shift, 0.02, size=(users * 2, 1))
        tokens = rng.integers(5, 9, size=users * 2).astype(float)
        nll = np.stack([tokens * (3 - shift) + rng.normal(0, 1e-3, size=users * 2), tokens], axis=1)
        trials.append(Trial(method_of(name), seed, {"rouge_1": rouge, "nll": nll}, invalid_rate=0.0))
    return trials


def _write(
    folder: Path, name: str, *, users: int, shift: float, change: Callable[[list[Trial]], list[Trial]] = list
) -> Path:
    """Write the results and the trials of a set in which the plug's personal gain is `shift`."""
    rng = np.random.default_rng(len(name))
    trials = _trials("wrong-user", rng, users=users, shift=0.0) + _trials("plug", rng, users=users, shift=shift)
    groups = [user for user in range(users) for _ in range(2)]
    samples = EvalSamples(groups, history_items=[3] * len(groups), about=Provenance(task=name, set=name, users=users))
    results = build_results(samples, trials, settings=Settings([ROUGE, NLL], resamples=200, seed=0))
    path = folder / f"{name}.json"
    write_results(path, results)
    file = TrialFile(folder / f"{name}.trials.jsonl")
    file.start(samples)
    for trial in change(trials):
        file.append(trial)
    return path


def test_pooled_gain_is_the_mean_of_the_sets_gains(tmp_path: Path) -> None:
    paths = [_write(tmp_path, "One", users=10, shift=0.02), _write(tmp_path, "Other", users=60, shift=0.04)]
    results_list = [load_results(path) for path in paths]
    pooled = pooled_gains(paths, results_list, resamples=500)
    assert pooled is not None
    assert (pooled.sets, pooled.problem) == (["One", "Other"], "")
    for name in ("rouge_1", "nll"):
        gain = pooled.gains[name]["plug"]
        single = [results.personal_gains(name)["plug"].difference for results in results_list]
        assert gain.difference == pytest.approx(np.mean(single))
        assert gain.low is not None
        assert gain.high is not None
        assert gain.low <= gain.difference <= gain.high
        assert gain.p is not None
        assert gain.p < 0.05
        assert gain.p_holm == gain.p
    assert pooled.gains["nll"]["plug"].difference == pytest.approx(0.03, abs=1e-3)


def test_one_set_pools_to_its_own_interval_and_noise_shrinks_with_sets() -> None:
    rng = np.random.default_rng(0)
    groups = list(range(50))
    one = PairedStatistics(rng.normal(0.1, 1, size=(50, 1)), rng.normal(0, 1, size=(50, 1)), groups)
    single = paired_bootstrap(*one, ROUGE, resamples=4000)
    assert pooled_bootstrap([one], ROUGE, resamples=4000) == single
    four = pooled_bootstrap([one] * 4, ROUGE, resamples=4000)
    assert four.difference == pytest.approx(single.difference)
    # Independent draws of four sets halve the interval; equal draws would not.
    assert (four.high - four.low) / (single.high - single.low) == pytest.approx(0.5, abs=0.05)


def test_set_without_a_spread_leaves_no_interval() -> None:
    one = PairedStatistics(np.ones((3, 1)), np.zeros((3, 1)), [0, 0, 0])
    other = PairedStatistics(np.ones((3, 1)), np.zeros((3, 1)), [0, 1, 2])
    pooled = pooled_bootstrap([one, other], ROUGE, resamples=100)
    assert pooled.difference == 1
    assert np.isnan([pooled.low, pooled.high, pooled.p]).all()


def test_rows_and_metrics_that_a_set_lacks_are_not_pooled(tmp_path: Path) -> None:
    one = _write(tmp_path, "One", users=10, shift=0.02)
    results = load_results(one)
    rows = [replace(row, metrics={"rouge_1": row.metrics["rouge_1"]}) for row in results.rows]
    pairs = [pair for pair in results.pairs if pair.metric == "rouge_1"]
    write_results(tmp_path / "One.json", replace(results, rows=rows, pairs=pairs))
    other = _write(tmp_path, "Other", users=10, shift=0.02)
    pooled = pooled_gains([one, other], [load_results(one), load_results(other)], resamples=100)
    assert pooled is not None
    assert list(pooled.gains) == ["rouge_1"]


def test_report_shows_pooled_gains(tmp_path: Path) -> None:
    paths = [_write(tmp_path, name, users=10, shift=0.02) for name in ("One", "Other")]
    text = write_report(paths, tmp_path / "out", with_figures=False)[0].read_text(encoding="utf-8")
    section = text.split("### Pooled personal gains\n")[1].split("\n#")[0]
    assert "One, Other" in section
    titles, _, line = [line.split() for line in section.splitlines() if line.startswith("|")]
    assert titles == ["|", "method", "|", "rouge_1", "↑", "|", "nll", "↓", "|"]
    assert line[:3] == ["|", "plug", "|"]
    assert line[3].startswith("+0.0")
    single = write_report(paths[:1], tmp_path / "single", with_figures=False)[0].read_text(encoding="utf-8")
    assert "Pooled" not in single


def test_missing_foreign_or_repeated_trials_are_not_pooled(tmp_path: Path) -> None:
    one = _write(tmp_path, "One", users=10, shift=0.02)
    other = _write(tmp_path, "Other", users=10, shift=0.02)
    assert _problem([one, one]) == "One is among the results more than once. Report each set once."
    (tmp_path / "Other.trials.jsonl").unlink()
    assert "Other.trials.jsonl with the scores of the samples is missing" in _problem([one, other])
    (tmp_path / "Other.trials.jsonl").write_bytes((tmp_path / "One.trials.jsonl").read_bytes())
    assert "does not belong to its results" in _problem([one, other])
    text = write_report([one, other], tmp_path / "out", with_figures=False)[0].read_text(encoding="utf-8")
    assert "Not pooled: " in text


def test_trial_that_is_missing_for_a_seed_is_not_pooled(tmp_path: Path) -> None:
    one = _write(tmp_path, "One", users=10, shift=0.02)
    other = _write(tmp_path, "Other", users=10, shift=0.02, change=lambda trials: trials[:-1])
    assert "does not belong to its results" in _problem([one, other])


def _problem(paths: list[Path]) -> str:
    pooled = pooled_gains(paths, [load_results(path) for path in paths], resamples=100)
    assert pooled is not None
    assert pooled.gains == {}
    return pooled.problem
