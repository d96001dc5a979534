"""LaMP's rules on known cases, and every metric against an independent implementation."""

from __future__ import annotations

import gzip
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error

from personaplug.analysis.keyword_metrics import KEYWORD_METRICS
from personaplug.analysis.metrics import (
    MANNER_METRICS,
    METRICS,
    Array,
    LikelihoodMetric,
    get_metric,
    has_estimate,
    is_invalid,
    metric_class,
    value_of,
)
from personaplug.analysis.significance import bootstrap_interval
from personaplug.analysis.words import longest_common_subsequence
from personaplug.errors import ConfigError, ShapeMismatch

STARS = ("1", "2", "3", "4", "5")
TAGS = ("comedy", "dark comedy", "sci-fi", "true story")
CHOICES = ("[1]", "[2]")


def rated(prediction: str, gold: str) -> float:
    """Return the parsed rating, computed from its error against a gold answer that is not greater."""
    return float(gold) + get_metric("mae", labels=STARS).score([prediction], [gold])


# Labels


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [("comedy", 1), (" comedy\n", 1), ("Comedy", 0), ("comedy.", 0), ("", 0), ("dark comedy", 0), ("nan", 0)],
)
def test_accuracy_is_an_exact_match_after_stripping(prediction: str, hit: float) -> None:
    assert get_metric("accuracy", labels=TAGS).score([prediction], ["comedy"]) == hit


@pytest.mark.parametrize(("prediction", "hit"), [(" [1] ", 1), ("1", 0), ("[2]", 0), ("[1] ]", 0), ("[3]", 0)])
def test_citation_answer_is_a_number_in_brackets(prediction: str, hit: float) -> None:
    assert get_metric("accuracy", labels=CHOICES).score([prediction], ["[1]"]) == hit


def test_gold_is_stripped_too_and_labels_may_be_a_list() -> None:
    assert get_metric("accuracy", labels=list(TAGS)).score(["sci-fi"], [" sci-fi "]) == 1


def test_gold_outside_the_labels_is_always_wrong() -> None:
    assert get_metric("accuracy", labels=TAGS).score(["opera"], ["opera"]) == 0


def test_accuracy_of_ratings_compares_texts() -> None:
    assert get_metric("accuracy", labels=STARS).score(["4", "4.0", " 4 "], ["4", "4", "4"]) == pytest.approx(2 / 3)


def random_labels(count: int, *, seed: int, noise: tuple[str, ...] = ("Comedy", "", "opera")) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(TAGS[:3] + noise) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_label_metrics_agree_with_scikit_learn(seed: int) -> None:
    golds, predictions = random_labels(40, seed=seed, noise=()), random_labels(40, seed=seed + 1000)
    index = {tag: number for number, tag in enumerate(TAGS)}
    gold_ids, predicted_ids = [index[tag] for tag in golds], [index.get(tag, -1) for tag in predictions]
    # The fourth tag is in no gold and no prediction, but still counts as 0 in the mean.
    expected = f1_score(gold_ids, predicted_ids, labels=range(len(TAGS)), average="macro", zero_division=0)
    assert get_metric("f1", labels=TAGS).score(predictions, golds) == pytest.approx(expected, abs=1e-12)
    accuracy = get_metric("accuracy", labels=TAGS).score(predictions, golds)
    assert accuracy == pytest.approx(accuracy_score(gold_ids, predicted_ids), abs=1e-12)


def test_invalid_answer_lowers_recall_and_an_unused_label_counts_as_0() -> None:
    # comedy: 1 hit, 1 prediction, 2 golds: F1 = 2/3; the other three labels count 0.
    assert get_metric("f1", labels=TAGS).score(["comedy", "?"], ["comedy", "comedy"]) == pytest.approx(2 / 3 / 4)


def test_f1_takes_many_means_at_once() -> None:
    metric = get_metric("f1", labels=TAGS)
    golds = random_labels(30, seed=1, noise=())
    stats = np.stack([metric.statistics(random_labels(30, seed=seed), golds).mean(axis=0) for seed in (2, 3)])
    assert metric.value(stats).shape == (2,)
    assert metric.value(stats)[1] == metric.value(stats[1])


# Ratings


