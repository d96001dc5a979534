"""Expected score and best of k sampled answers: known cases."""

from __future__ import annotations

import pytest

from personaplug.analysis.keyword_metrics import KEYWORD_METRICS
from personaplug.analysis.metric_base import value_of
from personaplug.analysis.metrics import METRICS, get_metric, has_estimate, is_instrument
from personaplug.analysis.sampled_metrics import SampledMetric, can_be_sampled
from personaplug.analysis.tables import metric_title
from personaplug.errors import ConfigError

ANSWERS = [["a b", "x y"], ["c", "c d"]]
GOLDS = ["a b", "c d"]


@pytest.mark.parametrize(
    ("name", "scores"),
    [("rouge_1@expected", [(1 + 0) / 2, (2 / 3 + 1) / 2]), ("rouge_1@best", [1, 1]), ("answered@expected", [0.5, 0.5])],
)
def test_scores_of_sampled_answers(name: str, scores: list[float]) -> None:
    metric = get_metric(name)
    assert isinstance(metric, SampledMetric)
    assert metric.name == name
    statistics = metric.of_samples(ANSWERS, GOLDS)
    assert statistics[:, 0] == pytest.approx(scores)
    assert value_of(statistics, metric) == pytest.approx(sum(scores) / 2)


def test_one_sampled_answer_has_the_score_of_the_metric_itself() -> None:
    for kind in ("expected", "best"):
        metric = get_metric(f"rouge_l@{kind}")
        assert isinstance(metric, SampledMetric)
        single = metric.of_samples([[text] for text, _ in ANSWERS], GOLDS)
        assert single.tolist() == get_metric("rouge_l").statistics([text for text, _ in ANSWERS], GOLDS).tolist()


def test_only_means_of_one_number_can_be_sampled() -> None:
    sampled = {name for name, kind in METRICS.items() if not kind.needs_labels and not kind.needs_scale
               and can_be_sampled(kind())}  # fmt: skip
    keywords = {kind.name for kind in KEYWORD_METRICS}
    assert sampled == keywords | {"rouge_1", "rouge_l", "rouge_1_unicode", "rouge_l_unicode", "answered", "manners"}
    with pytest.raises(ConfigError, match="nll has no score of sampled answers"):
        get_metric("nll@expected")
    with pytest.raises(ConfigError, match=r"rouge_1@best needs sampled answers"):
        get_metric("rouge_1@best").statistics(["a"], ["a"])


def test_sampled_metrics_are_instruments_and_no_point_estimates() -> None:
    assert is_instrument("rouge_1@best")
    assert not is_instrument("rouge_1")
    assert not has_estimate("rouge_1@best")
    assert has_estimate("mae@median")
    assert metric_title("rouge_1@expected") == "rouge_1@expected ↑"
