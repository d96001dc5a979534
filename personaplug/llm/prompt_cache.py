"""Prompts read once: the frozen model's states of each, in memory or memory-mapped on disk, within a byte budget.

What a frozen model makes of a prompt that stands before the soft tokens is a constant of training: no epoch, view or
user changes it. Prompts that find no room are read again each time, without gradients.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from personaplug.infra.atomic_io import storage_errors
from personaplug.llm.prompt_tokenizer import Ids

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layout:
    """The states of one prompt: (parts, heads, tokens, width).

    Attributes:
        parts: 2 · layers for keys and values, 1 for an encoder's output.
        heads: heads that have keys of their own, or 1.
        width: values of a token in one head.
        dtype: the model's number format.
    """

    parts: int
    heads: int
    width: int
    dtype: torch.dtype

    @property
    def values(self) -> int:
        """Numbers kept of one token."""
        return self.parts * self.heads * self.width

    @property
    def bytes(self) -> int:
        """What one token takes."""
        return self.values * self.dtype.itemsize


@dataclass(frozen=True)
class CachePlan:
    """Where prompts are kept, and why there.

    Attributes:
        place: gpu, memory, disk or nowhere.
        bytes: at most.
        reason: for people.
        share: of the prompts that find room, 0 to 1.
    """

    place: str
    bytes: int
    reason: str
    share: float = 0.0


def plan_cache(needed: int, *, wanted: str, limit: int, free: Mapping[str, int]) -> CachePlan:
    """Choose where prompts are kept: in the first place that has twice the room, else in part in the largest.

    Args:
        needed: bytes of all prompts.
        wanted: one place; auto = whichever; nowhere.
        limit: most bytes, if half of what is free is more; 0 = that half.
        free: bytes that are free in each place, the fastest first.
    """
    if wanted == "nowhere":
        return CachePlan("nowhere", 0, "not kept, as asked; each is read anew without gradients")
    offered = {place: min(limit, size // 2) if limit else size // 2 for place, size in free.items()}
    places = [wanted] if wanted != "auto" else list(free)
    place = next((place for place in places if needed <= offered[place]), max(places, key=lambda one: offered[one]))
    size, bound = f"{needed / 1e9:.2f} GB", f"{offered[place] / 1e9:.2f} GB"
    whose = "the limit given" if limit == offered[place] else "half of what is free there"
    where = {"gpu": "on the GPU", "memory": "in memory", "disk": f"on disk in {tempfile.gettempdir()}"}[place]
    if needed <= offered[place]:
        tight = places[: places.index(place)]
        beyond = "".join(f"; the {one} offers {offered[one] / 1e9:.2f} GB" for one in tight)
        return CachePlan(place, needed, f"kept {where}: {size} of at most {bound}, {whose}{beyond}", share=1.0)
    share = offered[place] / needed
    part = f"{share:.0%} of {size} kept {where}, {whose}"
    return CachePlan(place, offered[place], f"{part}; the others are read anew without gradients", share=share)


class PromptCache:
    """States of prompts, one after another in one buffer, found by the prompts' tokens.

    Attributes:
        layout: of the states.
        room: where the buffer is.
    """

    def __init__(self, layout: Layout, *, room: CachePlan, device: torch.device = _CPU) -> None:
        """Take the room.

        Args:
            device: the model's, where `room` says gpu.
        Raises:
            StorageError: if the disk has no such room.
        """
        self.layout, self.room = layout, room
        self._device = device if room.place == "gpu" else _CPU
        self._places: dict[Ids, int] = {}
        self._used = 0
        self._buffer = self._allocate(room.bytes // layout.dtype.itemsize)

    def __len__(self) -> int:
        """Prompts held."""
        return len(self._places)

    def __contains__(self, ids: Ids) -> bool:
        return ids in self._places

    def fits(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens still finds room."""
        return self._used + tokens * self.layout.values <= len(self._buffer)

    def put(self, ids: Ids, states: Tensor) -> None:
        """Keep the (parts, heads, n, width) states of a prompt of n tokens that fits."""
        self._buffer[self._used : self._used + states.numel()].copy_(states.reshape(-1))
        self._places[ids] = self._used
        self._used += states.numel()

    def get(self, ids: Ids) -> Tensor | None:
        """The (parts, heads, n, width) states of a prompt, if they are kept."""
        start = self._places.get(ids)
        if start is None:
            return None
        layout, tokens = self.layout, len(ids)
        flat = self._buffer[start : start + tokens * layout.values]
        return flat.view(layout.parts, layout.heads, tokens, layout.width)

    def _allocate(self, count: int) -> Tensor:
        if self.room.place != "disk" or not count:
            return torch.empty(count, dtype=self.layout.dtype, device=self._device)
        # The file has no name once it is mapped, so that whatever ends this process also frees the disk.
        with tempfile.TemporaryDirectory(prefix="personaplug-prompts-") as folder, storage_errors(Path(folder)):
            path = Path(folder) / "states"
            with path.open("wb") as file:
                # Taken now: a mapped file that finds the disk full while it is written kills the process.
                _take(file, count * self.layout.dtype.itemsize)
            return torch.from_file(str(path), shared=True, size=count, dtype=self.layout.dtype)


def _take(file: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    block = bytes(1 << 20)
    for start in range(0, size, len(block)):
        file.write(block[: size - start])


def real_columns(lengths: Tensor, longest: int) -> Tensor:
    """Which columns of `padded_states` hold tokens, (B, T) bool, for rows of these (B,) lengths."""
    return torch.arange(longest, device=lengths.device) >= longest - lengths[:, None]


def padded_states(states: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """Lay prompts' states side by side, padded on the left, so that what follows them stands right behind them.

    Args:
        states: B of (parts, heads, n, width).
    Returns:
        (parts, B, heads, T, width), T = the longest.
    """
    longest = max(one.shape[2] for one in states)
    parts, heads, _, width = states[0].shape
    together = states[0].new_empty(parts, len(states), heads, longest, width, device=device)
    for row, one in enumerate(states):
        start = longest - one.shape[2]
        together[:, row, :, :start] = 0  # never attended to, yet 0 times an unset number may be no number
        together[:, row, :, start:] = one
    return together
