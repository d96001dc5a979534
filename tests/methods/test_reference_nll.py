"""How likely right answers were: in one pass or many, in the samples' order, behind whatever soft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import personaplug.methods.predictions
from personaplug.data.records import Chat, characters
from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.llm.base import PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.methods.predictions import reference_nll

NOTHING = np.empty(0, dtype=np.int64)
PAIRS = [
    ("short", "a"),
    ("the longest of these prompts", "b c d e f"),
    ("in between", "a much longer answer"),
    ("x", "y"),
]
SAMPLES = [
    EncodedSample(p, p, None, p, p, a, NOTHING, NOTHING.astype(np.int16), no_style(), all_answers()) for p, a in PAIRS
]


class Given:
    """Soft tokens by prompt."""

    def __init__(self, width: int, placement: str) -> None:
        self.width, self.placement = width, placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        drawn = [
            torch.randn(3, self.width, generator=torch.Generator().manual_seed(characters(s.prompt))) for s in samples
        ]
        return SoftPrompt(torch.stack(drawn), placement=self.placement)


@pytest.mark.parametrize("most", [1, 8, 1024])
@pytest.mark.parametrize("placement", ["none", "prefix", "suffix"])
def test_each_is_what_it_is_alone(toy: CausalLM, placement: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personaplug.methods.predictions, "MAX_PASS_TOKENS", most)
    prompter = None if placement == "none" else Given(toy.identity.width, placement)
    found = reference_nll(toy, SAMPLES, prompter=prompter, batch_size=3)
    for sample, (loss, tokens) in zip(SAMPLES, found, strict=True):
        soft = None if prompter is None else prompter.soft_prompt([sample])
        alone, count = toy.loss(PromptBatch([sample.prompt], soft), [sample.target or ""])
        assert loss == pytest.approx(float(alone), rel=1e-4)
        assert tokens == int(count)
    assert found[1] != found[2]


@pytest.mark.parametrize("most", [8, 1024])
@pytest.mark.parametrize("placement", ["none", "prefix", "suffix"])
def test_rejected_answers_follow_the_right_one(
    toy: CausalLM, placement: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personaplug.methods.predictions, "MAX_PASS_TOKENS", most)
    rejected: list[tuple[str, ...]] = [("no", "a long one that nobody wanted"), (), ("z",), ()]
    chat = Chat((("user", "before"), ("assistant", "so"), ("user", "in between")))
    samples = [replace(sample, rejected=texts) for sample, texts in zip(SAMPLES, rejected, strict=True)]
    samples[2] = replace(samples[2], prompt=chat)
    prompter = None if placement == "none" else Given(toy.identity.width, placement)
    found = reference_nll(toy, samples, prompter=prompter, batch_size=3)
    for sample, row in zip(samples, found, strict=True):
        answers = [sample.target or "", *sample.rejected]
        assert len(row) == 2 * len(answers)
        soft = None if prompter is None else prompter.soft_prompt([sample])
        for answer, loss, tokens in zip(answers, row[::2], row[1::2], strict=True):
            alone, count = toy.loss(PromptBatch([sample.prompt], soft), [answer])
            assert loss == pytest.approx(float(alone), rel=1e-4)
            assert tokens == int(count)


def test_no_pass_has_more_samples_than_asked_for(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = toy.loss

    def noted(batch: PromptBatch, *args: Any, **more: Any) -> Any:
        sizes.append(len(batch.prompts))
        return real(batch, *args, **more)

    monkeypatch.setattr(toy, "loss", noted)
    reference_nll(toy, SAMPLES, prompter=None, batch_size=1)
    assert sizes == [1] * len(SAMPLES)