@pytest.mark.parametrize(
    ("prediction", "gold", "rating"),
    [
        ("4", "1", 4),
        ("3.", "1", 3),
        (" 2 \n", "1", 2),
        ("42", "1", 42),
        ("4 stars", "1", 5),
        ("²", "1", 5),
        ("② of 4", "1", 5),
        ("٣ stars", "1", 5),
        ("five", "1", 5),
        ("4.5", "1", 4.5),
        ("", "1", 5),
        ("", "3", 5),
        ("", "2", 5),
        ("1e1", "1", 10),
    ],
)
def test_rating_is_parsed_as_in_lamp(prediction: str, gold: str, rating: float) -> None:
    assert rated(prediction, gold) == rating


@pytest.mark.parametrize(("gold", "error"), [("1", 4), ("2", 3), ("3", 2), ("4", 3), ("5", 4)])
def test_text_without_a_number_counts_as_the_farthest_end(gold: str, error: float) -> None:
    assert get_metric("mae", labels=STARS).score(["I liked it"], [gold]) == error


def test_upper_end_counts_if_both_ends_are_equally_far() -> None:
    # Both ends have the same error, so no score shows which end LaMP's rule chooses.
    metric = get_metric("mae", labels=STARS)
    assert metric._rating("?", 3.0) == 5.0  # type: ignore[attr-defined]


def test_ends_of_the_scale_come_from_the_labels() -> None:
    assert get_metric("mae", labels=("0", "5", "10")).score(["?"], ["2"]) == 8


def test_nan_and_infinity_are_not_replaced() -> None:
    mae, rmse = (get_metric(name, labels=STARS) for name in ("mae", "rmse"))
    assert math.isnan(mae.score(["nan", "4"], ["3", "4"]))
    assert math.isnan(rmse.score(["NaN", "4"], ["3", "4"]))
    assert mae.score(["-inf", "4"], ["3", "4"]) == rmse.score(["inf", "4"], ["3", "4"]) == math.inf
    assert rmse.score(["1e200"], ["3"]) == math.inf


@pytest.mark.parametrize("text", ["²", "½", "٣", "1_0", "0x10", "\x00", "1" * 5000, "--1", "\ud83d", "1,5", "Ⅳ"])
def test_parsing_a_rating_never_raises(text: str) -> None:
    get_metric("rmse", labels=STARS).statistics([text], ["3"])


@pytest.mark.parametrize("seed", range(5))
def test_errors_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    golds, predictions = rng.integers(1, 6, size=50), rng.uniform(-1, 8, size=50).round(2)
    texts = [str(number) for number in predictions], [str(number) for number in golds]
    mae, rmse = (get_metric(name, labels=STARS).score(*texts) for name in ("mae", "rmse"))
    assert mae == pytest.approx(mean_absolute_error(golds, predictions), abs=1e-12)
    assert rmse == pytest.approx(math.sqrt(mean_squared_error(golds, predictions)), abs=1e-12)


@pytest.mark.parametrize("gold", ["good", "", "nan", "inf"])
def test_error_for_a_gold_without_a_number_names_its_position_only(gold: str) -> None:
    with pytest.raises(ConfigError, match="sample 2") as caught:
        get_metric("mae", labels=STARS).score(["1", "1"], ["1", gold])
    assert "good" not in str(caught.value)


# ROUGE


def assert_equals_rouge_score(pairs: list[tuple[str, str]]) -> None:
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    golds, predictions = [gold for gold, _ in pairs], [prediction for _, prediction in pairs]
    reference_scores = [scorer.score(gold, prediction) for gold, prediction in pairs]
    for name, key in (("rouge_1", "rouge1"), ("rouge_l", "rougeL")):
        ours = get_metric(name).statistics(predictions, golds)
        expected = np.array([score[key].fmeasure for score in reference_scores])
        np.testing.assert_allclose(ours[:, 0], expected, rtol=0, atol=1e-9)
        assert len(np.unique(expected)) > 5


