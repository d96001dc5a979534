"""Personas of many rows: soft prompts of a batch, and the job that writes them as vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from personaplug.data.parquet_files import import_pyarrow
from personaplug.data.records import Content
from personaplug.encoders import Encoder
from personaplug.encoders.base import Vectors, encode_items
from personaplug.encoders.encoded_sample import EncodedHistory
from personaplug.errors import UserErased
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.offline.rows import Row
from personaplug.plug.personalizer import Personalizer

if TYPE_CHECKING:
    from personaplug.store.history_store import HistoryStore

T = TypeVar("T")
Result = dict[str, Any]
"""The columns of a row's result."""

_MAX_ITEMS = 20_000


class Histories(Protocol):
    """Where the histories of rows come from."""

    def read(self, rows: Sequence[Row]) -> list[EncodedHistory]:
        """Return the history of each row, as the plug uses it."""

    def confirmed(self, rows: Sequence[Row], work: Callable[[], T]) -> T:
        """Return the result of some work on these rows, without the history of a user who is erased meanwhile."""


class ItemHistories:
    """Histories in the rows themselves. Rows of a user share the vectors of equal texts."""

    def __init__(self, personalizer: Personalizer, encoder: Encoder) -> None:
        self._personalizer, self._vectors = personalizer, _ItemVectors(encoder)

    def read(self, rows: Sequence[Row]) -> list[EncodedHistory]:
        personalizer, with_answer = self._personalizer, self._personalizer.plug.config.encodes_answers
        items = [item for row in rows for item in personalizer.used_items(row.items)]
        self._vectors.add([item.encoded(with_answer=with_answer) for item in items])
        encoder: Any = self._vectors  # encodes the same texts, so that all rows need one call of the model
        return [personalizer.encode(row.items, encoder=encoder) for row in rows]

    def confirmed(self, rows: Sequence[Row], work: Callable[[], T]) -> T:
        # Rounding depends on the texts of a call. With an empty start, it does not depend on earlier shards.
        self._vectors.clear()
        return work()


class StoredHistories:
    """Histories in a store, as they are when a shard is computed."""

    def __init__(self, personalizer: Personalizer, store: HistoryStore, *, tenant: str) -> None:
        self._plug, self._store, self._tenant = personalizer.plug, store, tenant

    def read(self, rows: Sequence[Row]) -> list[EncodedHistory]:
        return [self._history(row.user or "") for row in rows]

    def confirmed(self, rows: Sequence[Row], work: Callable[[], T]) -> T:
        users = list(dict.fromkeys(row.user for row in rows if row.user is not None))
        while True:
            ticket = self._store.admit(self._tenant, *users)
            result = work()
            try:
                self._store.check(ticket)
            except UserErased:  # the next ticket includes the erasure
                continue
            return result

    def _history(self, user: str) -> EncodedHistory:
        history = self._store.load_history(self._tenant, user, latest=self._plug.config.max_history)
        return history.select(self._plug.known_items(history.kind_ids))


class Personas:
    """Makes the soft prompts of batches of rows."""

    def __init__(self, personalizer: Personalizer, histories: Histories) -> None:
        self.personalizer, self.histories = personalizer, histories

    @torch.no_grad()
    def soft_prompts(self, rows: Sequence[Row]) -> tuple[SoftPrompt, list[int]]:
        """Return the soft prompts, (B, S, D), and the number of items in each row's history."""
        histories = self.histories.read(rows)
        batch = self.personalizer.collate(_joined(histories), lengths=tuple(map(len, histories)))
        soft: SoftPrompt = self.personalizer.plug(
            [row.query.text for row in rows],
            batch,
            options=[row.query.options for row in rows],
            persona_scale=self.personalizer.persona_scale,
        )
        return soft, [len(history) for history in histories]


class PersonaWriter:
    """Computes the soft tokens of each row, and the label bias if the plug has one."""

    def __init__(self, personas: Personas, *, batch_size: int, dtype: str) -> None:
        self._personas, self._batch_size, self.dtype = personas, batch_size, dtype

    @property
    def fields(self) -> list[tuple[str, Any]]:
        """The names and Arrow types of the result's columns."""
        pyarrow, _ = import_pyarrow()
        plug = self._personas.personalizer.plug
        size = plug.config.soft_tokens * plug.spec.llm.width
        fields = [("items", pyarrow.int32()), ("soft_tokens", pyarrow.list_(pyarrow.float32(), size))]
        if plug.label_prior is not None:
            fields.append(("label_bias", pyarrow.list_(pyarrow.float32(), len(plug.spec.labels))))
        return fields

    @property
    def about(self) -> dict[str, Any]:
        """Facts for readers of the columns."""
        plug = self._personas.personalizer.plug
        return {
            "soft_tokens": [plug.config.soft_tokens, plug.spec.llm.width],
            "placement": plug.config.placement,
            "labels": list(plug.spec.labels),
        }

    def results(self, rows: Sequence[Row]) -> list[Result]:
        """Return the result of each row."""
        return self._personas.histories.confirmed(rows, lambda: self._results(rows))

    def _results(self, rows: Sequence[Row]) -> list[Result]:
        results: list[Result] = []
        for start in range(0, len(rows), self._batch_size):
            soft, items = self._personas.soft_prompts(rows[start : start + self._batch_size])
            columns: dict[str, Any] = {"items": items, "soft_tokens": soft.vectors.float().flatten(1).cpu().numpy()}
            if soft.label_bias is not None:
                columns["label_bias"] = soft.label_bias.float().tolist()
            results += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return results


class _ItemVectors:
    """Vectors of the latest items; encodes items that are missing."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._vectors = encoder, dict[Content, Any]()
        self.width = encoder.width

    def clear(self) -> None:
        self._vectors.clear()

    def add(self, contents: Sequence[Content]) -> None:
        if len(self._vectors) > _MAX_ITEMS:
            self._vectors.clear()
        new = [content for content in dict.fromkeys(contents) if content not in self._vectors]
        if new:
            self._vectors.update(zip(new, encode_items(self._encoder, new), strict=True))

    def encode_items(self, contents: Sequence[Content], *, batch_size: int = 64) -> Vectors:
        vectors: Vectors = np.stack([self._vectors[content] for content in contents])
        return vectors


def _joined(histories: Sequence[EncodedHistory]) -> EncodedHistory:
    columns = ([getattr(each, name) for each in histories] for name in ("vectors", "label_ids", "style", "kind_ids"))
    return EncodedHistory(*(np.concatenate(column) for column in columns))
