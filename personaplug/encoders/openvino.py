"""A copy of an encoder's model in OpenVINO, for many texts at once; used only where its vectors are torch's own.

On CPUs that multiply in bfloat16 it encodes several times as many texts a second as torch in float32.
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
from personaplug.errors import UserError

logger = logging.getLogger(__name__)

Features = dict[str, Tensor]
Embed = Callable[[nn.Module, Features], Tensor]

CLOSE = 0.9999
"""Two vectors of a text with a cosine above this count as the same."""


class _Unfit(Exception):
    """Why a model is not encoded by OpenVINO here."""


class OpenVINOEncoder:
    """A model compiled by OpenVINO for this machine's CPU.

    Attributes:
        precision: what it multiplies in, `bf16` or `f32`.
    """

    def __init__(self, core: Any, exported: Any, *, names: Sequence[str], precision: str) -> None:
        """Compile an exported model whose inputs are the features of these names, in their order."""
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            # Several batches at once, a thread each: threads that share a batch wait for one another.
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.precision, self._names = precision, tuple(names)
        self._compiled = core.compile_model(exported, "CPU", settings)

    def encode_into(self, vectors: Vectors, batches: Iterable[tuple[Sequence[int], Features]]) -> None:
        """Write each batch's vectors at its places; batches are drawn while earlier ones are still computed.

        Args:
            vectors: (n, E) float32.
            batches: places in `vectors` (B), and the features of the texts that belong there, batch first.
        """

        def write(request: Any, places: Sequence[int]) -> None:
            vectors[places] = request.get_output_tensor().data

        queue = _openvino().AsyncInferQueue(self._compiled)
        queue.set_callback(write)
        for places, features in batches:
            queue.start_async([features[name].numpy() for name in self._names], places)
        queue.wait_all()


def installed() -> bool:
    """Whether OpenVINO is there; it is not imported."""
    return find_spec("openvino") is not None


def open_bulk(model: nn.Module, embed: Embed, *, probes: Sequence[Features], required: bool) -> OpenVINOEncoder | None:
    """Export a model to OpenVINO and compare the vectors of both.

    Args:
        model: in eval mode, frozen, on the CPU.
        embed: (model, features) to (B, E) unit vectors.
        probes: features of a few texts of no user, in batches of different shapes.
        required: raise where OpenVINO does not fit, and do without bfloat16 if need be.
    Returns:
        None where torch is the better choice; the reason is logged.
    Raises:
        UserError: if it is required and the model cannot be exported, or its vectors differ.
    """
    try:
        return _checked(model, embed, probes=probes, any_precision=required)
    except Exception as error:  # an exporter stumbles over foreign models in ways of its own
        reason = str(error) if isinstance(error, _Unfit) else _first_line(error)
        if required:
            raise UserError(f"OpenVINO cannot encode here: {reason}. Use encoder_engine=torch.") from error
        logger.warning("Texts are encoded by torch, not by OpenVINO: %s.", reason)
        return None


def _checked(model: nn.Module, embed: Embed, *, probes: Sequence[Features], any_precision: bool) -> OpenVINOEncoder:
    """The first compiled model, fastest precision first, whose vectors are torch's."""
    core = _openvino().Core()
    fast = _has_bfloat16(core)
    if not fast and not any_precision:
        # In float32 the two are equally fast.
        raise _Unfit("this processor does not multiply in bfloat16")
    exported = _exported(model, embed, probes[0])
    closest = -1.0
    for precision in (["bf16"] if fast else []) + (["f32"] if any_precision else []):
        found = OpenVINOEncoder(core, exported, names=list(probes[0]), precision=precision)
        cosine = min(_cosine(found, embed(model, features), features=features) for features in probes)
        if cosine > CLOSE:
            return found
        closest = max(closest, cosine)
    raise _Unfit(f"its vectors of a few texts differ from torch's (smallest cosine {closest:.6f})")


def _has_bfloat16(core: Any) -> bool:
    """Whether the CPU itself multiplies in bfloat16."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _cosine(found: OpenVINOEncoder, expected: Tensor, *, features: Features) -> float:
    """The smallest cosine between rows of the same text; NaN anywhere counts as opposite."""
    vectors = np.zeros(tuple(expected.shape), dtype=np.float32)
    found.encode_into(vectors, [(range(len(vectors)), features)])
    return float(np.nan_to_num((vectors * to_numpy(expected)).sum(axis=1), nan=-1.0).min())


def _exported(model: nn.Module, embed: Embed, features: Features) -> Any:
    """The model as OpenVINO's graph, for batches and texts of any length."""
    traced = _Positional(model, embed, names=list(features)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # branches that tracing fixes; the check sees those that matter
        return _openvino().convert_model(traced, example_input=tuple(features.values()))


def _openvino() -> Any:
    # As soon as it is imported it reports to its maker over the network, unless its package for that is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


class _Positional(nn.Module):
    """A model that takes its features one by one, as tracing wants them."""

    def __init__(self, model: nn.Module, embed: Embed, *, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self._embed, self._names = model, embed, names

    def forward(self, *values: Tensor) -> Tensor:
        return self._embed(self.model, dict(zip(self._names, values, strict=True)))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
