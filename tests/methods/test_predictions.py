"""Predictions: chosen by one decision or another, kept, and read again from files of older code."""

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
NOTHING = np.empty(0, dtype=np.int64)
PROMPTS = ["short", "the longest of these prompts by far", "in between them"]
SAMPLES = [
    EncodedSample(p, p, None, p, p, "1", NOTHING, NOTHING.astype(np.int16), no_style(), all_answers()) for p in PROMPTS
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
    """Let the model find these log-probabilities for the prompts."""
    found = dict(zip(PROMPTS, lines, strict=True))
    monkeypatch.setattr(llm, "score", lambda batch, labels: torch.tensor([found[prompt] for prompt in batch.prompts]))


def test_scored_labels_come_with_their_probabilities_in_the_samples_order(toy: CausalLM) -> None:
    made = _answers(toy)
    scores = toy.score(PromptBatch(PROMPTS), TASK.labels).double()
    expected = (scores - scores.logsumexp(dim=1, keepdim=True)).exp().numpy()
    assert made.probabilities is not None
    np.testing.assert_allclose(made.probabilities, expected, atol=2e-6)
    np.testing.assert_allclose(np.sum(made.probabilities, axis=1), 1, atol=1e-5)
    assert made.texts == [TASK.labels[place] for place in expected.argmax(axis=1)]
    assert _answers(toy, decoding="generate").probabilities is None


def test_scored_labels_come_with_how_likely_the_right_one_was(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    low = -float("inf")
    _scores(toy, [[-40.0, 0, 0, 0, 0], [low] * 5, [-1.0, low, low, low, low]], monkeypatch)
    made = _answers(toy)
    expected = [[40 + np.log(4), 1], [np.inf, 1], [0, 1]]  # not cut short, and no reward for what overflowed
    found = made.likelihoods()
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_surprises_survive_the_file(toy: CausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    low = -float("inf")
    _scores(toy, [[-3.0, 0, 0, 0, 0], [low] * 5, [-1.0, low, low, low, low]], monkeypatch)
    made = _answers(toy)
    save_predictions(made, tmp_path / "a.json", key=[1])
    again = load_predictions(tmp_path / "a.json", key=[1])
    assert again is not None
    np.testing.assert_array_equal(again.likelihoods(), made.likelihoods())


def test_each_decision_has_its_answer(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [[0.4, 0.05, 0.3, 0.05, 0.2], [0.05, 0.05, 0.2, 0.3, 0.4], [0.4, 0.05, 0.1, 0.05, 0.4]]
    # log-probabilities of a closed set need not sum to 1 among themselves
    _scores(toy, (torch.tensor(lines).log() - 3).tolist(), monkeypatch)
    made = _answers(toy)
    assert made.estimates("argmax", labels=TASK.labels) == made.texts == ["1", "5", "1"]
    assert made.estimates("median", labels=TASK.labels) == ["3", "4", "3"]
    assert made.estimates("mean", labels=TASK.labels) == ["3", "4", "3"]


def test_numbers_that_overflowed_leave_the_answer_that_was_given(
    toy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, broken = -float("inf"), float("nan")
    _scores(toy, [[low] * 5, [-1, broken, -1, -1, -1], [low, low, -9.0, low, low]], monkeypatch)
    made = _answers(toy)
    for decision in ("median", "mean"):
        assert made.estimates(decision, labels=TASK.labels) == made.texts
    assert made.texts[2] == "3"


def test_answers_that_were_not_chosen_stand_whatever_the_decision() -> None:
    written = Predictions(["about 4", "2"], [False, False], 1.0, 0)
    assert [written.estimates(decision, labels=TASK.labels) for decision in ("argmax", "median")] == [written.texts] * 2


@pytest.mark.parametrize("decoding", ["score", "generate"])
def test_kept_answers_are_the_same_answers(toy: CausalLM, tmp_path: Path, decoding: str) -> None:
    made = _answers(toy, decoding=decoding)
    save_predictions(made, tmp_path / "answers.json", key=["a"])
    assert load_predictions(tmp_path / "answers.json", key=["a"]) == made
    assert load_predictions(tmp_path / "answers.json", key=["b"]) is None
