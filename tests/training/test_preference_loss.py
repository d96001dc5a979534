"""Preference losses: their formulas on a small real architecture, and their effect on a plug."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import small_llm

from personaplug.config import PlugConfig
from personaplug.encoders import HashEncoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.llm.base import LanguageModel, PromptBatch
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import PlugSpec
from personaplug.training.objectives import PlugObjective
from personaplug.training.preference_loss import PreferenceKind, PreferenceLoss

PAIRS = [("one two", "yes it is", ("no it is not", "maybe")), ("three", "a dog", ("a cat",)), ("four", "fine", ())]


@pytest.fixture
def llm() -> LanguageModel:
    model: LanguageModel = small_llm("llama", chat=True)
    return model


def samples() -> list[EncodedSample]:
    none = np.zeros(0, np.int64)
    return [
        EncodedSample(
            *(str(number), str(number), None, prompt, prompt, kept),
            *(none, none.astype(np.int16), no_style(), all_answers()),
            rejected=rejected,
        )
        for number, (prompt, kept, rejected) in enumerate(PAIRS)
    ]


Build = Callable[..., PlugObjective]
"""Builds the objective of a new plug with a preference term of this kind and weight."""


@pytest.fixture
def build(llm: LanguageModel, tmp_path: Path) -> Build:
    encoder = HashEncoder(16)
    spec = PlugSpec(llm.identity, llm.embedding_scale, encoder.identity)
    config = replace(
        PlugConfig(), answer_channel="text", options="ignore", label_prior="none", instruction_start="random"
    )

    def build_objective(kind: PreferenceKind | None, weight: float = 1.0) -> PlugObjective:
        torch.manual_seed(0)
        plug = PersonaPlug(config, spec=spec, encoder=encoder)
        preference = None if kind is None else PreferenceLoss(kind, llm, weight)
        return PlugObjective(plug, llm, table=EmbeddingStore.open(tmp_path, encoder), preference=preference)

    return build_objective


def nll(objective: PlugObjective, sample: EncodedSample, answer: str, *, bare: bool = False) -> tuple[float, int]:
    """Return −log p of an answer and its tokens, with the plug or with the bare model."""
    soft = None if bare else objective.personalizer.soft_prompt([sample])
    loss, tokens = objective.llm.loss(PromptBatch([sample.prompt], soft), [answer])
    return loss.item(), int(tokens)


@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_preference_term_equals_its_formula(kind: PreferenceKind, build: Build) -> None:
    objective = build(kind, 0.7)
    sample = samples()[1]
    objective.prepare([sample])
    with torch.enable_grad():
        loss, tokens = objective.loss([sample])
    kept, kept_tokens = nll(objective, sample, "a dog")
    rejected, rejected_tokens = nll(objective, sample, "a cat")
    plain = [nll(objective, sample, text, bare=True)[0] for text in ("a dog", "a cat")]
    margin = {
        "dpo": 0.1 * ((rejected - kept) - (plain[1] - plain[0])),
        "simpo": 2.0 * (rejected / rejected_tokens - kept / kept_tokens) - 1.0,
    }[kind]
    expected = kept + 0.7 * kept_tokens * math.log1p(math.exp(-margin))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert int(tokens) == kept_tokens


@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_preference_term_is_left_out_without_pairs_and_in_validation(kind: PreferenceKind, build: Build) -> None:
    with_term, without = (build(k) for k in (kind, None))
    for objective in (with_term, without):
        objective.prepare(samples())
    unpaired = samples()[2:]
    torch.testing.assert_close(with_term.loss(unpaired), without.loss(unpaired))
    with torch.no_grad():
        torch.testing.assert_close(with_term.loss(samples()), without.loss(samples()))


@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_training_with_pairs_makes_kept_answers_likelier_than_rejected_ones(kind: PreferenceKind, build: Build) -> None:
    def margins(kind: PreferenceKind | None) -> list[float]:
        objective = build(kind, 5.0)
        paired = samples()[:2]
        objective.prepare(paired)
        optimizer = torch.optim.Adam(objective.module.parameters(), lr=0.02)
        for step in range(20):
            torch.manual_seed(step)
            optimizer.zero_grad()
            torch.autograd.backward(objective.loss(paired)[0])
            optimizer.step()
        answers = [(sample, sample.target or "", text) for sample in paired for text in sample.rejected]
        return [nll(objective, s, bad)[0] - nll(objective, s, good)[0] for s, good, bad in answers]

    assert all(with_term > without for with_term, without in zip(margins(kind), margins(None), strict=True))


def test_every_rejected_answer_is_drawn(llm: LanguageModel) -> None:
    preference = PreferenceLoss("simpo", llm, 1.0)
    torch.manual_seed(0)
    assert {preference.draw(samples()[0]) for _ in range(30)} == {"no it is not", "maybe"}
