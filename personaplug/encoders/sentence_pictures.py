"""Any sentence-transformers model that takes pictures, such as a CLIP or a SigLIP, as a picture encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from personaplug.data.pictures import Picture
from personaplug.encoders.base import Vectors, check_finite
from personaplug.encoders.pictures import decode
from personaplug.encoders.sentence_transformer import load_model
from personaplug.errors import MissingModel
from personaplug.infra.model_hub import find_model, fingerprint

_BATCH = 16


class SentencePictureEncoder:
    """A frozen sentence-transformers model for pictures, prepared by the model's own processor.

    Args:
        name: see `model_hub.find_model`.
    Raises:
        MissingModel: if there is no such model, or it takes no pictures.
    """

    def __init__(self, name: str, *, device: str = "cpu") -> None:
        folder = find_model(name)
        self.name = name
        self._model = load_model(folder, name=name, device=device, dtype=torch.float32)
        if not self._model.supports("image"):
            raise MissingModel(name, tried=[f"{folder} (the model takes no pictures)"])
        width = self._model.get_embedding_dimension()
        if width is None:
            raise MissingModel(name, tried=[f"{folder} (its files do not define the width of its vectors)"])
        self.width = int(width)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the weights."""
        weights = [fingerprint(getattr(module, "auto_model", module)) for module in self._model]
        return hashlib.blake2b("|".join(["pictures", *weights]).encode(), digest_size=8).hexdigest()

    def encode(self, pictures: Sequence[Picture]) -> Vectors:
        """Return (n, E) float32 unit vectors; a repeated picture is encoded once."""
        distinct = list(dict.fromkeys(pictures))
        if not distinct:
            return np.zeros((0, self.width), dtype=np.float32)
        batches = (distinct[start : start + _BATCH] for start in range(0, len(distinct), _BATCH))
        vectors = np.concatenate([self._encode(batch) for batch in batches])
        check_finite(vectors)
        index_of = {picture: index for index, picture in enumerate(distinct)}
        return vectors[[index_of[picture] for picture in pictures]]

    def _encode(self, pictures: Sequence[Picture]) -> Vectors:
        images = [decode(picture) for picture in pictures]
        vectors: Vectors = self._model.encode(
            images, batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False
        ).astype(np.float32)
        return vectors