def real_pairs(folder: Path) -> list[tuple[str, str]]:
    """Return gold answers with their inputs."""
    questions = json.loads(gzip.decompress((folder / "train_questions.json.gz").read_bytes()))
    outputs = json.loads(gzip.decompress((folder / "train_outputs.json.gz").read_bytes()))["golds"]
    golds = {gold["id"]: gold["output"] for gold in outputs}
    return [(golds[question["id"]], question["input"]) for question in questions]


def test_rouge_equals_google_on_real_texts(shared_data: Path) -> None:
    pairs = [pair for task in ("LaMP_7", "LaMP_4") for pair in real_pairs(shared_data / task)[:300]]
    assert len(pairs) == 600
    assert_equals_rouge_score(pairs)
    # Texts of different samples share few words, so many scores are 0.
    assert_equals_rouge_score([(gold, pairs[index - 1][1]) for index, (gold, _) in enumerate(pairs[:200])])


def random_text(rng: random.Random, *, words: int) -> str:
    vocabulary = [
        "the",
        "The",
        "film",
        "film's",
        "a",
        "I",
        "42",
        "naïve",
        "İstanbul",
        "ß",
        "K",
        "co-op",
        "x_y",
        "²",
        "don't",
        "😀",
        "…",
        "é1",
    ]
    return rng.choice([" ", "\n", "  "]).join(rng.choice(vocabulary) for _ in range(rng.randint(0, words)))


def test_rouge_equals_google_on_random_texts() -> None:
    rng = random.Random(0)
    assert_equals_rouge_score([(random_text(rng, words=14), random_text(rng, words=14)) for _ in range(2000)])


@pytest.mark.parametrize(
    ("prediction", "gold", "rouge_1", "rouge_l"),
    [
        ("the cat sat", "the cat sat", 1, 1),
        ("sat cat the", "The cat sat!", 1, 1 / 3),
        ("a a a", "a b", 2 / 5, 2 / 5),
        ("", "a b", 0, 0),
        ("a b", "", 0, 0),
        ("", "", 0, 0),
        ("…", "…", 0, 0),
        ("running", "run", 0, 0),
    ],
)
def test_rouge_of_known_cases(prediction: str, gold: str, rouge_1: float, rouge_l: float) -> None:
    assert get_metric("rouge_1").score([prediction], [gold]) == pytest.approx(rouge_1)
    assert get_metric("rouge_l").score([prediction], [gold]) == pytest.approx(rouge_l)


@pytest.mark.parametrize(("left", "right", "length"), [("abcbdab", "bdcaba", 4), ("", "a", 0), ("ab", "ba", 1)])
def test_longest_common_subsequence_of_known_cases(left: str, right: str, length: int) -> None:
    assert longest_common_subsequence(left, right) == longest_common_subsequence(right, left) == length


def test_rouge_is_fast_even_for_long_texts() -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefghijklmnopqrst", k=20)) for _ in range(4000)]
    texts += [" ".join(rng.choices("abcdefghijklmnopqrst", k=3000)) for _ in range(2)]
    start = time.process_time()
    get_metric("rouge_l").statistics(texts[::2], texts[1::2])
    assert time.process_time() - start < 1


# All metrics

ANSWER_METRICS = [name for name, metric in METRICS.items() if metric.of_answers]
MANNER_NAMES = ("manners", *(metric.name for metric in MANNER_METRICS))
KEYWORD_NAMES = tuple(metric.name for metric in KEYWORD_METRICS)  # test_keyword_metrics.py


@pytest.mark.parametrize("name", ANSWER_METRICS)
def test_score_is_the_value_of_mean_statistics(name: str) -> None:
    metric = get_metric(name, labels=STARS)
    predictions, golds = ["1", "5", "x", "3 "], ["1", "4", "2", "3"]
    stats = metric.statistics(predictions, golds)
    assert stats.dtype == np.float64
    assert len(stats) == 4
    assert np.array_equal(metric.score(predictions, golds), metric.value(stats.mean(axis=0)), equal_nan=True)
    assert metric.greater_is_better is (name not in ("mae", "rmse"))


@pytest.mark.parametrize("name", [name for name in ANSWER_METRICS if name not in MANNER_NAMES + KEYWORD_NAMES])
def test_perfect_prediction_beats_a_wrong_one_in_the_metrics_direction(name: str) -> None:
    metric = get_metric(name, labels=STARS)
    gain = metric.score(["1", "5"], ["1", "5"]) - metric.score(["5", "1"], ["1", "5"])
    assert gain > 0 if metric.greater_is_better else gain < 0


