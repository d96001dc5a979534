"""Simulated users: the oracle's scores match their expectation, nothing beats it, and a seed determines everything."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaplug.data import open_dataset
from personaplug.data.simulated_users import Rater
from personaplug.data.simulation import Simulation, SimulationConfig, simulate, write_simulation
from personaplug.errors import ConfigError, RunConflict, StorageError

MANY = SimulationConfig(users=600, queries_per_user=4, min_items=0, max_items=4)
SMALL = SimulationConfig(users=12, dev_users=5, min_items=2, max_items=6)
STYLE = SimulationConfig(task="style", users=300, queries_per_user=4, min_items=1, max_items=8)


@pytest.fixture(scope="module")
def ratings() -> Simulation:
    return simulate(MANY, "train")


@pytest.fixture(scope="module")
def styles() -> Simulation:
    return simulate(STYLE, "train")


def targets(simulation: Simulation) -> dict[str, str]:
    return {sample.id: str(sample.target) for sample in simulation.samples}


def accuracy(predictions: dict[str, str], gold: dict[str, str]) -> float:
    return sum(predictions[name] == gold[name] for name in gold) / len(gold)


def mae(predictions: dict[str, str], gold: dict[str, str]) -> float:
    return sum(abs(int(predictions[name]) - int(gold[name])) for name in gold) / len(gold)


def test_default_settings_leave_room_for_a_personal_gain() -> None:
    train, dev = simulate(SimulationConfig(), "train"), simulate(SimulationConfig(), "dev")
    assert (len(train.samples), len(dev.samples)) == (1600, 200)
    lengths = {len(sample.history) for sample in train.samples}
    assert (min(lengths), max(lengths)) == (8, 30)
    shares = Counter(targets(train).values())
    assert set(shares) == {"1", "2", "3", "4", "5"}
    assert max(shares.values()) < 0.4 * 1600
    # If a constant answer were as good as the oracle, the set could not show a personal gain.
    assert dev.expected["mode"]["accuracy"] > max(shares.values()) / 1600 + 0.2


def test_rater_probabilities_match_drawn_scores() -> None:
    rng = np.random.default_rng(5)
    for generosity, noise in ((0.0, 0.5), (1.7, 0.3), (-2.4, 1.2)):
        rater = Rater(generosity, (0.4, -0.6), noise)
        for genre in (0, 1):
            drawn = Counter(rater.score(genre, rng) for _ in range(20_000))
            chances = rater.probabilities(genre)
            assert sum(chances) == pytest.approx(1)
            assert [drawn[score] / 20_000 for score in range(1, 6)] == pytest.approx(chances, abs=0.015)


def test_oracle_score_matches_its_expectation(ratings: Simulation) -> None:
    gold = targets(ratings)
    for estimate, expected in ratings.expected.items():
        predictions = dict(ratings.oracle[estimate])
        # Three standard errors of a mean over 2,400 targets.
        assert accuracy(predictions, gold) == pytest.approx(expected["accuracy"], abs=0.03)
        assert mae(predictions, gold) == pytest.approx(expected["mae"], abs=0.03)


def test_expected_scores_match_redrawn_targets(ratings: Simulation) -> None:
    rng = np.random.default_rng(1)
    chances = np.array(list(ratings.probabilities.values()))
    for estimate, expected in ratings.expected.items():
        guesses = np.array([int(ratings.oracle[estimate][name]) for name in ratings.probabilities])
        scores = 1 + (rng.random((200, len(chances), 1)) > chances.cumsum(axis=1)).sum(axis=2)
        assert (scores == guesses).mean() == pytest.approx(expected["accuracy"], abs=0.004)
        assert abs(scores - guesses).mean() == pytest.approx(expected["mae"], abs=0.004)


def test_oracle_decision_is_best_for_its_metric(ratings: Simulation) -> None:
    for name, chances in ratings.probabilities.items():
        errors = [sum(c * abs(s - guess) for s, c in enumerate(chances, 1)) for guess in range(1, 6)]
        assert chances[int(ratings.oracle["mode"][name]) - 1] == max(chances)
        assert errors[int(ratings.oracle["median"][name]) - 1] == pytest.approx(min(errors))


def test_constant_predictions_do_not_beat_the_oracle(ratings: Simulation) -> None:
    gold = targets(ratings)
    constants = [dict.fromkeys(gold, str(score)) for score in range(1, 6)]
    assert accuracy(dict(ratings.oracle["mode"]), gold) > max(accuracy(guess, gold) for guess in constants) + 0.2
    assert mae(dict(ratings.oracle["median"]), gold) < min(mae(guess, gold) for guess in constants) - 0.3


def test_history_mean_predicts_its_own_user_best() -> None:
    # If another user's mean were as near to the target, the set could not show a personal gain.
    samples = simulate(SimulationConfig(users=200), "train").samples
    means = {sample.owner: np.mean([int(str(item.answer)) for item in sample.history]) for sample in samples}
    owners = list(means)
    stranger = dict(zip(owners, owners[1:] + owners[:1], strict=True))
    own = np.mean([abs(means[sample.owner] - int(str(sample.target))) for sample in samples])
    other = np.mean([abs(means[stranger[sample.owner]] - int(str(sample.target))) for sample in samples])
    assert own < other - 0.2


@pytest.mark.parametrize("task", ["rating", "style"])
def test_splits_share_no_user_and_histories_hold_no_query(task: Any) -> None:
    config = SimulationConfig(task=task, users=60, dev_users=30)
    train, dev = simulate(config, "train").samples, simulate(config, "dev").samples
    assert {sample.user_id for sample in train}.isdisjoint(sample.user_id for sample in dev)
    queries_by_user: dict[str, list[str]] = {}
    for sample in train + dev:
        texts = [item.fields[0][1] for item in sample.history]
        assert {sample.query, sample.target}.isdisjoint(texts)
        assert len(set(texts)) == len(texts)
        queries_by_user.setdefault(sample.owner, []).append(sample.query)
    assert all(len(set(queries)) == len(queries) for queries in queries_by_user.values())


@pytest.mark.parametrize("task", ["rating", "style"])
def test_seed_determines_everything(task: Any) -> None:
    config = SimulationConfig(task=task, users=6, seed=3)
    first, again = simulate(config, "train"), simulate(config, "train")
    assert (first.samples, first.oracle, first.expected) == (again.samples, again.oracle, again.expected)
    more = simulate(SimulationConfig(task=task, users=9, seed=3), "train")
    assert more.samples[: len(first.samples)] == first.samples
    assert simulate(SimulationConfig(task=task, users=6, seed=4), "train").samples != first.samples


def test_min_items_zero_gives_cold_users() -> None:
    lengths = {sample.owner: len(sample.history) for sample in simulate(MANY, "train").samples}
    cold = sum(length <= 2 for length in lengths.values()) / len(lengths)
    assert 0.02 < cold < 0.09
    assert set(lengths.values()) == {0, 1, 2, 3, 4}
    none = simulate(SimulationConfig(users=20, min_items=0, max_items=0), "train")
    assert {len(sample.history) for sample in none.samples} == {0}


def test_style_targets_are_rewritings_and_oracle_is_imperfect(styles: Simulation) -> None:
    gold, predictions = targets(styles), dict(styles.oracle["mode"])
    expected = styles.expected["mode"]
    assert accuracy(predictions, gold) == pytest.approx(expected["exact"], abs=0.03)
    assert 0.8 < expected["exact"] < 0.95
    assert any(text.isupper() for text in gold.values())
    assert any(text.islower() for text in gold.values())
    copies = sum(str(sample.target) == sample.query.rstrip(".") for sample in styles.samples)
    assert copies < 0.1 * len(gold)


def test_expected_rouge_matches_word_counts(styles: Simulation) -> None:
    def words(text: str) -> Counter[str]:
        return Counter(re.findall(r"[a-z0-9]+", text.lower()))

    scores = []
    for name, true in targets(styles).items():
        a, b = words(styles.oracle["mode"][name]), words(true)
        scores.append(2 * (a & b).total() / (a.total() + b.total()))
    assert np.mean(scores) == pytest.approx(styles.expected["mode"]["rouge_1"], abs=0.005)


@pytest.mark.parametrize("task", ["rating", "style"])
def test_written_simulation_reads_back_equal(tmp_path: Path, task: Any) -> None:
    config = SimulationConfig(task=task, users=12, dev_users=5, min_items=0, max_items=6)
    write_simulation(config, tmp_path)
    for split in ("train", "dev"):
        simulation = simulate(config, split)
        reader = open_dataset(tmp_path, split)
        assert tuple(reader) == simulation.samples
        assert reader.task == simulation.task
        oracle = json.loads((tmp_path / f"{split}_oracle.json").read_text())
        assert {gold["id"]: gold["output"] for gold in oracle["golds"]} == simulation.oracle["mode"]
        assert json.loads((tmp_path / "oracle.json").read_text())[split] == simulation.expected
    assert (tmp_path / "dev_oracle_median.json").exists() == (task == "rating")


def test_folder_of_another_task_is_not_overwritten(tmp_path: Path) -> None:
    write_simulation(SMALL, tmp_path)
    with pytest.raises(RunConflict):
        write_simulation(SimulationConfig(task="style", users=2, dev_users=2), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_simulation(SMALL, tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [{"task": "essay"}, {"users": 0}, {"queries_per_user": 0}, {"dev_users": 0}, {"dev_queries_per_user": 0},
     {"min_items": -1}, {"min_items": 31}, {"max_items": 500}, {"cold_share": 1.5}, {"taste_sd": -1},
     {"generosity_sd": float("nan")}, {"noise_sd": 0}, {"habit_chance": 0.4}, {"seed": -1}],
)  # fmt: skip
def test_setting_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(change))} should be"):
        SimulationConfig(**change)


def test_simulate_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="'test'"):
        simulate(SMALL, "test")
