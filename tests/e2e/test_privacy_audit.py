"""The attacks of `benchmarks/privacy.py` with toy models, and the tables of docs/privacy.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import privacy
import pytest
from click.testing import CliRunner
from privacy_audit import attacks, personas, subjects
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from personaplug.cli.main import main
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results" / "privacy").glob("*.json"))
TOY = ["llm=toy", "encoder=hash:32", "dtype=float32", "epochs=1", "controls=false"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    write_simulation(
        SimulationConfig(users=6, queries_per_user=2, dev_users=18, min_items=8, max_items=10), folder / "data"
    )
    words = ["train", "--data", str(folder / "data"), "--out", str(folder / "run"), *TOY]
    assert CliRunner().invoke(main, words).exit_code == 0
    return folder


def test_auc_and_ranks_match_their_definitions() -> None:
    random = np.random.default_rng(0)
    positive, negative = np.round(random.normal(0.5, 1, 40), 1), np.round(random.normal(0, 1, 60), 1)  # with ties
    expected = roc_auc_score([1] * 40 + [0] * 60, np.concatenate([positive, negative]))
    assert attacks.auc(positive, negative) == pytest.approx(expected)
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 5.0, 9.0]])
    assert attacks.ranks_of(scores, np.array([0, 1, 0])).tolist() == [1, 1.5, 3]


@pytest.mark.parametrize("rows", [20, 80])  # fewer and more rows than columns
def test_ridge_matches_scikit_learn(rows: int) -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(3, 2, (rows, 40)), random.normal(size=(rows, 3))
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    expected = Ridge(alpha=0.1 * rows).fit(standard, y).predict(standard)
    np.testing.assert_allclose(attacks.fit_ridge(x, y, 0.1)(x), expected, atol=1e-8)


def test_linking_uses_features_that_vary_little_within_a_user() -> None:
    random = np.random.default_rng(2)
    own = np.concatenate([random.normal(size=(60, 4)), np.zeros((60, 16))], axis=1)
    noise = np.concatenate([np.full(4, 0.1), np.full(16, 2.0)])
    first, second = (own + noise * random.normal(size=own.shape) for _ in range(2))
    link = attacks.best_linker(first[:40], second[:40], slice_=np.arange(40) % 3 == 0)
    people = np.arange(20)
    ranks = attacks.ranking(link(first[40:]) @ link(second[40:]).T, people, people)
    raw = attacks.ranking(attacks.unit(first[40:]) @ attacks.unit(second[40:]).T, people, people)
    assert ranks["top_1"].value > raw["top_1"].value + 0.5


def test_proper_names_exclude_capitalized_first_words() -> None:
    texts = [
        "Great fun with Uma Thurman. Tarantino at his best!",
        "The best of tarantino's films? I saw Pulp.",
        "great",
    ]
    assert attacks.proper_names(texts) == {"uma", "thurman", "pulp"}
    contains = attacks.vocabulary(texts, ["best", "great", "missing"]).holds
    assert contains.astype(int).tolist() == [[1, 1, 0], [1, 0, 0], [0, 1, 0]]
    hits = attacks.hits_at(np.array([[9, 1, 0], [9, 1, 0], [9, 1, 0.0]]), contains, 1)
    assert attacks.f1(hits) == pytest.approx(2 * 2 / (3 + 4))


def test_interval_resamples_users_not_rows() -> None:
    users = np.repeat(np.arange(10), 50)
    by_user = attacks.mean_over_users(np.repeat(np.arange(10) % 2, 50), users)
    by_row = attacks.mean_over_users(np.repeat(np.arange(10) % 2, 50), np.arange(500))
    assert by_user.value == by_row.value == 0.5
    assert by_user.high - by_user.low > 3 * (by_row.high - by_row.low)


def test_explained_variance_is_0_for_the_mean_and_1_for_the_truth() -> None:
    true, users = np.array([1.0, 2.0, 4.0, 5.0]), np.arange(4)
    assert attacks.explained(true, np.full(4, 3.0), users).value == 0
    assert attacks.explained(true, true, users).value == 1


def test_noise_option_adds_noise_of_the_given_norm() -> None:
    option = subjects.Option
    vectors = np.random.default_rng(3).normal(size=(50, 400))
    stored = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    assert np.array_equal(option("as stored").vectors(stored, seed=0), stored)
    noisy = option("noise", noise=1.0).vectors(stored, seed=0).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(noisy, axis=1), 1, atol=1e-2)
    cosines = (noisy * stored).sum(axis=1)
    assert cosines.mean() == pytest.approx(1 / 2**0.5, abs=0.02)  # the noise has the norm of the vector


def test_audit_detects_real_leaks_and_none_in_shuffled_vectors(toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "RESAMPLES", 20)
    monkeypatch.setattr(personas, "HISTORIES", 60)
    people = subjects.open_subjects(toy_run / "run", toy_run / "data", users=9, seed=0)
    assert not {p.longest.owner for p in people.strangers} & {p.longest.owner for p in people.targets}
    result = privacy.Audit(people).measure([subjects.Option("noise", noise=2.0)])
    stored, noisy = result["stored"], result["options"][0]
    assert stored["vectors"]["text, encoder known"]["top_1"].value == 1
    assert stored["vectors"]["text, shuffled vectors"]["top_1"].value < 0.2
    assert noisy["vectors"]["text, encoder known"]["mrr"].value < 0.8
    # State tokens weigh all items equally, so they are equal for the same items with another prompt.
    assert stored["soft_tokens"]["user, same items, other prompt"]["mrr"].value > 0.5
    assert stored["answers"]["change, removed, its prompt"]["median"].value > 0
    assert set(stored["use"]) >= {"nll", "accuracy"}
    assert noisy["nll_gap"].low <= noisy["nll_gap"].value <= noisy["nll_gap"].high
    tables = privacy.render([json.loads(json.dumps({"task": "toy", **privacy._plain(result)}))])
    assert "| noise |" in tables
    assert "no history" in tables


def test_audit_refuses_users_of_the_training_data(toy_run: Path) -> None:
    data = toy_run / "data"
    for kind in ("questions", "outputs"):
        (toy_run / "seen").mkdir(exist_ok=True)
        (toy_run / "seen" / f"dev_{kind}.json").write_bytes((data / f"train_{kind}.json").read_bytes())
    with pytest.raises(ConfigError, match="trained on 6 of the users"):
        subjects.open_subjects(toy_run / "run", toy_run / "seen", users=9, seed=0)


def test_the_page_shows_the_tables_of_the_published_results() -> None:
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS]
    assert results
    for table in privacy.render(results).split("\n\n"):
        assert table in page
