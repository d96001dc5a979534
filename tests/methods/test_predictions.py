"""Predictions: probabilities, likelihoods, point estimates and cache files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personaplug.data.task_registry import LAMP_TASKS
from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.methods.predictions import Predictions, load_predictions, predict_samples, save_predictions

TASK = LAMP_TASKS["LaMP_3"]
NO_ITEMS = np.empty(0, dtype=np.int64)
PROMPTS = ["short", "the longest of these prompts by far", "in between them"]
SAMPLES = [
    EncodedSample(p, p, None, p, p, "1", NO_ITEMS, NO_ITEMS.astype(np.int16), no_style(), all_answers())
    for p in PROMPTS
]


def _answers(llm: CausalLM, *, decoding: str = "score", batch_size: int = 2) -> Predictions:
    return predict_samples(
        llm,
        SAMPLES,
        prompter=None,
        task=TASK,
        decoding=decoding,
        generation=GenerationConfig(max_new_tokens=2),
        batch_size=batch_size,
    )


def _scores(llm: Any, lines: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model return these log-probabilities for the prompts."""
    scores = dict(zip(PROMPTS, lines, strict=True))
    monkeypatch.setattr(llm, "score", lambda batch, labels: torch.tensor([scores[prompt] for prompt in batch.prompts]))


def test_scored_labels_have_probabilities_in_the_samples_order(toy: CausalLM) -> None:
    predictions = _answers(toy)
    scores = toy.score(PromptBatch(PROMPTS), TASK.labels).double()
    expected = (scores - scores.logsumexp(dim=1, keepdim=True)).exp().numpy()
    assert predictions.probabilities is not None
    np.testing.assert_allclose(predictions.probabilities, expected, atol=2e-6)
    np.testing.assert_allclose(np.sum(predictions.probabilities, axis=1), 1, atol=1e-5)
    assert predictions.texts == [TASK.labels[index] for index in expected.argmax(axis=1)]
    assert _answers(toy, decoding="generate").probabilities is None


def test_scored_labels_have_the_nll_of_the_target(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    low = -float("inf")
    _scores(toy, [[-40.0, 0, 0, 0, 0], [low] * 5, [-1.0, low, low, low, low]], monkeypatch)
    predictions = _answers(toy)
    expected = [[40 + np.log(4), 1], [np.inf, 1], [0, 1]]  # not capped; a score that overflowed counts as impossible
    likelihoods = predictions.likelihoods()
    assert likelihoods is not None
    np.testing.assert_allclose(likelihoods, expected, atol=1e-5)


def test_infinite_nll_survives_saving_and_loading(
    toy: CausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    low = -float("inf")
    _scores(toy, [[-3.0, 0, 0, 0, 0], [low] * 5, [-1.0, low, low, low, low]], monkeypatch)
    predictions = _answers(toy)
    save_predictions(predictions, tmp_path / "a.json", key=[1])
    loaded = load_predictions(tmp_path / "a.json", key=[1])
    assert loaded is not None
    np.testing.assert_array_equal(loaded.likelihoods(), predictions.likelihoods())


def test_each_point_estimate_chooses_its_label(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [[0.4, 0.05, 0.3, 0.05, 0.2], [0.05, 0.05, 0.2, 0.3, 0.4], [0.4, 0.05, 0.1, 0.05, 0.4]]
    # log-probabilities of a closed set need not sum to 1 among themselves
    _scores(toy, (torch.tensor(lines).log() - 3).tolist(), monkeypatch)
    predictions = _answers(toy)
    assert predictions.estimates("argmax", labels=TASK.labels) == predictions.texts == ["1", "5", "1"]
    assert predictions.estimates("median", labels=TASK.labels) == ["3", "4", "3"]
    assert predictions.estimates("mean", labels=TASK.labels) == ["3", "4", "3"]


def test_point_estimates_of_overflowed_scores_are_the_predicted_labels(
    toy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, broken = -float("inf"), float("nan")
    _scores(toy, [[low] * 5, [-1, broken, -1, -1, -1], [low, low, -9.0, low, low]], monkeypatch)
    predictions = _answers(toy)
    for estimate in ("median", "mean"):
        assert predictions.estimates(estimate, labels=TASK.labels) == predictions.texts
    assert predictions.texts[2] == "3"


def test_point_estimates_leave_generated_texts_unchanged() -> None:
    generated = Predictions(["about 4", "2"], [False, False], 1.0, 0)
    assert [generated.estimates(estimate, labels=TASK.labels) for estimate in ("argmax", "median")] == [
        generated.texts
    ] * 2


@pytest.mark.parametrize("decoding", ["score", "generate"])
def test_saved_predictions_load_only_with_the_same_key(toy: CausalLM, tmp_path: Path, decoding: str) -> None:
    predictions = _answers(toy, decoding=decoding)
    save_predictions(predictions, tmp_path / "answers.json", key=["a"])
    assert load_predictions(tmp_path / "answers.json", key=["a"]) == predictions
    assert load_predictions(tmp_path / "answers.json", key=["b"]) is None
