"""Any sentence-transformers model that takes pictures, such as a CLIP or a SigLIP, as a picture encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from personaplug.data.pictures import Picture
from personaplug.encoders.base import Vectors
from personaplug.encoders.pictures import decode, encode_distinct
from personaplug.encoders.sentence_transformer import load_model, weights_of, width_of
from personaplug.errors import MissingModel
from personaplug.infra.model_hub import find_model

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
        self.width = width_of(self._model, name=name)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the weights."""
        return hashlib.blake2b("|".join(["pictures", *weights_of(self._model)]).encode(), digest_size=8).hexdigest()

    def encode(self, pictures: Sequence[Picture]) -> Vectors:
        """Return (n, E) float32 unit vectors; a repeated picture is encoded once."""
        return encode_distinct(pictures, self._encode, width=self.width, batch_size=_BATCH)

    def _encode(self, pictures: Sequence[Picture]) -> Vectors:
        images = [decode(picture) for picture in pictures]
        vectors: Vectors = self._model.encode(
            images, batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False
        ).astype(np.float32)
        return vectors
