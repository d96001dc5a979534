"""Profiles in words: what the frozen model writes of a user, from the history, once per history.

Source of the row: Richardson et al., "Integrating Summarization and Retrieval for Enhanced Personalization via Large
Language Models" (PAG), arXiv 2310.20081. The request's wording is ours.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from personaplug.baselines.history_prompt import HistoryWriter
from personaplug.config import RetrievalConfig
from personaplug.data.records import HistoryItem
from personaplug.data.task import Task
from personaplug.infra.atomic_io import JsonLines
from personaplug.infra.progress import Progress
from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch

_REQUEST = (
    "These are things that one person wrote or chose. In one or two short sentences, describe this person's interests, "
    "tastes and manner of judging or writing."
)
_AT_ONCE = 8


@dataclass(frozen=True, repr=False)
class Profile:
    """What was written of one history.

    Attributes:
        key: of the history, the model and the request.
        text: the profile.
        seconds: its share of the time that its batch took.
        offered, written, shortened: what became of the history's items in the request; as in `Written`.
    """

    key: str
    text: str
    seconds: float
    offered: int
    written: int
    shortened: int


class Profiles:
    """Writes profiles and keeps them.

    Args:
        path: JSON lines; texts made from users' histories stand in it.
        task: how items are written.
        backend: the frozen model.
        config: how long a profile may be.
    """

    def __init__(self, path: Path, *, task: Task, llm: LanguageModel, config: RetrievalConfig) -> None:
        self.lines, self.llm, self.config = JsonLines(path), llm, config
        # The request follows the items, whatever place the task's own prompts give them.
        self.writer = HistoryWriter(replace(task, history_after="", history_template="{history}. {input}"), llm)
        self.known = self._kept()

    def of(self, histories: Sequence[Sequence[HistoryItem]]) -> list[Profile]:
        """A profile per history, in order; an empty text for an empty history."""
        keys = [self._key(items) for items in histories]
        missing = {key: items for key, items in zip(keys, histories, strict=True) if key not in self.known and items}
        self._write(missing)
        nobody = Profile("", "", 0.0, offered=0, written=0, shortened=0)
        return [self.known[key] if items else nobody for key, items in zip(keys, histories, strict=True)]

    def _write(self, missing: dict[str, Sequence[HistoryItem]]) -> None:
        wanted = GenerationConfig(max_new_tokens=self.config.profile_tokens)
        # The latest items first: they are the last to be dropped where room is short.
        asked = {key: self.writer.write(_REQUEST, items[::-1]) for key, items in missing.items()}
        order = sorted(asked, key=lambda key: -len(asked[key].prompt))
        with Progress("profiles", total=len(order), unit="profiles") as progress:
            for start in range(0, len(order), _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                began = time.monotonic()
                made = self.llm.generate(PromptBatch([asked[key].prompt for key in part]), wanted)
                each = (time.monotonic() - began) / len(part)
                for key, generation in zip(part, made, strict=True):
                    seen = asked[key]
                    self.known[key] = Profile(
                        key,
                        " ".join(generation.text.split()),
                        round(each, 4),
                        offered=seen.offered,
                        written=seen.written,
                        shortened=seen.shortened,
                    )
                    self.lines.append(asdict(self.known[key]))
                progress.advance(len(part))

    def _kept(self) -> dict[str, Profile]:
        kept = [Profile(**values) for values in self.lines.read()]
        return {profile.key: profile for profile in kept}

    def _key(self, items: Sequence[HistoryItem]) -> str:
        about = [self.llm.identity.fingerprint, self.llm.dtype, _REQUEST, self.config.profile_tokens]
        texts = [item.text for item in items]
        return hashlib.sha256(json.dumps([*about, texts]).encode()).hexdigest()[:32]
