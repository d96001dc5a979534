"""Where prompts are kept, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from personaplug.errors import StorageError
from personaplug.llm.prompt_cache import Layout, PromptCache, padded_states, plan_cache

GIGA = 10**9
LAYOUT = Layout(parts=4, heads=2, width=3, dtype=torch.float32)


@pytest.mark.parametrize(
    ("needed", "settings", "place", "held", "said"),
    [
        (3, {}, "memory", 3, "kept in memory: 3.00 GB of at most 4.00 GB, half of what is free"),
        (6, {}, "disk", 6, "the memory offers 4.00 GB"),
        (1, {"gpu": 2 * GIGA}, "gpu", 1, "kept on the GPU"),
        (3, {"gpu": 2 * GIGA}, "memory", 3, "the gpu offers 1.00 GB"),
        (60, {}, "disk", 10, "17% of 60.00 GB kept on disk"),
        (60, {"disk": 4 * GIGA}, "memory", 4, "the others are read anew without gradients"),
        (3, {"wanted": "disk"}, "disk", 3, "kept on disk"),
        (6, {"wanted": "memory"}, "memory", 4, "67% of 6.00 GB kept in memory"),
        (3, {"limit": 2 * GIGA}, "memory", 2, "the limit given"),
        (6, {"limit": 100 * GIGA}, "disk", 6, "half of what is free"),
        (3, {"wanted": "nowhere"}, "nowhere", 0, "as asked"),
    ],
)
def test_room_is_taken_where_there_is_enough(
    needed: int, settings: dict[str, int | str], place: str, held: int, said: str
) -> None:
    places = {"gpu": 0, "memory": 8 * GIGA, "disk": 20 * GIGA}
    free = {place: settings.get(place, size) for place, size in places.items() if settings.get(place, size)}
    room = plan_cache(
        needed * GIGA,
        wanted=str(settings.get("wanted", "auto")),
        limit=int(settings.get("limit", 0)),
        free=free,  # type: ignore[arg-type]
    )
    assert (room.place, room.bytes) == (place, held * GIGA)
    assert said in room.reason


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_what_is_put_in_comes_out(place: str) -> None:
    room = plan_cache(8 * LAYOUT.bytes, wanted=place, limit=0, free={"memory": GIGA, "disk": GIGA})
    kept = PromptCache(LAYOUT, room=room)
    first, second = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 5, 3)
    kept.put((1, 2, 3), first)
    kept.put((1, 2, 3, 4, 5), second)
    assert not kept.fits(1)
    assert (1, 2, 3) in kept
    assert kept.get((9,)) is None
    got = kept.get((1, 2, 3)), kept.get((1, 2, 3, 4, 5))
    assert got[0] is not None
    assert got[1] is not None
    assert torch.equal(got[0], first)
    assert torch.equal(got[1], second)


def test_states_side_by_side_end_together() -> None:
    states = [torch.randn(4, 2, 2, 3), torch.randn(4, 2, 5, 3)]
    found = padded_states(states, device=torch.device("cpu"))
    assert found.shape == (4, 2, 2, 5, 3)
    assert torch.equal(found[:, 0, :, 3:], states[0])
    assert not found[:, 0, :, :3].any()
    assert torch.equal(found[:, 1], states[1])


def test_a_disk_without_room_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    room = plan_cache(LAYOUT.bytes, wanted="disk", limit=0, free={"memory": GIGA, "disk": GIGA})
    with pytest.raises(StorageError, match="No space left"):
        PromptCache(LAYOUT, room=room)
