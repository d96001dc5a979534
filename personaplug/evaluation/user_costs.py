"""What a user costs a service under each row of a table: bytes kept, seconds to add one; means over the samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from personaplug.data.records import Sample
from personaplug.encoders import Encoder
from personaplug.methods import Condition

_TIMED_ITEMS = 128
_BYTES_PER_VALUE = 2  # item vectors are kept in half precision
_DENSE = ("dense", "ropg")


@dataclass(frozen=True)
class Cost:
    """Of one user.

    Attributes:
        bytes: kept for the user.
        seconds: to add the user, on this machine.
    """

    bytes: float
    seconds: float


class CostMeter:
    """Measured once for a set of samples.

    Args:
        sizes: items of each sample's history.
        some: a few samples with their texts, to measure on.
        encoder: encodes items.
    """

    def __init__(self, sizes: Sequence[int], some: Sequence[Sample], *, encoder: Encoder) -> None:
        self.texts = [item.text for sample in some for item in sample.history][:_TIMED_ITEMS]
        self.items = float(np.mean(sizes)) if len(sizes) else 0.0
        self.encoder = encoder
        self.text_bytes = float(np.mean([len(text.encode()) for text in self.texts])) if self.texts else 0.0

    @cached_property
    def seconds(self) -> float:
        """What encoding an item takes; timed when the first row asks."""
        return _seconds_per_item(self.texts, self.encoder)

    def of(self, condition: Condition, *, own: Cost | None = None) -> Cost:
        """The cost under a condition.

        Args:
            own: what writing a profile or training matrices was measured to cost, where the row needs it.
        """
        total = own or Cost(0.0, 0.0)
        trained = condition.trained.kind if condition.trained else None
        retriever = condition.retrieval.method if condition.retrieval else None
        personal = condition.history != "none" and condition.persona != "mean"
        if (trained in ("plug", "paper", "bridge") and personal) or retriever in _DENSE:
            vectors = self.items * self.encoder.width * _BYTES_PER_VALUE
            total = Cost(total.bytes + vectors, total.seconds + self.items * self.seconds)
        if trained == "labels":
            total = Cost(total.bytes + self.items, total.seconds)  # a byte says which label an answer is
        if retriever is not None or condition.phrases:
            total = Cost(total.bytes + self.items * self.text_bytes, total.seconds)
        return total


def _seconds_per_item(texts: Sequence[str], encoder: Encoder) -> float:
    if not texts:
        return 0.0
    encoder.encode(texts[:8])  # the first call also warms up
    began = time.monotonic()
    encoder.encode(texts)
    return (time.monotonic() - began) / len(texts)
