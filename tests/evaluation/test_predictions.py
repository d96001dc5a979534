"""Answers: chosen by one decision or another, kept, and read again from files of older code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personaplug.data.task_registry import LAMP_TASKS
from personaplug.encoders.encoded_sample import EncodedSample, no_style
from personaplug.evaluation.predictions import Answers, answer, keep, kept
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM

TASK = LAMP_TASKS["LaMP_3"]
NOTHING = np.empty(0, dtype=np.int64)
PROMPTS = ["short", "the longest of these prompts by far", "in between them"]
SAMPLES = [EncodedSample(p, p, None, p, p, "1", NOTHING, NOTHING.astype(np.int16), no_style()) for p in PROMPTS]


def _answers(llm: CausalLM, *, decoding: str = "score", batch_size: int = 2) -> Answers:
    return answer(
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
    low, golds = -float("inf"), ["1", "1", "1"]
    _scores(toy, [[-40.0, 0, 0, 0, 0], [low] * 5, [-1.0, low, low, low, low]], monkeypatch)
    made = _answers(toy)
    expected = [[40 + np.log(4), 1], [np.inf, 1], [0, 1]]  # not cut short, and no reward for what overflowed
    found = made.surprise(golds, labels=TASK.labels)
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_surprises_survive_the_file(toy: CausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    low, golds = -float("inf"), ["1", "1", "1"]
    _scores(toy, [[-3.0, 0, 0, 0, 0], [low] * 5, [-1.0, low, low, low, low]], monkeypatch)
    made = _answers(toy)
    keep(made, tmp_path / "a.json", depends_on=[1])
    again = kept(tmp_path / "a.json", depends_on=[1])
    assert again is not None
    np.testing.assert_array_equal(again.surprise(golds, labels=TASK.labels), made.surprise(golds, labels=TASK.labels))
    # As older code kept them: from the probabilities, which have six digits.
    old = Answers(made.texts, made.unfinished, 0, 0, probabilities=[[0.25, 0.75, 0, 0, 0]] * 2 + [[0, 1.0, 0, 0, 0]])
    found = old.surprise(golds, labels=TASK.labels)
    assert found is not None
    np.testing.assert_allclose(found[:, 0], [np.log(4), np.log(4), -np.log(5e-7)])


def test_each_decision_has_its_answer(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [[0.4, 0.05, 0.3, 0.05, 0.2], [0.05, 0.05, 0.2, 0.3, 0.4], [0.4, 0.05, 0.1, 0.05, 0.4]]
    # log-probabilities of a closed set need not sum to 1 among themselves
    _scores(toy, (torch.tensor(lines).log() - 3).tolist(), monkeypatch)
    made = _answers(toy)
    assert made.by("argmax", labels=TASK.labels) == made.texts == ["1", "5", "1"]
    assert made.by("median", labels=TASK.labels) == ["3", "4", "3"]
    assert made.by("mean", labels=TASK.labels) == ["3", "4", "3"]


def test_numbers_that_overflowed_leave_the_answer_that_was_given(
    toy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, broken = -float("inf"), float("nan")
    _scores(toy, [[low] * 5, [-1, broken, -1, -1, -1], [low, low, -9.0, low, low]], monkeypatch)
    made = _answers(toy)
    for decision in ("median", "mean"):
        assert made.by(decision, labels=TASK.labels) == made.texts
    assert made.texts[2] == "3"


def test_answers_that_were_not_chosen_stand_whatever_the_decision() -> None:
    written = Answers(["about 4", "2"], [False, False], 1.0, 0)
    assert [written.by(decision, labels=TASK.labels) for decision in ("argmax", "median")] == [written.texts] * 2


@pytest.mark.parametrize("decoding", ["score", "generate"])
def test_kept_answers_are_the_same_answers(toy: CausalLM, tmp_path: Path, decoding: str) -> None:
    made = _answers(toy, decoding=decoding)
    keep(made, tmp_path / "answers.json", depends_on=["a"])
    assert kept(tmp_path / "answers.json", depends_on=["a"]) == made
    assert kept(tmp_path / "answers.json", depends_on=["b"]) is None


def test_answers_from_before_probabilities_were_kept_are_the_likeliest_and_no_more(
    toy: CausalLM, tmp_path: Path
) -> None:
    path = tmp_path / "answers.json"
    keep(_answers(toy), path, depends_on=[])
    told = json.loads(path.read_text())
    path.write_text(json.dumps({key: told[key] for key in ("key", "texts", "unfinished", "seconds")}))
    assert kept(path, depends_on=[]) is None  # not a file of ours
    path.write_text(json.dumps({key: v for key, v in told.items() if key not in ("probabilities", "partial")}))
    found = kept(path, depends_on=[])
    assert found is not None
    assert found.by("argmax", labels=TASK.labels) == found.texts == told["texts"]
    assert found.by("median", labels=TASK.labels) is None
    assert found.by("mean", labels=TASK.labels) is None
