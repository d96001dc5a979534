"""Prompts with texts of a history in them, as a row of a table or a training wants them: retrieved items, a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from personaplug.baselines.history_prompt import HistoryWriter, Written
from personaplug.baselines.retrievers import Dense, Retriever, open_retriever
from personaplug.baselines.ropg import RopgRetriever
from personaplug.baselines.user_profiles import Profile, Profiles
from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.methods import Retrieval
from personaplug.run import Models, Run


class PromptBuilder:
    """Puts texts of histories into prompts, for one run.

    Args:
        run: whose task, settings and trained retriever are used.
        models: the encoder ranks items, the language model writes profiles and counts tokens.
        table: where item vectors are.
    """

    def __init__(self, run: Run, models: Models, *, table: EmbeddingStore) -> None:
        self.run, self.models, self.table = run, models, table
        settings = run.config.retrieval
        self.writer = HistoryWriter(run.task, models.llm, history_tokens=settings.history_tokens)
        half = settings.history_tokens // 2 or models.llm.max_text_tokens // 3
        self.short = HistoryWriter(run.task, models.llm, history_tokens=half)
        self._retrievers: dict[tuple[str, int], Retriever] = {}

    @cached_property
    def profiles(self) -> Profiles:
        """The run's profiles; those on disk are read when the first row asks."""
        return Profiles(
            self.run.folder / "profiles.jsonl",
            task=self.run.task,
            llm=self.models.llm,
            config=self.run.config.retrieval,
        )

    def retrieved(self, sample: Sample, retrieval: Retrieval, *, seed: int) -> Sample:
        """The sample with the best items of its own history in its prompt; what trainings are shown."""
        written = self.written(sample, sample.history, retrieval=retrieval, seed=seed)
        return replace(sample, prompt=written.prompt, soft_at=written.soft_at)

    def written(
        self,
        sample: Sample,
        items: Sequence[HistoryItem],
        *,
        retrieval: Retrieval | None,
        profile: Profile | None = None,
        seed: int,
    ) -> Written:
        """The sample's prompt with the best of these items in it, behind a profile if one is given.

        Args:
            items: a history, the user's own or a stranger's.
            retrieval: None = no items.
            profile: what was written of the user; None = none.
            seed: of drawn items, and of the training of a learned retriever.
        """
        writer = self.writer if profile is None else self.short
        shown = writer.write(sample.prompt, self._best(sample, items, retrieval, seed=seed))
        if profile is None:
            return shown
        noted = writer.write_note(shown.prompt, profile.text, soft_at=shown.soft_at)
        # The profile stands for the items that it was written from; where it is left out, so are they.
        seen, cut = (profile.written, profile.shortened) if noted.written else (0, 0)
        return Written(
            noted.prompt,
            noted.soft_at,
            offered=shown.offered + profile.offered,
            written=shown.written + seen,
            shortened=shown.shortened + cut,
        )

    def retriever(self, method: str, *, seed: int) -> Retriever:
        """The retriever of that name; a learned one is that of the seed's training.

        Raises:
            MissingData: if it has not been trained.
        """
        key = (method, seed if method in ("random", "ropg") else 0)
        if key not in self._retrievers:
            self._retrievers[key] = self._opened(method, seed=seed)
        return self._retrievers[key]

    def _opened(self, method: str, *, seed: int) -> Retriever:
        encoder, with_answer = self.models.encoder, self.run.config.plug.encodes_answers
        if method != "ropg":
            return open_retriever(method, seed=seed, encoder=encoder, table=self.table, with_answer=with_answer)
        learned = RopgRetriever.load(self.run.plug_folder("ropg", seed=seed), width=encoder.width)

        @torch.no_grad()
        def mapped(queries: np.ndarray) -> np.ndarray:
            return learned(torch.from_numpy(queries)).numpy()  # type: ignore[no-any-return]

        return Dense(encoder, self.table, with_answer=with_answer, head=mapped)

    def _best(
        self, sample: Sample, items: Sequence[HistoryItem], retrieval: Retrieval | None, *, seed: int
    ) -> list[HistoryItem]:
        if retrieval is None or not items:
            return []
        ranked = self.retriever(retrieval.method, seed=seed).rank(replace(sample, history=tuple(items)))
        return [items[place] for place in ranked[: retrieval.items]]
