"""Prompts of a run with retrieved items, stated preferences, a profile, for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property

from personaplug.baselines.conversation_prompt import open_formatter
from personaplug.baselines.history_prompt import HistoryFormatter, HistoryPrompt
from personaplug.baselines.retrievers import (
    BM25Retriever,
    DenseRetriever,
    RandomRetriever,
    RecencyRetriever,
    Retrieval,
    Retriever,
    rank_answers,
)
from personaplug.baselines.ropg import RopgRetriever
from personaplug.baselines.user_profiles import ProfileGenerator, UserProfile
from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.errors import ConfigError, nearest
from personaplug.run import Models, Run

RETRIEVERS = ("bm25", "recency", "dense", "random", "ropg")
SEEDED_RETRIEVERS = ("random", "ropg")  # their rankings differ between seeds


class PromptBuilder:
    """Builds the prompts with history texts of one run; `table` has the items' embeddings."""

    def __init__(self, run: Run, models: Models, *, table: EmbeddingStore) -> None:
        self.run, self.models, self.table = run, models, table
        history_tokens = run.config.retrieval.history_tokens
        self.formatter = open_formatter(run.task, models.llm, history_tokens=history_tokens)
        half = history_tokens // 2 or models.llm.max_text_tokens // 3
        self._half_formatter = open_formatter(run.task, models.llm, history_tokens=half)
        self._retriever = cache(self._open_retriever)

    @cached_property
    def profiles(self) -> ProfileGenerator:
        path = self.run.folder / "profiles.jsonl"
        return ProfileGenerator(path, task=self.run.task, llm=self.models.llm, config=self.run.config.retrieval)

    def with_retrieved(self, sample: Sample, retrieval: Retrieval, *, seed: int) -> Sample:
        """Return a training sample with the best items of its own history in its prompt."""
        (built,) = self.build([sample], [sample.history], retrieval=retrieval, seed=seed)
        return sample.with_prompt(built.prompt, soft_at=built.soft_at)

    def build(
        self,
        samples: Sequence[Sample],
        histories: Sequence[Sequence[HistoryItem]],
        *,
        retrieval: Retrieval | None,
        profiles: Sequence[UserProfile] | None = None,
        states: bool = False,
        seed: int,
    ) -> list[HistoryPrompt]:
        """Return each sample's prompt with the best items of a history and, if asked for, preferences and a profile.

        Args:
            histories: one per sample, the user's own or another user's.
            retrieval: None = no items.
            profiles: one per history.
            states: whether the stated preferences of the history are in the prompt.
            seed: seed of random items, and of the training of a learned retriever.
        """
        shares_limit = states and retrieval is not None and self.formatter.history_tokens > 0
        formatter = self.formatter if profiles is None and not shares_limit else self._half_formatter
        best_items = self._best_items(samples, histories, retrieval, seed=seed)
        preferences = [_preferences(items) if states else [] for items in histories]
        parts = zip(samples, preferences, best_items, strict=True)
        prompts = [_build(formatter, s, preferences=stated, items=items) for s, stated, items in parts]
        if profiles is None:
            return prompts
        return [_with_profile(p, profile, formatter) for p, profile in zip(prompts, profiles, strict=True)]

    def retriever(self, method: str, *, seed: int) -> Retriever:
        """Return the retriever of that name; `ropg` must be trained with this seed."""
        return self._retriever(method, seed if method in SEEDED_RETRIEVERS else 0)

    def _open_retriever(self, method: str, seed: int) -> Retriever:
        encoder, with_answer = self.models.encoder, self.run.config.plug.encodes_answers
        match method:
            case "bm25":
                return BM25Retriever()
            case "recency":
                return RecencyRetriever()
            case "random":
                return RandomRetriever(seed)
            case "dense":
                return DenseRetriever(encoder, self.table, with_answer=with_answer)
            case "ropg":
                learned = RopgRetriever.load(self.run.plug_folder("ropg", seed=seed), width=encoder.width)
                return DenseRetriever(encoder, self.table, with_answer=with_answer, head=learned.map_queries)
        raise ConfigError(f"There is no retriever {method!r}; {nearest(method, RETRIEVERS)}")

    def _best_items(
        self,
        samples: Sequence[Sample],
        histories: Sequence[Sequence[HistoryItem]],
        retrieval: Retrieval | None,
        *,
        seed: int,
    ) -> list[list[HistoryItem]]:
        if retrieval is None or not any(histories):
            return [[] for _ in samples]
        with_history = [replace(s, history=tuple(items)) for s, items in zip(samples, histories, strict=True)]
        rankings = rank_answers(self.retriever(retrieval.method, seed=seed), with_history)
        best = [ranking[: retrieval.items] for ranking in rankings]
        return [[items[index] for index in indices] for items, indices in zip(histories, best, strict=True)]


def _preferences(items: Sequence[HistoryItem]) -> list[HistoryItem]:
    return [item for item in items if item.kind == "preference"]


def _build(
    formatter: HistoryFormatter, sample: Sample, *, preferences: Sequence[HistoryItem], items: Sequence[HistoryItem]
) -> HistoryPrompt:
    stated = formatter.add_preferences(sample.full_prompt, preferences)
    return formatter.format(stated.prompt, items, soft_at=stated.soft_at).counting(stated)


def _with_profile(prompt: HistoryPrompt, profile: UserProfile, formatter: HistoryFormatter) -> HistoryPrompt:
    noted = formatter.add_note(prompt.prompt, profile.text, soft_at=prompt.soft_at)
    # A profile counts as the items that it was generated from, so without it these are not in the prompt.
    included, shortened = (profile.included, profile.shortened) if noted.included else (0, 0)
    of_profile = replace(noted, offered=profile.offered, included=included, shortened=shortened)
    return of_profile.counting(prompt)
