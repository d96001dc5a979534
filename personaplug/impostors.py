"""Impostors: what stands in for a user's own persona in the controls random-vectors and mean-persona."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from personaplug.personalizer import Personalizer
from personaplug.samples import EncodedSample
from personaplug.soft_prompt import SoftPrompt
from personaplug.vectors import Halves, Rows


class RandomVectors:
    """A unit vector for every row of a table, drawn by seed and row: as many items, none of their meaning.

    Args:
        width: values in a vector (E).
        seed: of the draw.
    """

    def __init__(self, width: int, *, seed: int) -> None:
        self.width, self.seed = width, seed

    def gather(self, rows: Rows) -> Halves:
        """Vectors of some rows, (n, E); the same row gives the same vector."""
        drawn = np.empty((len(rows), self.width), dtype=np.float32)
        for place, row in enumerate(rows):
            drawn[place] = np.random.default_rng([self.seed, 9, int(row)]).standard_normal(self.width)
        lengths = np.linalg.norm(drawn, axis=1, keepdims=True)
        return np.asarray(drawn / lengths, dtype=np.float16)


class MeanPersona:
    """The average soft prompt of some samples, for everybody.

    Args:
        personalizer: makes the soft prompts that are averaged.
        samples: whose.
        batch_size: how many at once.
    """

    def __init__(self, personalizer: Personalizer, samples: Sequence[EncodedSample], *, batch_size: int = 64) -> None:
        total = None
        with torch.no_grad():
            for start in range(0, len(samples), batch_size):
                part = personalizer.soft_prompt(samples[start : start + batch_size]).vectors.sum(dim=0)
                total = part if total is None else total + part
        assert total is not None, "a mean needs samples"
        self.mean = total / len(samples)

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """The same soft tokens for each sample, (B, S, D)."""
        return SoftPrompt(self.mean.expand(len(samples), -1, -1))
