"""Scores of single users equal scores computed user by user; users who gain or lose most; what gives no scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from result_objects import method_of

from personaplug.analysis.metrics import get_metric
from personaplug.analysis.results import Settings, build_results
from personaplug.analysis.results_file import load_results, write_results
from personaplug.analysis.trials import EvalSamples, Provenance, Trial, TrialFile
from personaplug.analysis.trials_of_results import UnmatchedTrials, load_result_trials
from personaplug.analysis.user_scores import UserScores, user_scores

LABELS = ("1", "2", "3", "4", "5")
GROUPS = [0, 0, 1, 2, 2, 2, 3]
GOLDS = ["1", "2", "3", "4", "5", "1", "2"]
OWN = (["1", "2", "3", "5", "5", "2", "2"], ["1", "3", "3", "4", "5", "2", "5"])  # for each of two seeds
STRANGER = (["5", "2", "3", "1", "5", "4", "2"], ["4", "2", "3", "2", "1", "1", "3"])


def _write(folder: Path, metrics: Sequence[str], *, rows: Sequence[str] = ("plug", "wrong-user")) -> Path:
    """Write a results file and its trials; the first row has the answers OWN, the second STRANGER."""
    kinds = [get_metric(name, labels=LABELS) for name in metrics]
    trials = []
    for name, answers in zip(rows, (OWN, STRANGER), strict=True):
        for seed, predictions in enumerate(answers):
            statistics = {kind.name: kind.statistics(predictions, GOLDS) for kind in kinds}
            trials.append(Trial(method_of(name), seed, statistics, invalid_rate=0.0))
    samples = EvalSamples(GROUPS, history_items=[2, 4, 1, 6, 6, 9, 0], about=Provenance(task="T"))
    write_results(folder / "T.json", build_results(samples, trials, settings=Settings(kinds, resamples=20, seed=0)))
    file = TrialFile(folder / "T.trials.jsonl")
    file.start(samples)
    for trial in trials:
        file.append(trial)
    return folder / "T.json"


def _scores(path: Path) -> UserScores | None:
    return user_scores(load_result_trials(path, load_results(path)))


def test_scores_are_those_of_each_user_alone(tmp_path: Path) -> None:
    scores = _scores(_write(tmp_path, ["mae", "rmse", "accuracy", "f1"]))
    assert scores is not None
    assert (scores.method, scores.control, scores.metric) == ("plug", "wrong-user", "mae")
    assert list(scores.scores) == ["mae", "rmse", "accuracy"]  # a macro-F1 of few samples has no meaning
    for user in range(4):
        mine = [index for index, owner in enumerate(GROUPS) if owner == user]
        for side, answers in enumerate((OWN, STRANGER)):
            errors = np.array([[float(each[i]) - float(GOLDS[i]) for i in mine] for each in answers])
            assert scores.scores["mae"][user, side] == pytest.approx(np.abs(errors).mean())
            assert scores.scores["rmse"][user, side] == pytest.approx(np.sqrt((errors**2).mean()))
            assert scores.scores["accuracy"][user, side] == pytest.approx((errors == 0).mean())
    assert list(scores.samples) == [2, 1, 3, 1]
    assert list(scores.history_items) == [3, 1, 7, 0]


def test_a_lower_error_is_a_gain_and_a_higher_accuracy_too(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    errors, hits = _scores(_write(tmp_path, ["mae"])), _scores(_write(tmp_path / "other", ["accuracy"]))
    assert errors is not None
    assert hits is not None
    own, stranger = errors.scores["mae"].T
    assert list(errors.gains) == pytest.approx(list(stranger - own))
    own, stranger = hits.scores["accuracy"].T
    assert list(hits.gains) == pytest.approx(list(own - stranger))
    assert errors.counts == (2, 1, 1)
    assert errors.extremes(5) == [2, 0, 3]
    assert errors.extremes(1) == [2, 3]


def test_results_without_a_row_its_control_or_a_metric_for_users_have_no_scores(tmp_path: Path) -> None:
    for number, (metric, rows) in enumerate(
        [("f1", ("plug", "wrong-user")), ("mae", ("plug", "instruction-only")), ("mae", ("plain", "user-mean"))]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert _scores(_write(folder, [metric], rows=rows)) is None


def test_missing_trials_and_trials_of_other_results_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, ["mae"])
    file = path.with_name("T.trials.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(UnmatchedTrials, match="does not belong to its results"):
        _scores(path)
    file.unlink()
    with pytest.raises(UnmatchedTrials, match="is missing"):
        _scores(path)


def test_trials_are_checked_in_metrics_that_need_labels(tmp_path: Path) -> None:
    path = _write(tmp_path, ["accuracy"])
    results = load_results(path)
    results.rows[0].metrics["accuracy"] += 0.01
    with pytest.raises(UnmatchedTrials, match="does not belong"):
        user_scores(load_result_trials(path, results))
