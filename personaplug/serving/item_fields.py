"""Stored items as the fields that routes list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from personaplug.data.parsing import record_of
from personaplug.data.task import Task
from personaplug.encoders.joint import OUTSIDE, PICTURE
from personaplug.store.history_store import StoredItem


def item_fields(item: StoredItem, tasks: Sequence[Task], *, labels: Sequence[str]) -> dict[str, Any]:
    """Return a stored item as fields that can be added again, with its kind and arrival time.

    A picture or a vector is only described, and must be sent again with the item.

    Args:
        tasks: the served tasks, which name the fields.
        labels: the labels of the store.
    """
    fields: dict[str, Any] = dict(record_of(item))
    if not fields and item.label_id >= 0:
        label = labels[item.label_id]
        names = [task.answer_field for task in tasks if len(tasks) == 1 or label in task.labels]
        fields = {name: label for name in names[:1] if name}
    day = item.date.isoformat() if item.date else None
    facts = {"id": item.id, "date": day, "arrived": item.arrived.isoformat(), "kind": item.kind}
    return facts | _described_parts(item, tasks) | fields


def _described_parts(item: StoredItem, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """Describe an item's picture and vector, each under the name of the field in which it came."""
    described: dict[str, dict[str, Any]] = {}
    if PICTURE in item.parts:
        is_kept = item.picture_bytes is not None
        size = {"size": item.picture_bytes} if is_kept else {}
        name = _only_name((task.image_field for task in tasks), default=PICTURE)
        described[name] = {"type": PICTURE, "kept": is_kept, **size}
    if OUTSIDE in item.parts:
        described[_only_name((task.vector_field for task in tasks), default=OUTSIDE)] = {"type": OUTSIDE, "kept": False}
    return described


def _only_name(names: Iterable[str | None], *, default: str) -> str:
    """Return the only name; the default if there is none, or several."""
    distinct = set(filter(None, names))
    return distinct.pop() if len(distinct) == 1 else default
