"""Cache of prompt states: keys and values, recurrent states, or the output of an encoder.

With the placement `suffix`, prompt states do not depend on the soft tokens, so they are the same in every epoch and for
every user. They are cached on the GPU, in memory or memory-mapped on disk. Prompts beyond the limit are recomputed.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from personaplug.infra import distributed as processes
from personaplug.infra.atomic_io import storage_errors
from personaplug.infra.memory import free_memory
from personaplug.infra.progress import Progress
from personaplug.llm.padding import group_by_length
from personaplug.llm.prompt_state import Layout, PromptState
from personaplug.llm.prompt_tokenizer import Ids

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class CachePlan:
    location: str  # gpu, memory, disk or nowhere
    bytes: int
    reason: str  # for the log
    fraction: float = 0.0  # of the needed bytes that fit


def plan_cache(needed: int, *, location: str, limit: int, free: Mapping[str, int]) -> CachePlan:
    """Choose the first location with twice the needed space. If none is large enough, fill the largest location.

    Args:
        needed: bytes of all prompts.
        location: gpu, memory, disk, nowhere, or auto = any.
        limit: maximum number of bytes; 0 = no limit. The cache never takes more than half of the free space.
        free: free bytes by location, fastest first.
    """
    if location == "nowhere":
        return CachePlan("nowhere", 0, "not cached (prompt_cache=nowhere); recomputed without gradients")
    available = {name: min(limit, size // 2) if limit else size // 2 for name, size in free.items()}
    candidates = [location] if location != "auto" else list(free)
    fitting = [name for name in candidates if needed <= available[name]]
    chosen = fitting[0] if fitting else max(candidates, key=lambda name: available[name])
    size, maximum = _gigabytes(needed), _gigabytes(available[chosen])
    rule = "the configured limit" if limit == available[chosen] else "half of the free space"
    place = {"gpu": "on the GPU", "memory": "in memory", "disk": f"on disk in {tempfile.gettempdir()}"}[chosen]
    if fitting:
        too_small = candidates[: candidates.index(chosen)]
        others = "".join(f"; the {name} offers {_gigabytes(available[name])}" for name in too_small)
        return CachePlan(chosen, needed, f"cached {place}: {size} of at most {maximum}, {rule}{others}", fraction=1.0)
    fraction = available[chosen] / needed
    reason = f"{fraction:.0%} of {size} cached {place}, {rule}; the rest is recomputed without gradients"
    return CachePlan(chosen, available[chosen], reason, fraction=fraction)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


class PromptCache:
    """States of prompts, as views of one buffer. The location `gpu` uses `device`."""

    def __init__(self, layout: Layout, *, plan: CachePlan, device: torch.device = _CPU) -> None:
        self.layout, self.plan = layout, plan
        self.states: dict[Ids, PromptState] = {}
        self._free = self._allocate(plan.bytes, device if plan.location == "gpu" else _CPU)  # (n,) bytes

    def fits(self, tokens: int) -> bool:
        """Return True if a prompt of this length still fits."""
        return self.layout.nbytes(tokens) <= len(self._free)

    def put(self, ids: Ids, state: PromptState) -> None:
        """Store the state of a prompt that fits."""
        blocks = [
            self._store(tensor, block.nbytes(state.tokens))
            for tensor, block in zip(state.blocks, self.layout.blocks, strict=True)
        ]
        self.states[ids] = PromptState(self.layout, tuple(blocks), state.tokens)

    def _store(self, tensor: Tensor, size: int) -> Tensor:
        """Copy a tensor into the next `size` bytes, which include the alignment of the one after it."""
        stored = self._free[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._free = self._free[size:]
        return stored

    def _allocate(self, size: int, device: torch.device) -> Tensor:
        if self.plan.location != "disk" or not size:
            return torch.empty(size, dtype=torch.uint8, device=device)
        # The file is deleted while it is mapped, so the system frees the disk space even if this process is killed.
        with tempfile.TemporaryDirectory(prefix="personaplug-prompts-") as folder, storage_errors(Path(folder)):
            path = Path(folder) / "states"
            with path.open("wb") as file:
                _reserve(file, size)
            return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _reserve(file: BinaryIO, size: int) -> None:
    """Reserve disk space in advance, because a write to a mapped file on a full disk kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    block = bytes(1 << 20)
    for start in range(0, size, len(block)):
        file.write(block[: size - start])


class PromptStates:
    """States of prompts, from the cache or computed when needed, without gradients.

    `location` and `limit` are as in `plan_cache`; processes on one machine share the limit.
    """

    def __init__(
        self, compute: Callable[[Sequence[Ids]], list[PromptState]], *, device: torch.device, location: str, limit: int
    ) -> None:
        self.compute, self.device, self.location, self.limit = compute, device, location, limit
        self.cache: PromptCache | None = None
        self._prompts: frozenset[Ids] = frozenset()  # all prompts of the last `fill`, cached or not

    def plan(self, lengths: Sequence[int], layout: Layout | None) -> CachePlan:
        """Return where prompts with these numbers of tokens would be cached; see `LanguageModel.prompt_layout`."""
        if layout is None:
            return CachePlan("nowhere", 0, "not cached: the model's own cache does not support it")
        shared = {"memory": free_memory(), "disk": shutil.disk_usage(tempfile.gettempdir()).free}
        free = {name: size // processes.local_world_size() for name, size in shared.items()}
        if self.device.type == "cuda":
            free = {"gpu": torch.cuda.mem_get_info(self.device)[0], **free}
        limit = self.limit // processes.local_world_size()
        needed = sum(map(layout.nbytes, lengths))
        return plan_cache(needed, location=self.location, limit=limit, free=free)

    def fill(self, prompts: Sequence[Ids], layout: Layout | None) -> None:
        """Compute and cache these prompts and drop earlier ones. Do nothing if the last call included them all."""
        prompts = list(dict.fromkeys(prompts))
        if prompts and self._prompts.issuperset(prompts):
            return
        self.clear()
        self._prompts = frozenset(prompts)
        plan = self.plan([len(ids) for ids in prompts], layout)
        logger.info("%d prompts: %s", len(prompts), plan.reason)
        if layout is None or plan.location == "nowhere":
            return
        self.cache = cache = PromptCache(layout, plan=plan, device=self.device)
        with Progress("cache prompts", total=len(prompts), unit="prompts") as progress:
            for group in group_by_length(prompts, len):
                fitting = [ids for ids in group if cache.fits(len(ids))]
                for ids, states in zip(fitting, self.compute(fitting) if fitting else [], strict=True):
                    if cache.fits(len(ids)):  # earlier prompts of the group have taken space
                        cache.put(ids, states)
                progress.advance(len(group))

    def clear(self) -> None:
        if self.cache is None and not self._prompts:
            return
        self.cache, self._prompts = None, frozenset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def get(self, prompts: Sequence[Ids]) -> list[PromptState]:
        """Return the state of each prompt, from the cache or computed now."""
        cached = {} if self.cache is None else self.cache.states
        states = {ids: cached[ids] for ids in prompts if ids in cached}
        for group in group_by_length([ids for ids in dict.fromkeys(prompts) if ids not in states], len):
            states.update(zip(group, self.compute(group), strict=True))
        return [states[ids] for ids in prompts]
