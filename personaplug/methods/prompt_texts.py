"""Texts of a history in the prompt: retrieved items, stated preferences, a profile that the model wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from personaplug.baselines.history_prompt import HistoryPrompt
from personaplug.baselines.retrievers import Retrieval
from personaplug.baselines.user_profiles import UserProfile
from personaplug.data.records import HistoryItem
from personaplug.methods.base import ModelInputs
from personaplug.methods.context import EvalContext
from personaplug.methods.costs import UserCost
from personaplug.training.baseline_parts import ROPG
from personaplug.training.trainings import TrainedPart

_DENSE = ("dense", "ropg")


@dataclass(frozen=True)
class PromptTexts:
    """The texts of a history in the prompt.

    Attributes:
        retrieval: the retrieved items; None = no items.
        profile: whether the prompt has a profile of the user.
        stated: whether the prompt has the user's stated preferences.
    """

    retrieval: Retrieval | None = None
    profile: bool = False
    stated: bool = False

    @property
    def requires(self) -> tuple[TrainedPart, ...]:
        """The trained retriever, if `retrieval` needs one."""
        return (ROPG,) if self.retrieval is not None and self.retrieval.method == ROPG.name else ()

    @property
    def embeds_items(self) -> bool:
        """Whether a service must store the vectors of a user's items."""
        return self.retrieval is not None and self.retrieval.method in _DENSE

    @property
    def keeps_texts(self) -> bool:
        """Whether a service must store the texts of a user's items."""
        return self.retrieval is not None

    def added_to(self, inputs: ModelInputs, context: EvalContext, *, seed: int) -> ModelInputs:
        """Return the inputs with the texts in their prompts."""
        items = context.assigned_items(inputs.assignments)
        profiles = context.prompts.profiles.generate(items) if self.profile else None
        prompts = context.prompts.build(
            context.texts, items, retrieval=self.retrieval, profiles=profiles, states=self.stated, seed=seed
        )
        samples = [
            replace(sample, prompt=prompt.prompt, soft_at=prompt.soft_at)
            for sample, prompt in zip(inputs.samples, prompts, strict=True)
        ]
        return replace(
            inputs,
            samples=samples,
            prompt_lengths=context.models.llm.measure([sample.prompt for sample in samples]),
            items_used=[prompt.included for prompt in prompts],
            cut_items_rate=_cut_rate(prompts),
            user_cost=_profile_cost(profiles) if profiles else self._cost_of_preferences(items),
        )

    def _cost_of_preferences(self, histories: Sequence[Sequence[HistoryItem]]) -> UserCost | None:
        """Return the mean size of the stated preferences; None if the texts of all items are stored."""
        if not self.stated or self.keeps_texts:
            return None
        sizes = [sum(len(item.text.encode()) for item in items if item.kind == "preference") for items in histories]
        return UserCost(float(np.mean(sizes)))


def _cut_rate(prompts: list[HistoryPrompt]) -> float:
    """Return the share of the offered items that were shortened or left out."""
    offered = sum(prompt.offered for prompt in prompts)
    cut = sum(prompt.shortened + prompt.offered - prompt.included for prompt in prompts)
    return cut / offered if offered else 0.0


def _profile_cost(profiles: list[UserProfile]) -> UserCost:
    sizes = [len(profile.text.encode()) for profile in profiles]
    return UserCost(float(np.mean(sizes)), float(np.mean([profile.seconds for profile in profiles])))
