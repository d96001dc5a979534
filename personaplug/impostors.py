"""Impostors: what stands in for a user's own persona in the controls random-vectors and mean-persona."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from personaplug.personalizer import Personalizer, Vectors
from personaplug.samples import EncodedSample
from personaplug.soft_prompt import SoftPrompt
from personaplug.vectors import Halves, Rows


class RandomVectors:
    """Another unit vector in place of each of a table's, drawn by seed: as many items, none of their meaning.

    Args:
        table: whose vectors are replaced; equal ones by equal ones, in whatever row they are.
        seed: of the draw.
    """

    def __init__(self, table: Vectors, *, seed: int) -> None:
        self.table, self.seed, self.width = table, seed, table.width

    def gather(self, rows: Rows) -> Halves:
        """Vectors in place of those of some rows, (n, E)."""
        drawn = np.empty((len(rows), self.width), dtype=np.float32)
        for place, vector in enumerate(self.table.gather(rows)):
            content = int.from_bytes(hashlib.blake2b(vector.tobytes(), digest_size=8).digest())
            drawn[place] = np.random.default_rng([self.seed, 9, content]).standard_normal(self.width)
        lengths = np.linalg.norm(drawn, axis=1, keepdims=True)
        return np.asarray(drawn / lengths, dtype=np.float16)


class MeanPersona:
    """The average soft prompt of some samples, for everybody.

    Args:
        personalizer: makes the soft prompts that are averaged.
        samples: whose; those of few items, whose tokens may be of another kind, count only if there are no others.
        batch_size: how many at once.
    """

    def __init__(self, personalizer: Personalizer, samples: Sequence[EncodedSample], *, batch_size: int = 64) -> None:
        few = personalizer.plug.few
        samples = [sample for sample in samples if len(sample.rows) > few] or samples
        with torch.no_grad():
            parts = [
                _combined(personalizer.soft_prompt(samples[start : start + batch_size]), share=1 / len(samples))
                for start in range(0, len(samples), batch_size)
            ]
        self.mean, self.placement = _combined(SoftPrompt.joined(parts)), personalizer.placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """The same soft tokens for each sample, (B, S, D)."""
        return SoftPrompt.joined([self.mean] * len(samples))


def _combined(soft: SoftPrompt, *, share: float = 1.0) -> SoftPrompt:
    """The sum of a batch, times a share, as a batch of one."""
    bias = None if soft.label_bias is None else soft.label_bias.sum(dim=0, keepdim=True) * share
    return replace(soft, vectors=soft.vectors.sum(dim=0, keepdim=True) * share, label_bias=bias)
