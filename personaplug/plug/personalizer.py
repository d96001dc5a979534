"""Personalizer: (user, query) to soft prompt. The one path for training, evaluation and generation alike.

It knows histories, vectors and a plug, and no language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from personaplug.data.records import HistoryItem, Options
from personaplug.encoders import Encoder
from personaplug.encoders.embedding_store import Float16Array, RowIds
from personaplug.encoders.encoded_sample import (
    EncodedHistory,
    EncodedSample,
    label_ids,
    nearest,
    no_style,
    style_of_answers,
)
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import HistoryBatch, PersonaPlug


class Vectors(Protocol):
    """What item vectors are taken from.

    Attributes:
        width: values in a vector (E).
    """

    width: int

    def gather(self, rows: RowIds) -> Float16Array:
        """Return the vectors of some rows, (n, E)."""
        ...


class SoftPrompter(Protocol):
    """Whatever makes soft tokens for samples."""

    @property
    def placement(self) -> str:
        """Where they stand; see `SoftPrompt`."""
        ...

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """Soft tokens, (B, S, D)."""
        ...


class Personalizer:
    """Makes soft prompts with one plug.

    Args:
        plug: the plug itself.
        table: where the vectors of encoded samples are.
        persona_scale: as `PersonaPlug.forward` takes it.
    """

    def __init__(self, plug: PersonaPlug, *, table: Vectors | None = None, persona_scale: float = 1.0) -> None:
        self.plug, self.table, self.persona_scale = plug, table, persona_scale

    @property
    def placement(self) -> str:
        """Where the plug's soft tokens stand."""
        return self.plug.config.placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """Soft tokens for samples whose items are rows of the table; (B, S, D), with gradients if enabled."""
        history = self.gather(samples) if self.plug.config.reads_history else None
        queries, options = [sample.query for sample in samples], [sample.options for sample in samples]
        soft: SoftPrompt = self.plug(queries, history, options=options, persona_scale=self.persona_scale)
        return soft

    def gather(self, samples: Sequence[EncodedSample]) -> HistoryBatch:
        """Collect the samples' item vectors, the latest `max_history` of each."""
        assert self.table is not None, "samples refer to a vector table"
        limit = self.plug.config.max_history
        vectors = self.table.gather(np.concatenate([sample.rows[-limit:] for sample in samples]))
        answers = np.concatenate([sample.answers[-limit:] for sample in samples])
        forms = np.concatenate([sample.forms[-limit:] for sample in samples])
        lengths = tuple(min(limit, len(sample.rows)) for sample in samples)
        return self.batch(EncodedHistory(vectors, answers, forms), lengths=lengths)

    def persona(
        self, query: str, items: Sequence[HistoryItem], *, encoder: Encoder, options: Options | None = None
    ) -> SoftPrompt:
        """Soft tokens for one query and a history given as items, encoded on the spot; (1, S, D).

        Args:
            options: what the prompt lets choose from, for a plug that compares that.
        """
        return self.of_history(query, self.encoded(items, encoder=encoder), options=options)

    def encoded(self, items: Sequence[HistoryItem], *, encoder: Encoder) -> EncodedHistory:
        """The latest `max_history` of some items, as the plug takes them."""
        items = items[-self.plug.config.max_history :]
        texts = [item.encoded(with_answer=self.plug.config.encodes_answers) for item in items]
        vectors = encoder.encode(texts).astype(np.float16) if texts else np.empty((0, encoder.width), np.float16)
        forms = style_of_answers(items) if self.plug.config.reads_forms else no_style(len(items))
        return EncodedHistory(vectors, label_ids(items, self.plug.spec.labels), forms)

    @torch.no_grad()
    def of_history(
        self, query: str, history: EncodedHistory, *, options: Options | None = None, persona_scale: float | None = None
    ) -> SoftPrompt:
        """Soft tokens for one query and a history that is encoded; (1, S, D).

        Args:
            history: at most `max_history` items.
            options: what the prompt lets choose from, for a plug that compares that.
            persona_scale: as the personalizer's own; None = that.
        """
        batch = self.batch(history, lengths=(len(history),))
        return self.of_read(query, batch, options=options, persona_scale=persona_scale)

    @torch.no_grad()
    def read(self, history: EncodedHistory) -> HistoryBatch:
        """A user's history, as far as it can be worked on before anything is asked.

        Args:
            history: at most `max_history` items.
        """
        return self.plug.read(self.batch(history, lengths=(len(history),)))

    @torch.no_grad()
    def of_read(
        self, query: str, history: HistoryBatch, *, options: Options | None = None, persona_scale: float | None = None
    ) -> SoftPrompt:
        """Soft tokens for one query and a history that is read; see `of_history`."""
        if self.plug.config.selected_items:
            places = self.selected(query, history.vectors.cpu().numpy())
            history = history.only(torch.from_numpy(places).to(history.vectors.device))
        persona_scale = self.persona_scale if persona_scale is None else persona_scale
        soft: SoftPrompt = self.plug([query], history, options=[options], persona_scale=persona_scale)
        return soft

    def selected(self, query: str, vectors: Float16Array) -> RowIds:
        """Places of the items that are used: all, or as many of the nearest to the query as the plug takes.

        Args:
            vectors: (n, E) of the items.
        """
        count = self.plug.config.selected_items
        if not count or len(vectors) <= count:
            return np.arange(len(vectors))
        return nearest(self.plug.frozen([query])[0].numpy(), vectors, count=count)

    def batch(self, histories: EncodedHistory, *, lengths: tuple[int, ...]) -> HistoryBatch:
        """Histories that lie one behind the other, as tensors; forms are left out for a plug that reads none."""
        device, forms = self.plug.instruction.device, histories.forms
        forms = forms if self.plug.config.reads_forms else no_style(len(forms))
        # What torch takes as it is; the arrays of a store cannot be written to, and are copied.
        vectors = torch.from_numpy(np.require(histories.vectors, requirements=["C", "W"]))
        answers = torch.from_numpy(histories.answers.astype(np.int64))
        written = torch.from_numpy(np.require(forms, requirements=["C", "W"]))
        return HistoryBatch(vectors.to(device), lengths, answers.to(device), written.to(device))
