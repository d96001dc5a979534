"""Trial files: they survive a round trip and a truncated line, and are strict JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.trials import Diagnostics, EvalSamples, Provenance, Trial, TrialFile, number_users
from personaplug.errors import RecordError

ABOUT = Provenance(task="T", notes=["a"])
SAMPLES = EvalSamples(groups=[0, 0, 1], history_items=[3, 4, 5], about=ABOUT, key="first")


def _trial(name: str = "plug", seed: int = 0, **changes: object) -> Trial:
    one_hots = np.zeros((3, 6))
    one_hots[[0, 1, 2], [5, 0, 3]] = 1
    stats = {"mae": np.array([[0.0], [1.5], [np.inf]]), "rouge_1": np.array([[1 / 3], [0.1], [0.0]]), "f1": one_hots}
    method = MethodInfo(name, family="plug", history="own", parents=("plain",), is_seeded=True)
    trial = Trial(method, seed, stats, invalid_rate=0.25, diagnostics=Diagnostics(seconds=1.5), key="k")
    return replace(trial, **changes)  # type: ignore[arg-type]


def test_trial_survives_the_file(tmp_path: Path) -> None:
    file = TrialFile(tmp_path / "deep" / "set.trials.jsonl")
    assert file.load() == (None, [])
    file.start(SAMPLES)
    file.append(_trial())
    file.append(_trial("plain", diagnostics=Diagnostics(bytes_per_user=0.0)))
    samples, trials = file.load()
    assert samples == SAMPLES
    assert [trial.method.name for trial in trials] == ["plug", "plain"]
    assert trials[0].method == _trial().method
    for name, stats in _trial().statistics.items():
        np.testing.assert_allclose(trials[0].statistics[name], stats, rtol=1e-8)
    assert (trials[0].key, trials[0].diagnostics) == ("k", Diagnostics(seconds=1.5))
    assert trials[1].diagnostics == Diagnostics(bytes_per_user=0.0)


def test_file_of_other_samples_is_renamed_and_restored(tmp_path: Path) -> None:
    path = tmp_path / "set.trials.jsonl"
    file = TrialFile(path)
    file.switch_to("first")
    assert not path.exists()
    file.start(SAMPLES)
    file.append(_trial())
    first = path.read_bytes()
    file.switch_to("first")
    assert path.read_bytes() == first
    file.switch_to("second")
    assert file.load() == (None, [])
    assert (tmp_path / "set.trials.first.jsonl").read_bytes() == first
    file.start(replace(SAMPLES, key="second"))
    file.switch_to("first")
    assert path.read_bytes() == first
    assert (tmp_path / "set.trials.second.jsonl").exists()


def test_diagnostics_average_known_values_and_take_the_maximum_memory() -> None:
    several = [Diagnostics(seconds=1.0, peak_memory_bytes=3), Diagnostics(seconds=2.0, peak_memory_bytes=5)]
    mean = Diagnostics.mean_of([*several, Diagnostics(truncated_rate=0.5)])
    assert mean == Diagnostics(seconds=1.5, peak_memory_bytes=5, truncated_rate=0.5)
    assert Diagnostics.mean_of([]) == Diagnostics()


def test_latest_trial_of_a_method_and_seed_counts(tmp_path: Path) -> None:
    file = TrialFile(tmp_path / "set.trials.jsonl")
    file.start(SAMPLES)
    for rate in (0.1, 0.2):
        file.append(_trial(invalid_rate=rate))
    file.append(_trial(seed=1, invalid_rate=0.3))
    assert [(trial.seed, trial.invalid_rate) for trial in file.load()[1]] == [(0, 0.2), (1, 0.3)]


def test_truncated_line_loses_only_its_trial(tmp_path: Path) -> None:
    path = tmp_path / "set.trials.jsonl"
    file = TrialFile(path)
    file.start(SAMPLES)
    file.append(_trial())
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole) - 1, 37):
        path.write_bytes(whole[:cut])
        assert file.load()[1] == []
        file.append(_trial("plain"))
        assert [trial.method.name for trial in file.load()[1]] == ["plain"]


def test_file_without_trials_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.trials.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(RecordError, match="line 1"):
        TrialFile(path).load()
    TrialFile(path).lines.path.unlink()
    TrialFile(path).start(SAMPLES)
    TrialFile(path).lines.append({"method": "plug", "seed": 0})
    with pytest.raises(RecordError, match="line 2: expected a trial"):
        TrialFile(path).load()


def test_number_users_counts_in_order_of_appearance() -> None:
    assert number_users(["x", "y", "x", "z"]) == [0, 1, 0, 2]


def test_trial_file_is_json_lines_without_infinities(tmp_path: Path) -> None:
    file = TrialFile(tmp_path / "set.trials.jsonl")
    file.start(SAMPLES)
    file.append(_trial())

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in (tmp_path / "set.trials.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
