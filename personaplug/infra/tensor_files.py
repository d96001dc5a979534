"""Safetensors files with a checksum. Loading refuses damaged files, NaN and unexpected shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from personaplug.errors import DamagedFile
from personaplug.infra.atomic_io import atomic_write
from personaplug.infra.checksums import KEY, checksum

Shapes = Mapping[str, tuple[int, ...]]


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically, with a checksum of their names, types, shapes and values.

    Raises:
        StorageError: if the disk is full.
    """
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {KEY: checksum(_buffers(on_cpu))}
    atomic_write(path, lambda temporary: save_file(on_cpu, temporary, metadata=metadata))


def load_tensors(
    path: Path, *, remedy: str, shapes: Shapes | None = None, optional: Shapes | None = None
) -> dict[str, Tensor]:
    """Read tensors from a file of `save_tensors`.

    Args:
        remedy: advice for the error message if the file is damaged, as a sentence.
        shapes: shapes of the expected tensors; compared with the file's header before tensors are loaded.
        optional: shapes of tensors that the file may contain in addition.
    Raises:
        DamagedFile: if the file is missing, truncated, changed or contains NaN, or its tensors have other shapes.
    """
    with _opened(path, remedy=remedy) as file:
        if shapes is not None:
            _compare(_header(file), expected=shapes, known={**shapes, **(optional or {})})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored = (file.metadata() or {}).get(KEY)
    if stored != checksum(_buffers(tensors)):
        reason = "its values do not match its checksum" if stored else "it has no checksum"
        raise DamagedFile(path, reason=reason, remedy=remedy)
    if invalid := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        raise DamagedFile(path, reason=f"{invalid[0]} contains NaN or infinite values", remedy=remedy)
    return tensors


def check_header(path: Path, shapes: Shapes, *, remedy: str) -> None:
    """Check that a file contains tensors of these shapes, without loading them. Other tensors are allowed.

    Raises:
        DamagedFile: if a tensor is missing or has another shape.
    """
    with _opened(path, remedy=remedy) as file:
        header = _header(file)
        _compare(header, expected=shapes, known={**header, **shapes})


def stored_checksum(path: Path, *, remedy: str) -> str:
    """Return the checksum in a file's header; `load_tensors` compares it with the values.

    Raises:
        DamagedFile: if the header has no checksum.
    """
    with _opened(path, remedy=remedy) as file:
        return str((file.metadata() or {})[KEY])


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's state, for a comparison with a file."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@contextmanager
def _opened(path: Path, *, remedy: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except KeyError:
        raise DamagedFile(path, reason="it has no checksum", remedy=remedy) from None
    except FileNotFoundError:
        raise DamagedFile(path, reason="it is missing", remedy=remedy) from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DamagedFile(path, reason=reason, remedy=remedy) from error


def _header(file: Any) -> Shapes:
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _compare(found: Shapes, *, expected: Shapes, known: Shapes) -> None:
    """Raise ValueError if an expected tensor is missing, or a tensor is unknown or has another shape."""
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"the tensor {missing[0]} is missing")
    for name, shape in found.items():
        if name not in known:
            raise ValueError(f"the tensor {name} is not expected")
        if shape != known[name]:
            raise ValueError(f"{name} should have shape {list(known[name])}; found {list(shape)}")


def _buffers(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yield the bytes for the checksum of tensors."""
    for name in sorted(tensors):
        tensor = tensors[name]
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy()


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    # aminmax propagates NaN, and is ten times faster than a check of each value.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
