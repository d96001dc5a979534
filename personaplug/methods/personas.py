"""Stand-ins for items, their pictures or a persona, in controls such as `random-vectors` and `wrong-pictures`."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from personaplug.data.pictures import Picture
from personaplug.data.records import ItemContent
from personaplug.encoders import Encoder
from personaplug.encoders.base import EncoderIdentity, encode_items
from personaplug.encoders.embedding_store import Float16Array, RowIds
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.encoders.joint import PICTURE, part_slice
from personaplug.encoders.strangers import strangers
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.personalizer import Personalizer, Vectors

_NOISE_PICTURES = 64
_NOISE_SIZE = 32  # pixels of a side; a multiple of 4, so that rows of a bitmap need no padding


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


class NoisePictures:
    """Pictures of noise instead of the items' pictures; texts and outside vectors stay.

    Args:
        vectors: the vectors to change; equal vectors get equal noise.
        encoder: the encoder of the vectors, which has a part for pictures.
    """

    def __init__(self, vectors: Vectors, encoder: Encoder, *, seed: int) -> None:
        self.vectors, self.seed, self.width = vectors, seed, vectors.width
        self._values = part_slice(encoder.identity, PICTURE)
        rng = np.random.default_rng([seed, 10])
        pictures = [_noise_picture(rng) for _ in range(_NOISE_PICTURES)]
        encoded = encode_items(encoder, [ItemContent("", picture) for picture in pictures])
        self._noise = encoded[:, self._values]

    def gather(self, rows: RowIds) -> Float16Array:
        """Return the vectors of some rows with other pictures, (n, E)."""
        vectors = self.vectors.gather(rows).astype(np.float32)
        for vector in vectors:
            picture = vector[self._values]
            draw = int.from_bytes(hashlib.blake2b(picture.tobytes(), digest_size=8).digest()) % len(self._noise)
            vector[self._values] = self._noise[draw] * np.linalg.norm(picture)
        return np.asarray(vectors, dtype=np.float16)


class StrangersPictures:
    """Soft prompts of users whose items have the pictures of one stranger; texts, answers and outside vectors stay.

    Args:
        personalizer: makes the soft prompts; its table has the vectors of all samples.
        samples: the samples to which strangers are drawn, as in `strangers`.
        encoder: the encoder of the vectors, which has a part for pictures.
    """

    def __init__(
        self, personalizer: Personalizer, samples: Sequence[EncodedSample], *, encoder: EncoderIdentity, seed: int
    ) -> None:
        sources = strangers([sample.owner for sample in samples], seed=seed)
        self._strangers = {sample.id: samples[source] for sample, source in zip(samples, sources, strict=True)}
        self._personalizer, self._values = personalizer, part_slice(encoder, PICTURE)

    @property
    def placement(self) -> str:
        return self._personalizer.placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """Return the soft prompts of some of the samples, (B, S, D)."""
        vectors = np.concatenate([self._vectors(sample) for sample in samples])
        ends = np.cumsum([len(sample.rows) for sample in samples])
        samples = [
            replace(sample, rows=np.arange(end - len(sample.rows), end))
            for sample, end in zip(samples, ends, strict=True)
        ]
        plug, scale = self._personalizer.plug, self._personalizer.persona_scale
        return Personalizer(plug, table=_Rows(vectors), persona_scale=scale).soft_prompt(samples)

    def _vectors(self, sample: EncodedSample) -> Float16Array:
        """Return the vectors of a sample's items with a stranger's pictures in turn, (N, E).

        An item without a picture stays without one. If the stranger has no pictures, no item has one.
        """
        table = self._personalizer.table
        assert table is not None, "samples refer to a vector table"
        vectors = table.gather(sample.rows).astype(np.float32)
        pictures = table.gather(self._strangers[sample.id].rows)[:, self._values].astype(np.float32)
        lengths = np.linalg.norm(pictures, axis=1, keepdims=True)
        units = (pictures / np.maximum(lengths, 1e-6))[lengths[:, 0] > 0]
        own = np.linalg.norm(vectors[:, self._values], axis=1, keepdims=True)
        vectors[:, self._values] = own * np.resize(units, (len(vectors), units.shape[1]))
        return np.asarray(vectors, dtype=np.float16)


class _Rows:
    """A table of vectors in memory, (n, width)."""

    def __init__(self, vectors: Float16Array) -> None:
        self.vectors, self.width = vectors, int(vectors.shape[1])

    def gather(self, rows: RowIds) -> Float16Array:
        gathered: Float16Array = self.vectors[rows]
        return gathered


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


def _noise_picture(rng: np.random.Generator) -> Picture:
    """Return a picture whose pixels have random colors, as an uncompressed bitmap."""
    size, file = _NOISE_SIZE, io.BytesIO()
    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8).tobytes()
    file.write(struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54))
    file.write(struct.pack("<IiiHHIIiiII", 40, size, size, 1, 24, 0, len(pixels), 0, 0, 0, 0))
    file.write(pixels)
    return Picture(file.getvalue())


def _weighted_sum(soft: SoftPrompt, *, weight: float = 1.0) -> SoftPrompt:
    """Return the sum of a batch, times a weight, as a batch of one."""
    bias = None if soft.label_bias is None else soft.label_bias.sum(dim=0, keepdim=True) * weight
    return replace(soft, vectors=soft.vectors.sum(dim=0, keepdim=True) * weight, label_bias=bias)
