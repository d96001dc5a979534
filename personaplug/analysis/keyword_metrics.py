"""Keywords of a user's taste in a written text, read by the rules of `personaplug.data.tastes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from personaplug.analysis.metric_base import Array, Metric
from personaplug.data.tastes import ATTRIBUTES, PICTURED, TOLD, keywords_met


class Keywords(Metric):
    """The share of the reference's attributes that the prediction has with the same word; averaged over samples.

    For each attribute, the first of its words in the prediction counts. A reference has a word for each attribute.
    """

    name = "keywords"
    attributes: ClassVar[tuple[str, ...]] = tuple(ATTRIBUTES)

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        met = [keywords_met(*pair) for pair in zip(predictions, golds, strict=True)]
        hits = [[each.get(name, False) for name in self.attributes] for each in met]
        shares = np.array(hits, dtype=np.float64).reshape(-1, len(self.attributes)).mean(axis=1, keepdims=True)
        return np.asarray(shares)


_GROUPS = {"pictures": PICTURED, "texts": TOLD, **{name: (name,) for name in ATTRIBUTES}}

KEYWORD_METRICS: tuple[type[Metric], ...] = (
    Keywords,
    *(
        type(f"_{group}", (Keywords,), {"name": f"keywords_{group}", "attributes": attributes, "__doc__": ""})
        for group, attributes in _GROUPS.items()
    ),
)
"""`keywords`; the shares among attributes that pictures show, and that texts tell; one metric for each attribute."""
