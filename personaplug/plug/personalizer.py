"""Personalizer: applies a plug to histories. Training, evaluation, explanation and serving all use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from personaplug.data.records import HistoryItem, Options
from personaplug.encoders import Encoder
from personaplug.encoders.base import encode_items
from personaplug.encoders.embedding_store import Float16Array, RowIds
from personaplug.encoders.encoded_sample import (
    EncodedHistory,
    EncodedSample,
    kind_ids,
    label_ids,
    latest_items,
    no_style,
    style_of_answers,
)
from personaplug.encoders.item_parts import named_by_id
from personaplug.encoders.joint import only_part
from personaplug.errors import PartError
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.history_batch import HistoryBatch
from personaplug.plug.model import PersonaPlug


class Vectors(Protocol):
    width: int

    def gather(self, rows: RowIds) -> Float16Array:
        """Return the vectors of some rows, (n, width)."""


class SoftPrompter(Protocol):
    @property
    def placement(self) -> str: ...

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """Return the soft prompts of a batch, (B, S, D)."""


class Personalizer:
    """Make soft prompts with a plug, for samples whose item vectors are in `table`, or for one user's history."""

    def __init__(self, plug: PersonaPlug, *, table: Vectors | None = None, persona_scale: float = 1.0) -> None:
        self.plug, self.table, self.persona_scale = plug, table, persona_scale

    @property
    def placement(self) -> str:
        return self.plug.config.placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """Make the soft prompts of samples, (B, S, D), with gradients if they are enabled."""
        history = self.gather(samples) if self.plug.config.reads_history else None
        queries, options = [sample.query for sample in samples], [sample.options for sample in samples]
        soft: SoftPrompt = self.plug(queries, history, options=options, persona_scale=self.persona_scale)
        return soft

    def used_items(self, items: Sequence[HistoryItem]) -> list[HistoryItem]:
        """Return the items of a user that the plug uses: at most `max_history`, of kinds that the plug can read."""
        kinds = kind_ids(items)
        readable = self.plug.known_items(kinds)
        return [items[index] for index in readable[latest_items(kinds[readable], self.plug.config.max_history)]]

    def encode(self, items: Sequence[HistoryItem], *, encoder: Encoder) -> EncodedHistory:
        """Encode the items of a user that the plug uses; see `used_items`."""
        items = self.used_items(items)
        contents = [item.encoded(with_answer=self.plug.config.encodes_answers) for item in items]
        try:
            vectors = encode_items(encoder, contents) if contents else np.empty((0, encoder.width))
        except PartError as error:
            raise named_by_id(error, items) from None
        style = style_of_answers(items) if self.plug.config.reads_style else no_style(len(items))
        return EncodedHistory(
            vectors.astype(np.float16), label_ids(items, self.plug.spec.labels), style, kind_ids(items)
        )

    @torch.no_grad()
    def precompute(self, history: EncodedHistory) -> HistoryBatch:
        """Prepare a history of at most `max_history` items for any number of queries."""
        batch = self.collate(history)
        return batch if self.plug.persona is None else self.plug.persona.precompute(batch)

    @torch.no_grad()
    def persona(
        self,
        query: str,
        history: EncodedHistory | HistoryBatch,
        *,
        options: Options | None = None,
        persona_scale: float | None = None,
    ) -> SoftPrompt:
        """Make one user's soft prompt for a query, (1, S, D). `persona_scale` defaults to the personalizer's scale."""
        batch = self.collate(history) if isinstance(history, EncodedHistory) else history
        scale = self.persona_scale if persona_scale is None else persona_scale
        soft: SoftPrompt = self.plug([query], batch, options=[options], persona_scale=scale)
        return soft

    def collate(self, history: EncodedHistory, *, lengths: tuple[int, ...] | None = None) -> HistoryBatch:
        """Turn the history of one user, or of several with these `lengths`, into tensors on the plug's device."""
        device = self.plug.instruction.device
        style = history.style if self.plug.config.reads_style else no_style(len(history))
        # torch takes writable arrays; the read-only arrays of a store are copied.
        vectors, style = (np.require(array, requirements=["C", "W"]) for array in (history.vectors, style))
        return HistoryBatch(
            self._read_parts(torch.from_numpy(vectors)).to(device),
            (len(history),) if lengths is None else lengths,
            torch.from_numpy(history.label_ids.astype(np.int64)).to(device),
            torch.from_numpy(style).to(device),
            torch.from_numpy(history.kind_ids.astype(np.int64)).to(device),
        )

    def _read_parts(self, vectors: Tensor) -> Tensor:
        """Return (M, E) vectors with the parts that the plug reads."""
        part = self.plug.config.item_parts
        return vectors if part == "all" else only_part(vectors, self.plug.spec.encoder, part)

    def gather(self, samples: Sequence[EncodedSample]) -> HistoryBatch:
        """Collect the vectors of the items that the plug uses, at most `max_history` per sample."""
        assert self.table is not None, "samples refer to a vector table"
        limit = self.plug.config.max_history
        if not self.plug.training:  # training learns all kinds
            samples = [self._with_known_items(sample) for sample in samples]
        samples = [sample if len(sample.rows) <= limit else sample.latest(limit) for sample in samples]
        history = EncodedHistory(
            self.table.gather(np.concatenate([sample.rows for sample in samples])),
            np.concatenate([sample.label_ids for sample in samples]),
            np.concatenate([sample.style for sample in samples]),
            np.concatenate([sample.kind_ids for sample in samples]),
        )
        return self.collate(history, lengths=tuple(len(sample.rows) for sample in samples))

    def _with_known_items(self, sample: EncodedSample) -> EncodedSample:
        if not sample.kind_ids.any():  # all items are answers, which every plug can read
            return sample
        return sample.with_items_of(sample, self.plug.known_items(sample.kind_ids))
