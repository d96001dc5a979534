"""The cost of one user to a service: stored bytes and the seconds to add the user, as means over the samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from personaplug.data.records import Sample
from personaplug.encoders import Encoder
from personaplug.encoders.base import encode_items

_TIMED_ITEMS = 128
_BYTES_PER_VALUE = 2  # item vectors are stored in half precision


@dataclass(frozen=True)
class UserCost:
    """The cost of one user.

    Attributes:
        bytes: stored for the user.
        seconds: time to add the user, on this machine.
    """

    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: UserCost) -> UserCost:
        return UserCost(self.bytes + other.bytes, self.seconds + other.seconds)


class CostMeter:
    """Measures the costs of an average user.

    Args:
        sizes: number of items in each sample's history.
        timed: a few samples with their texts, whose items are measured.
    """

    def __init__(self, sizes: Sequence[int], timed: Sequence[Sample], *, encoder: Encoder) -> None:
        self.encoder = encoder
        self.items = float(np.mean(sizes)) if len(sizes) else 0.0
        self._timed = [item for sample in timed for item in sample.history][:_TIMED_ITEMS]

    def embeddings(self) -> UserCost:
        """Return the cost of the vectors of a user's items."""
        return UserCost(self.items * self.encoder.width * _BYTES_PER_VALUE, self.items * self._seconds_per_item)

    def texts(self) -> UserCost:
        """Return the cost of the texts of a user's items."""
        sizes = [len(item.text.encode()) for item in self._timed]
        return UserCost(self.items * float(np.mean(sizes)) if sizes else 0.0)

    def labels(self) -> UserCost:
        """Return the cost of the labels of a user's answers, one byte each."""
        return UserCost(self.items)

    @cached_property
    def _seconds_per_item(self) -> float:
        """The time to encode an item, measured on first use."""
        if not self._timed:
            return 0.0
        contents = [item.encoded(with_answer=True) for item in self._timed]
        encode_items(self.encoder, contents[:8])  # the first call warms up
        started = time.monotonic()
        encode_items(self.encoder, contents)
        return (time.monotonic() - started) / len(contents)
