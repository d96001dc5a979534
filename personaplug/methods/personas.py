"""Stand-ins for a user's persona in the controls `random-vectors` and `mean-persona`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from personaplug.encoders.embedding_store import Float16Array, RowIds
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.personalizer import Personalizer, Vectors


class RandomVectors:
    """Random unit vectors instead of item vectors: the number of items is the same, their meaning is lost.

    Args:
        vectors: the vectors to replace; equal vectors get equal replacements.
        seed: seed of the draws.
    """

    def __init__(self, vectors: Vectors, *, seed: int) -> None:
        self.vectors, self.seed, self.width = vectors, seed, vectors.width

    def gather(self, rows: RowIds) -> Float16Array:
        """Return the random vectors of some rows, (n, E)."""
        drawn = np.empty((len(rows), self.width), dtype=np.float32)
        for index, vector in enumerate(self.vectors.gather(rows)):
            content = int.from_bytes(hashlib.blake2b(vector.tobytes(), digest_size=8).digest())
            drawn[index] = np.random.default_rng([self.seed, 9, content]).standard_normal(self.width)
        norms = np.linalg.norm(drawn, axis=1, keepdims=True)
        return np.asarray(drawn / norms, dtype=np.float16)


class MeanPersona:
    """The average soft prompt of some samples, for all users.

    Args:
        personalizer: makes the soft prompts that are averaged.
        samples: the samples to average over. A sample with a cold start counts only if all have one, because its
            tokens may come from another training.
    """

    def __init__(self, personalizer: Personalizer, samples: Sequence[EncodedSample], *, batch_size: int = 64) -> None:
        ignored_items = personalizer.plug.cold_start.ignored_items
        samples = [sample for sample in samples if len(sample.rows) > ignored_items] or samples
        with torch.no_grad():
            parts = [
                _weighted_sum(personalizer.soft_prompt(samples[start : start + batch_size]), weight=1 / len(samples))
                for start in range(0, len(samples), batch_size)
            ]
        self.mean, self.placement = _weighted_sum(SoftPrompt.cat(parts)), personalizer.placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """Return the same soft tokens for each sample, (B, S, D)."""
        return SoftPrompt.cat([self.mean] * len(samples))


def _weighted_sum(soft: SoftPrompt, *, weight: float = 1.0) -> SoftPrompt:
    """Return the sum of a batch, times a weight, as a batch of one."""
    bias = None if soft.label_bias is None else soft.label_bias.sum(dim=0, keepdim=True) * weight
    return replace(soft, vectors=soft.vectors.sum(dim=0, keepdim=True) * weight, label_bias=bias)
