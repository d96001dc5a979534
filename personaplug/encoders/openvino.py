"""OpenVINO for bulk encoding. It is used only if its vectors equal torch's.

On CPUs with bfloat16 arithmetic, OpenVINO is several times faster than torch in float32.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from personaplug.encoders.base import Vectors, to_numpy
from personaplug.errors import UserError, first_line

logger = logging.getLogger(__name__)

Features = dict[str, Tensor]
Embed = Callable[[nn.Module, Features], Tensor]

MIN_COSINE = 0.9999
"""Two vectors of a text count as equal if their cosine is above this threshold."""


class _UnsuitableError(Exception):
    """The reason why OpenVINO does not run a model here."""


class OpenVINOEncoder:
    """A model compiled for the CPU. Its inputs are the features `names`, its precision is `bf16` or `f32`."""

    def __init__(self, core: Any, exported: Any, *, names: Sequence[str], precision: str) -> None:
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            # Run several batches with one thread each, because threads that share a batch wait for one another.
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.precision, self._names = precision, tuple(names)
        self._compiled = core.compile_model(exported, "CPU", settings)

    def encode_into(self, vectors: Vectors, batches: Iterable[tuple[Sequence[int], Features]]) -> None:
        """Write each batch's vectors into its rows of `vectors`, (n, E). Tokenization overlaps with encoding."""

        def write(request: Any, indices: Sequence[int]) -> None:
            vectors[indices] = request.get_output_tensor().data

        queue = import_openvino().AsyncInferQueue(self._compiled)
        queue.set_callback(write)
        for indices, features in batches:
            queue.start_async([features[name].numpy() for name in self._names], indices)
        queue.wait_all()


def is_installed() -> bool:
    """Return True if OpenVINO is installed, without an import."""
    return find_spec("openvino") is not None


def compile_encoder(
    model: nn.Module, embed: Embed, *, probes: Sequence[Features], required: bool
) -> OpenVINOEncoder | None:
    """Compile a model. If OpenVINO does not help, log the reason and return None.

    Args:
        model: frozen model in eval mode on the CPU.
        embed: maps the model and features to (B, E) unit vectors.
        probes: features of test texts in batches of different shapes; both engines encode them.
        required: True = use float32 if bfloat16 fails, and raise `UserError` instead of returning None.
    """
    try:
        return _compile_checked(model, embed, probes=probes, allow_float32=required)
    except Exception as error:  # exporters fail on unknown models with errors of any type
        reason = str(error) if isinstance(error, _UnsuitableError) else first_line(error)
        if required:
            raise UserError(f"OpenVINO cannot run this encoder: {reason}. Use encoder_engine=torch.") from error
        logger.warning("Texts are encoded with torch instead of OpenVINO: %s.", reason)
        return None


def _compile_checked(
    model: nn.Module, embed: Embed, *, probes: Sequence[Features], allow_float32: bool
) -> OpenVINOEncoder:
    core = import_openvino().Core()
    precisions = (["bf16"] if _has_bfloat16(core) else []) + (["f32"] if allow_float32 else [])
    if not precisions:  # in float32, OpenVINO is no faster than torch
        raise _UnsuitableError("this CPU has no bfloat16 arithmetic")
    exported = _export(model, embed, probes[0])
    closest = -1.0
    for precision in precisions:
        encoder = OpenVINOEncoder(core, exported, names=list(probes[0]), precision=precision)
        cosine = min(_cosine(encoder, embed(model, features), features=features) for features in probes)
        if cosine > MIN_COSINE:
            return encoder
        closest = max(closest, cosine)
    raise _UnsuitableError(f"its vectors of test texts differ from torch's (smallest cosine {closest:.6f})")


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _cosine(encoder: OpenVINOEncoder, expected: Tensor, *, features: Features) -> float:
    """Return the smallest cosine between the two vectors of a text; NaN counts as −1."""
    vectors = np.zeros(tuple(expected.shape), dtype=np.float32)
    encoder.encode_into(vectors, [(range(len(vectors)), features)])
    return float(np.nan_to_num((vectors * to_numpy(expected)).sum(axis=1), nan=-1.0).min())


def _export(model: nn.Module, embed: Embed, features: Features) -> Any:
    """Return the model as OpenVINO's graph, for batches and texts of any length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing fixes branches; the probes detect wrong results
        positional = _PositionalModel(model, embed, names=list(features)).eval()
        return import_openvino().convert_model(positional, example_input=tuple(features.values()))


def import_openvino() -> Any:
    """Return the package openvino, without its telemetry."""
    # OpenVINO sends telemetry over the network on import, unless its telemetry package is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None makes an import fail
    return importlib.import_module("openvino")


class _PositionalModel(nn.Module):
    """Takes features as positional arguments, as tracing requires."""

    def __init__(self, model: nn.Module, embed: Embed, *, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self._embed, self._names = model, embed, names

    def forward(self, *values: Tensor) -> Tensor:
        return self._embed(self.model, dict(zip(self._names, values, strict=True)))
