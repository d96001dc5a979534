"""NLL of reference answers: in one or several passes, in the samples' order, with any placement of soft tokens."""

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

NO_ITEMS = np.empty(0, dtype=np.int64)
PAIRS = [
    ("short", "a"),
    ("the longest of these prompts", "b c d e f"),
    ("in between", "a much longer answer"),
    ("x", "y"),
]
SAMPLES = [
    EncodedSample(p, p, None, p, p, a, NO_ITEMS, NO_ITEMS.astype(np.int16), no_style(), all_answers()) for p, a in PAIRS
]


class FixedSoftPrompts:
    """Soft tokens that depend only on the prompt."""

    def __init__(self, width: int, placement: str) -> None:
        self.width, self.placement = width, placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        drawn = [
            torch.randn(3, self.width, generator=torch.Generator().manual_seed(characters(s.prompt))) for s in samples
        ]
        return SoftPrompt(torch.stack(drawn), placement=self.placement)


@pytest.mark.parametrize("max_tokens", [1, 8, 1024])
@pytest.mark.parametrize("placement", ["none", "prefix", "suffix"])
def test_nll_in_batches_equals_nll_of_single_samples(
    toy: CausalLM, placement: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personaplug.methods.predictions, "MAX_PASS_TOKENS", max_tokens)
    prompter = None if placement == "none" else FixedSoftPrompts(toy.identity.width, placement)
    rows = reference_nll(toy, SAMPLES, prompter=prompter, batch_size=3)
    for sample, (loss, tokens) in zip(SAMPLES, rows, strict=True):
        soft = None if prompter is None else prompter.soft_prompt([sample])
        alone, count = toy.loss(PromptBatch([sample.prompt], soft), [sample.target or ""])
        assert loss == pytest.approx(float(alone), rel=1e-4)
        assert tokens == int(count)
    assert rows[1] != rows[2]


@pytest.mark.parametrize("max_tokens", [8, 1024])
@pytest.mark.parametrize("placement", ["none", "prefix", "suffix"])
def test_nll_of_rejected_answers_follows_that_of_the_target(
    toy: CausalLM, placement: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personaplug.methods.predictions, "MAX_PASS_TOKENS", max_tokens)
    rejected: list[tuple[str, ...]] = [("no", "a long one that nobody wanted"), (), ("z",), ()]
    chat = Chat((("user", "before"), ("assistant", "so"), ("user", "in between")))
    samples = [replace(sample, rejected=texts) for sample, texts in zip(SAMPLES, rejected, strict=True)]
    samples[2] = replace(samples[2], prompt=chat)
    prompter = None if placement == "none" else FixedSoftPrompts(toy.identity.width, placement)
    rows = reference_nll(toy, samples, prompter=prompter, batch_size=3)
    for sample, row in zip(samples, rows, strict=True):
        answers = [sample.target or "", *sample.rejected]
        assert len(row) == 2 * len(answers)
        soft = None if prompter is None else prompter.soft_prompt([sample])
        for answer, loss, tokens in zip(answers, row[::2], row[1::2], strict=True):
            alone, count = toy.loss(PromptBatch([sample.prompt], soft), [answer])
            assert loss == pytest.approx(float(alone), rel=1e-4)
            assert tokens == int(count)


def test_no_pass_exceeds_the_batch_size(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = toy.loss

    def recording_loss(batch: PromptBatch, *args: Any, **more: Any) -> Any:
        sizes.append(len(batch.prompts))
        return real(batch, *args, **more)

    monkeypatch.setattr(toy, "loss", recording_loss)
    reference_nll(toy, SAMPLES, prompter=None, batch_size=1)
    assert sizes == [1] * len(SAMPLES)
