"""Personalizer: (user, query) to soft prompt. The one path for training, evaluation and generation alike.

It knows histories, vectors and a plug, and no language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from personaplug.encoder import Encoder
from personaplug.plug import HistoryBatch, PersonaPlug
from personaplug.records import HistoryItem
from personaplug.samples import EncodedSample, answer_places, nearest
from personaplug.soft_prompt import SoftPrompt
from personaplug.vectors import Halves, Rows


class Vectors(Protocol):
    """What item vectors are taken from.

    Attributes:
        width: values in a vector (E).
    """

    width: int

    def gather(self, rows: Rows) -> Halves:
        """Return the vectors of some rows, (n, E)."""
        ...


class SoftPrompter(Protocol):
    """Whatever makes soft tokens for samples."""

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """Soft tokens, (B, S, D)."""
        ...


class Personalizer:
    """Makes soft prompts with one plug.

    Args:
        plug: the plug itself.
        table: where the vectors of encoded samples are.
    """

    def __init__(self, plug: PersonaPlug, *, table: Vectors | None = None) -> None:
        self.plug, self.table = plug, table

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """Soft tokens for samples whose items are rows of the table; (B, I + K, D), with gradients if enabled."""
        history = self.gather(samples) if self.plug.config.persona_tokens else None
        soft: SoftPrompt = self.plug([sample.query for sample in samples], history)
        return soft

    def gather(self, samples: Sequence[EncodedSample]) -> HistoryBatch:
        """Collect the samples' item vectors, padded to the longest history of the batch.

        The latest `max_history` items are used.
        """
        assert self.table is not None, "samples refer to a vector table"
        limit = self.plug.config.max_history
        rows = [sample.rows[-limit:] for sample in samples]
        answers = [sample.answers[-limit:] for sample in samples]
        vectors = self.table.gather(np.concatenate(rows)) if rows else np.empty((0, self.table.width), np.float16)
        return self._pad(vectors, lengths=[len(row) for row in rows], answers=np.concatenate(answers))

    @torch.no_grad()
    def persona(self, query: str, items: Sequence[HistoryItem], *, encoder: Encoder) -> SoftPrompt:
        """Soft tokens for one query and a history given as items, encoded on the spot; (1, I + K, D)."""
        items = items[-self.plug.config.max_history :]
        texts = [item.text if self.plug.config.answers == "text" else item.content for item in items]
        vectors = encoder.encode(texts).astype(np.float16) if texts else np.empty((0, encoder.width), np.float16)
        if (count := self.plug.config.selected_items) and len(items) > count:
            kept = nearest(encoder.query_encoder().encode([query])[0], vectors, count=count)
            items, vectors = [items[place] for place in kept], vectors[kept]
        answers = answer_places(items, self.plug.fitting.labels)
        soft: SoftPrompt = self.plug([query], self._pad(vectors, lengths=[len(items)], answers=answers))
        return soft

    def _pad(self, vectors: np.ndarray, *, lengths: Sequence[int], answers: np.ndarray) -> HistoryBatch:
        """Lay (Σ lengths, E) rows out as (B, N, E), N = the longest, at least 1."""
        device = self.plug.instruction.device
        counts = torch.tensor(lengths)
        mask = torch.arange(max([1, *lengths]))[None, :] < counts[:, None]
        padded = torch.zeros(*mask.shape, vectors.shape[1])
        padded[mask] = torch.from_numpy(np.ascontiguousarray(vectors)).float()
        which: Tensor = torch.full(mask.shape, -1, dtype=torch.int64)
        which[mask] = torch.from_numpy(answers.astype(np.int64))
        return HistoryBatch(padded.to(device), mask.to(device), which.to(device))