@pytest.mark.parametrize("name", ANSWER_METRICS)
def test_no_samples_score_nan_and_lengths_must_agree(name: str) -> None:
    metric = get_metric(name, labels=STARS)
    assert math.isnan(metric.score([], []))
    with pytest.raises(ShapeMismatch, match=r"2 .*found 1"):
        metric.statistics(["1"], ["1", "2"])


@pytest.mark.parametrize("name", ["nll", "divergence"])
def test_likelihood_is_averaged_over_the_tokens_of_all_samples(name: str) -> None:
    metric = get_metric(name)
    stats = np.array([[6.0, 3.0], [1.0, 1.0]])
    assert value_of(stats, metric) == pytest.approx(7 / 4)
    assert not metric.greater_is_better


@pytest.mark.parametrize("name", ["nll", "choice", "margin", "divergence"])
def test_likelihood_cannot_be_computed_from_texts(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} needs a model's probabilities"):
        get_metric(name).score(["1"], ["1"])


LIKELIHOODS = [
    [2.0, 2, 9.0, 3, 4.0, 1],  # 1 nat a token against 3 and 4
    [6.0, 2, 2.0, 2],  # 3 against 1
    [5.0, 5],  # no rejected answer
    [2.0, 2, 3.0, 3],  # a tie does not count as a choice
    [1.0, 2, 3.0, 1, 1.0, 1],  # 0.5 against 3 and 1: the best rejected answer counts
]


def likelihood_statistics(name: str, likelihoods: Sequence[Sequence[float]] = LIKELIHOODS) -> Array | None:
    metric = get_metric(name)
    assert isinstance(metric, LikelihoodMetric)
    return metric.of_likelihoods(likelihoods)


@pytest.mark.parametrize(
    ("name", "sample_scores", "mean"),
    [("choice", [1, 0, math.nan, 0, 1], 2 / 4), ("margin", [2, -2, math.nan, 0, 0.5], 0.5 / 4)],
)
def test_right_answer_is_compared_per_token_with_the_best_rejected_answer(
    name: str, sample_scores: list[float], mean: float
) -> None:
    stats, metric = likelihood_statistics(name), get_metric(name)
    assert stats is not None
    np.testing.assert_array_equal(metric.value(stats), sample_scores)
    assert value_of(stats, metric) == pytest.approx(mean)
    assert metric.greater_is_better
    assert bootstrap_interval(stats, ["a", "b", "a", "b", "b"], metric, resamples=200).value == pytest.approx(mean)


@pytest.mark.parametrize("name", ["choice", "margin"])
def test_comparison_needs_rejected_answers(name: str) -> None:
    assert likelihood_statistics(name, [[1.0, 2], [3.0, 4]]) is None


def test_nll_ignores_rejected_answers() -> None:
    np.testing.assert_array_equal(likelihood_statistics("nll"), [[2.0, 2], [6.0, 2], [5.0, 5], [2.0, 2], [1.0, 2]])


@pytest.mark.parametrize(("name", "suggestion"), [("acuracy", "accuracy"), ("rouge1", "rouge_1"), ("rougeL", "rouge_")])
def test_error_for_an_unknown_metric_suggests_the_nearest_name(name: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{suggestion}"):
        get_metric(name)


def test_error_for_an_unknown_metric_lists_all_metrics() -> None:
    with pytest.raises(ConfigError, match=r"no metric 'xyz'; expected one of: accuracy, answered, attribution"):
        get_metric("xyz")


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("accuracy", ()),
        ("f1", ("a", "a")),
        ("f1", ("a", " a")),
        ("mae", ()),
        ("rmse", TAGS),
        ("mae", ("1", "inf")),
    ],
)
def test_invalid_labels_are_refused(name: str, labels: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=name):
        get_metric(name, labels=labels)


