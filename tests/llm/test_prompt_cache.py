"""Plan and storage of cached prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from personaplug.errors import StorageError
from personaplug.llm.prompt_cache import Layout, PromptCache, plan_cache

GIGA = 10**9
LAYOUT = Layout(parts=4, heads=2, width=3, dtype=torch.float32)


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


@pytest.mark.parametrize("location", ["memory", "disk"])
def test_prompt_cache_returns_stored_states(location: str) -> None:
    plan = plan_cache(8 * LAYOUT.token_bytes, location=location, limit=0, free={"memory": GIGA, "disk": GIGA})
    cache = PromptCache(LAYOUT, plan=plan)
    first, second = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 5, 3)
    cache.put((1, 2, 3), first)
    cache.put((1, 2, 3, 4, 5), second)
    assert not cache.fits(1)
    assert list(cache.states) == [(1, 2, 3), (1, 2, 3, 4, 5)]
    assert torch.equal(cache.states[1, 2, 3], first)
    assert torch.equal(cache.states[1, 2, 3, 4, 5], second)


def test_prompt_cache_on_full_disk_raises_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    plan = plan_cache(LAYOUT.token_bytes, location="disk", limit=0, free={"memory": GIGA, "disk": GIGA})
    with pytest.raises(StorageError, match="No space left"):
        PromptCache(LAYOUT, plan=plan)
