"""Safetensors files: loading refuses damage, NaN and unexpected shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from personaplug.errors import DamagedFile
from personaplug.infra.tensor_files import check_header, load_tensors, save_tensors

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 4),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "new" / "x.safetensors", TENSORS)
    return tmp_path / "new" / "x.safetensors"


def test_saved_tensors_load_unchanged(path: Path) -> None:
    loaded = load_tensors(path, remedy="Restore it.", shapes=SHAPES)
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_load_tensors_refuses_a_flipped_bit(path: Path) -> None:
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match="Restore it"):
            load_tensors(path, remedy="Restore it.")


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_load_tensors_refuses_a_truncated_file(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedFile, match="is damaged"):
        load_tensors(path, remedy="Restore it.")


def test_load_tensors_refuses_other_shapes(path: Path) -> None:
    for change, reason in (
        ({"count": (1,)}, r"count should have shape \[1\]; found \[\]"),
        ({"more": (2,)}, "more is missing"),
    ):
        with pytest.raises(DamagedFile, match=reason):
            load_tensors(path, remedy="Restore it.", shapes=SHAPES | change)
        with pytest.raises(DamagedFile, match=reason):
            check_header(path, change, remedy="Restore it.")
    with pytest.raises(DamagedFile, match="weight is not expected"):
        load_tensors(path, remedy="", shapes={name: shape for name, shape in SHAPES.items() if name != "weight"})
    check_header(path, {"count": ()}, remedy="")
    load_tensors(path, remedy="", shapes=SHAPES, optional={"more": (2,)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_tensors_refuses_nan_and_infinity(tmp_path: Path, value: float) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.tensor([0.0, value])})
    with pytest.raises(DamagedFile, match="a contains NaN or infinite values"):
        load_tensors(tmp_path / "x.safetensors", remedy="Restore it.")
