"""Plan and storage of cached prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from personaplug.errors import StorageError
from personaplug.llm.prompt_cache import PromptCache, plan_cache
from personaplug.llm.prompt_state import Block, Layout, Part, PromptState

GIGA = 10**9
LAYOUT = Layout((Block(4, (2, 3), torch.float32),), ())
# Attention with two head sizes, and the states of a recurrent layer.
MIXED = Layout(
    (
        Block(2, (2, 3), torch.float32),
        Block(2, (1, 5), torch.float32),
        Block(3, (7, 2), torch.bfloat16, grows=False),
    ),
    (),
)


@pytest.mark.parametrize(
    ("needed", "settings", "location", "size", "reason"),
    [
        (3, {}, "memory", 3, "cached in memory: 3.00 GB of at most 4.00 GB, half of the free space"),
        (6, {}, "disk", 6, "the memory offers 4.00 GB"),
        (1, {"gpu": 2 * GIGA}, "gpu", 1, "cached on the GPU"),
        (3, {"gpu": 2 * GIGA}, "memory", 3, "the gpu offers 1.00 GB"),
        (60, {}, "disk", 10, "17% of 60.00 GB cached on disk"),
        (60, {"disk": 4 * GIGA}, "memory", 4, "the rest is recomputed without gradients"),
        (3, {"location": "disk"}, "disk", 3, "cached on disk"),
        (6, {"location": "memory"}, "memory", 4, "67% of 6.00 GB cached in memory"),
        (3, {"limit": 2 * GIGA}, "memory", 2, "the configured limit"),
        (6, {"limit": 100 * GIGA}, "disk", 6, "half of the free space"),
        (3, {"location": "nowhere"}, "nowhere", 0, "prompt_cache=nowhere"),
    ],
)
def test_plan_cache_chooses_first_location_with_enough_space(
    needed: int, settings: dict[str, int | str], location: str, size: int, reason: str
) -> None:
    defaults = {"gpu": 0, "memory": 8 * GIGA, "disk": 20 * GIGA}
    free = {name: int(settings.get(name, default)) for name, default in defaults.items()}
    plan = plan_cache(
        needed * GIGA,
        location=str(settings.get("location", "auto")),
        limit=int(settings.get("limit", 0)),
        free={name: space for name, space in free.items() if space},
    )
    assert (plan.location, plan.bytes) == (location, size * GIGA)
    assert reason in plan.reason


def _state(layout: Layout, tokens: int) -> PromptState:
    torch.manual_seed(tokens)
    blocks = [torch.randn(block.parts, *block.part_shape(tokens)).to(block.dtype) for block in layout.blocks]
    return PromptState(layout, tuple(blocks), tokens)


@pytest.mark.parametrize("location", ["memory", "disk"])
@pytest.mark.parametrize("layout", [LAYOUT, MIXED], ids=["attention", "mixed"])
def test_prompt_cache_returns_stored_states(location: str, layout: Layout) -> None:
    size = layout.nbytes(3) + layout.nbytes(5)
    plan = plan_cache(size, location=location, limit=0, free={"memory": GIGA, "disk": GIGA})
    cache = PromptCache(layout, plan=plan)
    states = {(1, 2, 3): _state(layout, 3), (1, 2, 3, 4, 5): _state(layout, 5)}
    for ids, state in states.items():
        assert cache.fits(len(ids))
        cache.put(ids, state)
    assert not cache.fits(1)
    for ids, state in states.items():
        for stored, block in zip(cache.states[ids].blocks, state.blocks, strict=True):
            assert torch.equal(stored, block)


def test_bytes_of_a_prompt_are_those_of_its_tensors_and_their_alignment() -> None:
    assert LAYOUT.token_bytes == 4 * 2 * 3 * 4
    assert (LAYOUT.nbytes(5), LAYOUT.recurrent_bytes) == (5 * LAYOUT.token_bytes, 0)
    assert MIXED.recurrent_bytes == 96  # 3 parts of 14 values of 2 bytes, up to a multiple of 16
    assert MIXED.nbytes(1) == 48 + 48 + 96


def test_layout_survives_json() -> None:
    parts = (Part(0, "keys", 0, 0), Part(0, "values", 0, 1), Part(1, "conv.0", 2, 0))
    layout = Layout(MIXED.blocks, parts)
    assert Layout.from_json(json.loads(json.dumps(layout.as_json()))) == layout


def test_prompt_cache_on_full_disk_raises_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    plan = plan_cache(LAYOUT.token_bytes, location="disk", limit=0, free={"memory": GIGA, "disk": GIGA})
    with pytest.raises(StorageError, match="No space left"):
        PromptCache(LAYOUT, plan=plan)
