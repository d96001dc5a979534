"""User profiles: the frozen model describes a user from the history, once per history.

Source of the row: Richardson et al., "Integrating Summarization and Retrieval for Enhanced Personalization via Large
Language Models" (PAG), arXiv 2310.20081. The request's wording is ours.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from personaplug.baselines.history_prompt import HistoryPromptFormatter
from personaplug.config import RetrievalConfig
from personaplug.data.records import HistoryItem, characters
from personaplug.data.task import Task
from personaplug.infra.atomic_io import JsonLines
from personaplug.infra.progress import Progress
from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch

_REQUEST = (
    "These are things that one person wrote or chose. In one or two short sentences, describe this person's interests, "
    "tastes and manner of judging or writing."
)
_BATCH_SIZE = 8


@dataclass(frozen=True, repr=False)
class UserProfile:
    """A description of one history.

    Attributes:
        key: hash of the history, the model and the request.
        seconds: duration of its batch, divided by the number of profiles in it.
        offered, included, shortened: numbers of the history's items in the request; see `HistoryPrompt`.
    """

    key: str
    text: str
    seconds: float
    offered: int
    included: int
    shortened: int


class ProfileGenerator:
    """Generates profiles with the frozen model, and caches them as JSON lines.

    The lines contain texts that were generated from users' histories.
    """

    def __init__(self, path: Path, *, task: Task, llm: LanguageModel, config: RetrievalConfig) -> None:
        self.lines, self.llm, self.config = JsonLines(path), llm, config
        # The request stands after the items, whatever the task's wording.
        task = replace(task, history_after="", history_template="{history}. {input}")
        if task.kind == "chat":
            task = replace(task, answer_field=None)  # answers of conversations are long, so they may be cut
        self.formatter = HistoryPromptFormatter(task, llm)
        self.profiles = {values["key"]: UserProfile(**values) for values in self.lines}

    def generate(self, histories: Sequence[Sequence[HistoryItem]]) -> list[UserProfile]:
        """Return one profile per history, rejected answers left out; the profile of an empty history has no text."""
        histories = [[item for item in items if item.kind != "rejection"] for items in histories]
        keys = [self._key(items) for items in histories]
        by_key = zip(keys, histories, strict=True)
        self._generate_missing({key: items for key, items in by_key if items and key not in self.profiles})
        empty = UserProfile("", "", 0.0, offered=0, included=0, shortened=0)
        return [self.profiles[key] if items else empty for key, items in zip(keys, histories, strict=True)]

    def _generate_missing(self, histories: Mapping[str, Sequence[HistoryItem]]) -> None:
        config = GenerationConfig(max_new_tokens=self.config.profile_tokens)
        # Latest items first, because the formatter drops the last ones if room is short.
        requests = {key: self.formatter.format(_REQUEST, items[::-1]) for key, items in histories.items()}
        longest_first = sorted(requests, key=lambda key: -characters(requests[key].prompt))
        with Progress("profiles", total=len(requests), unit="profiles") as progress:
            for start in range(0, len(requests), _BATCH_SIZE):
                keys = longest_first[start : start + _BATCH_SIZE]
                began = time.monotonic()
                generations = self.llm.generate(PromptBatch([requests[key].prompt for key in keys]), config)
                seconds = round((time.monotonic() - began) / len(keys), 4)
                for key, generation in zip(keys, generations, strict=True):
                    text, request = " ".join(generation.text.split()), requests[key]
                    counts = request.offered, request.included, request.shortened
                    self.profiles[key] = UserProfile(key, text, seconds, *counts)
                    self.lines.append(asdict(self.profiles[key]))
                progress.advance(len(keys))

    def _key(self, items: Sequence[HistoryItem]) -> str:
        settings = [self.llm.identity.fingerprint, self.llm.dtype, _REQUEST, self.config.profile_tokens]
        texts = [item.text for item in items]
        return hashlib.sha256(json.dumps([*settings, texts]).encode()).hexdigest()[:32]
