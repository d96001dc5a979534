"""Identification by likelihood: ranks by hand from single passes, the same draws for all rows, one read per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from personaplug.analysis.identification_metrics import IdentifiedPersona
from personaplug.analysis.metric_base import value_of
from personaplug.analysis.ranking import expected_reciprocal_rank
from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.llm.base import LanguageModel, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.methods.base import ModelInputs
from personaplug.methods.context import Assignment
from personaplug.methods.identification import STRANGERS, drawn_samples, drawn_strangers, identification

NO_ITEMS = np.empty(0, dtype=np.int64)
USERS = 6
TARGETS = ["red", "a blue one", "green", "no", "white sky", "x"]


def _sample(user: int, persona: int) -> EncodedSample:
    """Return a sample whose only item is the row `persona` of a table."""
    rows, none = np.array([persona]), np.full(1, -1, np.int16)
    name, prompt = f"u{user}", f"question {user} " * (1 + user % 3)
    return EncodedSample(name, name, name, prompt, prompt, TARGETS[user], rows, none, no_style(1), all_answers(1))


SAMPLES = [_sample(user, user) for user in range(USERS)]


class SoftPromptOfItems:
    """Soft tokens that depend only on the item of a sample."""

    def __init__(self, llm: LanguageModel, placement: str) -> None:
        self.llm, self.placement = llm, placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        drawn = [
            torch.randn(2, self.llm.identity.width, generator=torch.Generator().manual_seed(int(s.rows[0])))
            for s in samples
        ]
        return SoftPrompt(torch.stack(drawn) * self.llm.embedding_scale, placement=self.placement)


@dataclass
class Row:
    """A row on a small context, without a run."""

    llm: LanguageModel
    samples: int = USERS

    @property
    def context(self) -> Any:
        config = SimpleNamespace(identification_samples=self.samples, draw_seed=0, evaluation_batch_size=4)
        items = [np.arange(1)] * USERS
        models, owners = SimpleNamespace(llm=self.llm), [sample.owner for sample in SAMPLES]
        return SimpleNamespace(config=config, samples=SAMPLES, owners=owners, shown_items=items, models=models)

    def build(self, assignments: Sequence[Assignment]) -> ModelInputs:
        samples = [
            sample if a.source is None else replace(sample, rows=SAMPLES[a.source].rows)
            for sample, a in zip(SAMPLES, assignments, strict=True)
        ]
        return ModelInputs(samples, assignments)

    def ranks(self, prompter: Any, *, sources: Sequence[int] = range(USERS)) -> list[float | None]:
        inputs = self.build([Assignment(source, np.arange(1)) for source in sources])
        ranks = identification(self.context, inputs, build=self.build, prompter=prompter)
        assert ranks is not None
        return ranks


def _by_hand(llm: LanguageModel, prompter: Any) -> list[float | None]:
    """Return the ranks from one pass for each persona."""

    def score(sample: EncodedSample) -> float:
        loss, _ = llm.loss(PromptBatch([sample.prompt], prompter.soft_prompt([sample])), [sample.target or ""])
        return -float(loss)

    ranks: list[float | None] = []
    own, owners = [Assignment(k, NO_ITEMS) for k in range(USERS)], [s.owner for s in SAMPLES]
    strangers = drawn_strangers(owners, own, chosen=range(USERS), seed=0)
    for index, sample in enumerate(SAMPLES):
        scores = [score(s) for s in (sample, *(replace(sample, rows=SAMPLES[k].rows) for k in strangers[index]))]
        ranks.append(expected_reciprocal_rank(np.array(scores), 0))
    return ranks


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_ranks_equal_those_of_single_passes(toy: CausalLM, placement: str) -> None:
    prompter = SoftPromptOfItems(toy, placement)
    ranks = Row(toy).ranks(prompter)
    assert ranks == _by_hand(toy, prompter)
    assert len({*ranks}) > 2


def test_only_the_drawn_samples_are_measured(toy: CausalLM) -> None:
    prompter = SoftPromptOfItems(toy, "suffix")
    few, all_of_them = Row(toy, samples=2).ranks(prompter), Row(toy).ranks(prompter)
    chosen = drawn_samples(USERS, limit=2, seed=0)
    assert [index for index, rank in enumerate(few) if rank is not None] == chosen
    assert [few[index] for index in chosen] == [all_of_them[index] for index in chosen]
    statistics = IdentifiedPersona().of_ranks(few)
    assert statistics is not None
    mean_rank = sum(rank for rank in few if rank is not None) / len(chosen)
    assert value_of(statistics, IdentifiedPersona()) == pytest.approx(mean_rank)
    assert IdentifiedPersona().of_ranks([None] * USERS) is None


def test_equal_personas_are_at_the_chance_level(toy: CausalLM) -> None:
    class Constant(SoftPromptOfItems):
        def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
            return super().soft_prompt([SAMPLES[0]] * len(samples))

    candidates = np.arange(1, USERS)  # four strangers and the own persona
    for persona in Row(toy).ranks(Constant(toy, "suffix")):
        assert persona == pytest.approx(np.mean(1 / candidates))


@pytest.mark.parametrize("placement", ["prefix", "suffix", "none"])
def test_prompt_is_read_once_for_all_suffix_personas(
    toy: CausalLM, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, compute = [], toy.prompt_states.compute

    def counted(prompts: Any, *arguments: Any, **more: Any) -> Any:
        reads.extend(prompts)
        return compute(prompts, *arguments, **more)

    monkeypatch.setattr(toy.prompt_states, "compute", counted)
    toy.clear_cache()
    Row(toy).ranks(None if placement == "none" else SoftPromptOfItems(toy, placement))
    assert len(reads) == (USERS if placement == "suffix" else 0)
    toy.clear_cache()


def test_strangers_are_other_users_and_the_same_for_all_rows() -> None:
    owners = [f"u{index % 30}" for index in range(60)]
    own = [Assignment(index, NO_ITEMS) for index in range(60)]
    chosen = range(60)
    strangers = drawn_strangers(owners, own, chosen=chosen, seed=0)
    assert strangers == drawn_strangers(owners, own, chosen=chosen, seed=0)
    assert strangers != drawn_strangers(owners, own, chosen=chosen, seed=1)
    assert drawn_strangers(owners, own, chosen=[7, 30], seed=0) == {7: strangers[7], 30: strangers[30]}
    wrong = [Assignment(strangers[index][3], NO_ITEMS) for index in chosen]
    of_wrong = drawn_strangers(owners, wrong, chosen=chosen, seed=0)
    for index, drawn in strangers.items():
        others = of_wrong[index]
        assert len(drawn) == len(others) == STRANGERS
        assert len({owners[index], *(owners[other] for other in drawn)}) == STRANGERS + 1
        assert len({*drawn} & {*others}) == STRANGERS - 1
        assert not {owners[index], owners[drawn[3]]} & {owners[other] for other in others}


def test_few_users_have_few_strangers() -> None:
    assignments = [Assignment(index, NO_ITEMS) for index in range(4)]
    strangers = drawn_strangers(["a", "b", "c", "d"], assignments, chosen=range(4), seed=0)
    assert [len(drawn) for drawn in strangers.values()] == [2] * 4
    assert drawn_strangers(["a", "b", "a", "b"], assignments, chosen=[0, 2], seed=0) == {0: [], 2: []}