@pytest.mark.parametrize("stem", ["mae", "rmse", "accuracy"])
@pytest.mark.parametrize("estimate", ["median", "mean"])
def test_point_estimate_changes_the_predictions_but_not_the_metric(stem: str, estimate: str) -> None:
    plain, other = get_metric(stem, labels=STARS), get_metric(f"{stem}@{estimate}", labels=STARS)
    assert (plain.name, plain.estimate, has_estimate(plain.name)) == (stem, "argmax", False)
    assert (other.name, other.estimate, has_estimate(other.name)) == (f"{stem}@{estimate}", estimate, True)
    assert get_metric(stem, labels=STARS).name == stem  # the other instance does not change the class's name
    assert other.greater_is_better == plain.greater_is_better
    texts = ["1", "5", "x"], ["2", "5", "3"]
    np.testing.assert_array_equal(other.statistics(*texts), plain.statistics(*texts))
    assert metric_class(other.name) is type(plain) is metric_class(stem)


@pytest.mark.parametrize(
    ("name", "labels", "reason"),
    [
        ("mae@mode", STARS, "no point estimate 'mode'"),
        ("mae@", STARS, "no point estimate ''"),
        ("mea@median", STARS, "did you mean 'mae'"),
        ("mae@argmax", STARS, "Write 'mae' instead of 'mae@argmax'"),
        ("f1@median", STARS, "f1 takes no point estimate"),
        ("rouge_1@mean", (), "rouge_1 takes no point estimate"),
        ("accuracy@median", TAGS, "accuracy@median needs finite numbers"),
        ("mae@mean", TAGS, "mae@mean needs finite numbers"),
    ],
)
def test_invalid_estimates_are_refused(name: str, labels: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        get_metric(name, labels=labels)


def test_unknown_metric_has_no_class() -> None:
    assert metric_class("bleu@median") is None


@pytest.mark.parametrize(
    ("prediction", "labels", "invalid"),
    [
        (" [1] ", CHOICES, False),
        ("1", CHOICES, True),
        ("Comedy", TAGS, True),
        ("", TAGS, True),
        ("3", STARS, False),
        ("3.", STARS, True),
        ("nan", STARS, True),
        ("²", STARS, True),
        (" \n", (), True),
        ("x", (), False),
    ],
)
def test_predictions_outside_the_labels_or_empty_are_invalid(
    prediction: str, labels: tuple[str, ...], invalid: bool
) -> None:
    assert is_invalid(prediction, labels) is invalid


@pytest.mark.parametrize(
    ("text", "answer", "is_right"),
    [
        ("The answer is 12.", "12", True),
        ("112", "12", False),
        ("she comes from OSLO 😀", "Oslo", True),
        ("Anna, Ben, Mia", "anna, ben, mia", True),
        ("Anna, Mia, Ben", "Anna, Ben, Mia", False),
        ("yes, it is not no", "Yes", True),
        ("No. yes is wrong", "Yes", False),
        ("I do not know", "No", False),
        ("", "12", False),
    ],
)
def test_answered_looks_for_the_words_of_the_answer(text: str, answer: str, is_right: bool) -> None:
    assert get_metric("answered").score([text], [answer]) == float(is_right)


# Manners

KIND = "Hola!\n- It's late.\n- Don't wait. 👍\nShall I go on?\nCheers!"
CURT = "it is late."


@pytest.mark.parametrize("name", [name for name in MANNER_NAMES if name != "manners_layout"])
def test_equal_manners_score_1_and_opposite_manners_score_0(name: str) -> None:
    metric = get_metric(name)
    assert metric.score([KIND, CURT], [KIND, CURT]) == 1
    assert metric.score([CURT, KIND], [KIND, CURT]) == 0
    assert metric.score([KIND, KIND], [KIND, CURT]) == 0.5


def test_manner_counts_only_if_the_reference_shows_it() -> None:
    metric = get_metric("manners_layout")
    assert metric.score([CURT, KIND], [KIND, CURT]) == 0
    assert metric.score([KIND, KIND], [KIND, CURT]) == 1
    assert math.isnan(metric.score([KIND], [CURT]))


def test_manners_do_not_depend_on_the_words() -> None:
    other = "Hola!\n- Tea won't help.\n- Sleep. 👍\nShall I go on?\nCheers!"
    assert get_metric("manners").score([other, ""], [KIND, KIND]) == 0.5
