"""What a row shows the models: samples with the histories lent to them and the prompts it asks, and what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from personaplug.baselines.history_prompt import HistoryPrompt
from personaplug.baselines.prompt_builder import PromptBuilder
from personaplug.baselines.user_profiles import UserProfile
from personaplug.config import EvaluationConfig, PlugConfig
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Reader
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, past_answers, with_nearest
from personaplug.evaluation.controls import Lent, items_lent, lend, rows_lent
from personaplug.evaluation.user_costs import Cost
from personaplug.llm.base import Measure
from personaplug.methods import Condition
from personaplug.run import Models, Run, drawn


@dataclass(frozen=True)
class Shown:
    """The samples of one row with one seed.

    Attributes:
        samples: with the items that the plug sees, and the prompts that are asked.
        lenders: (n,) the sample whose history each was shown; None = nobody's.
        measures: the prompts' sizes.
        written: what became of the items meant for the prompts; None where none are.
        cost: of what was written of the users, if anything.
    """

    samples: list[EncodedSample]
    lenders: list[int | None]
    measures: list[Measure]
    written: list[HistoryPrompt] | None = None
    cost: Cost | None = None

    def items(self) -> list[int]:
        """How many items of a history each sample is shown something of."""
        if self.written is not None:
            return [one.included for one in self.written]
        return [len(sample.rows) for sample in self.samples]

    def cut_rate(self) -> float | None:
        """Share of the items meant for prompts that were shortened or left out; None where none are meant."""
        if self.written is None:
            return None
        offered = sum(one.offered for one in self.written)
        return sum(one.shortened + one.offered - one.included for one in self.written) / offered if offered else 0.0


class Showing:
    """Shows the samples of a split, row by row.

    Attributes:
        samples: as they are, with their own histories.
    """

    def __init__(
        self, run: Run, reader: Reader, *, models: Models, table: EmbeddingStore, config: EvaluationConfig
    ) -> None:
        self.run, self.reader, self.models, self.table, self.config = run, reader, models, table, config
        self.samples = run.read_samples(reader, table, limit=config.limit, seed=config.draw_seed)
        self.owners = [sample.owner for sample in self.samples]
        self.bare = models.llm.measure([sample.prompt for sample in self.samples])
        self.prompts = PromptBuilder(run, models, table=table)
        self._texts: list[Sample] | None = None
        self._read = {run.config.plug.answer_channel: self.samples}

    def show(self, condition: Condition, *, seed: int) -> Shown:
        """The samples as a row shows them; its random draws come from the seed."""
        own = self.run.config.plug
        plug = condition.trained.plug(own) if condition.trained else own
        lent = self._lend(condition, [len(sample.rows) for sample in self.samples], seed=seed)
        # Nearest to the query that is asked, whoever's the items are: else a stranger's would be the less to the point.
        samples = with_nearest(rows_lent(self._read_by(plug), lent), self.table, count=plug.selected_items)
        if condition.persona == "random-vectors":
            samples = [
                replace(sample, answers=np.full_like(sample.answers, -1), forms=np.zeros_like(sample.forms))
                for sample in samples
            ]
        if condition.phrases and self.config.persona_scale:  # at 0 it is the plain model
            both = zip(samples, self._items(condition, seed=seed), strict=True)
            latest = own.max_history
            samples = [replace(sample, own_answers=past_answers(items, latest=latest)) for sample, items in both]
        lenders = [one.lender for one in lent]
        if not condition.in_words:
            return Shown(samples, lenders, self.bare)
        written, profiles = self._written(condition, seed=seed)
        samples = [
            replace(sample, prompt=one.prompt, soft_at=one.soft_at)
            for sample, one in zip(samples, written, strict=True)
        ]
        measures = self.models.llm.measure([sample.prompt for sample in samples])
        return Shown(samples, lenders, measures, written, _cost(profiles))

    def _read_by(self, plug: PlugConfig) -> list[EncodedSample]:
        """The samples as a plug reads their items; read anew where the run's own reads them otherwise."""
        if plug.answer_channel not in self._read:
            limit, seed = self.config.limit, self.config.draw_seed
            self._read[plug.answer_channel] = self.run.read_samples(
                self.reader, self.table, limit=limit, seed=seed, plug=plug
            )
        return self._read[plug.answer_channel]

    def lent(self, condition: Condition, *, seed: int) -> list[Sample]:
        """The samples, texts and all, with the histories that a row lends them; the same draw as in `show`."""
        items = self._items(condition, seed=seed)
        return [replace(text, history=shown) for text, shown in zip(self.texts(), items, strict=True)]

    def texts(self) -> list[Sample]:
        """The samples with their histories' texts, which are only held where a row needs them."""
        if self._texts is None:
            self._texts = list(drawn(self.reader, limit=self.config.limit, seed=self.config.draw_seed))
        return self._texts

    def _lend(self, condition: Condition, sizes: Sequence[int], *, seed: int) -> list[Lent]:
        draw = self.config.draw_seed + seed
        return lend(condition.history, self.owners, sizes, seed=draw, latest=self.config.max_eval_history)

    def _items(self, condition: Condition, *, seed: int) -> list[tuple[HistoryItem, ...]]:
        texts = self.texts()
        return items_lent(texts, self._lend(condition, [len(text.history) for text in texts], seed=seed))

    def _written(self, condition: Condition, *, seed: int) -> tuple[list[HistoryPrompt], list[UserProfile]]:
        texts, items = self.texts(), self._items(condition, seed=seed)
        profiles = self.prompts.profiles.generate(items) if condition.profile else None
        prompts = self.prompts.build(texts, items, retrieval=condition.retrieval, profiles=profiles, seed=seed)
        return prompts, profiles or []


def _cost(profiles: Sequence[UserProfile]) -> Cost | None:
    if not profiles:
        return None
    sizes = [len(profile.text.encode()) for profile in profiles]
    return Cost(float(np.mean(sizes)), float(np.mean([profile.seconds for profile in profiles])))
