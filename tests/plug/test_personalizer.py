"""Personalizer: one user's persona from encoded or precomputed items."""

from __future__ import annotations

from typing import Any

import torch
from plugs import WIDTH, build_plug

from personaplug.data.records import HistoryItem
from personaplug.encoders import HashEncoder
from personaplug.plug.personalizer import Personalizer

ENCODER = HashEncoder(WIDTH)


def _items(*answers: str) -> list[HistoryItem]:
    return [HistoryItem(str(n), (("text", f"a film {n}"), ("score", a)), "score") for n, a in enumerate(answers)]


def test_personalizer_ignores_outer_white_space_of_an_answer() -> None:
    personalizer = Personalizer(build_plug(ENCODER, labels=("1", "2", "3"), answer_channel="label"))

    def persona(answer: str) -> torch.Tensor:
        return personalizer.persona("x", personalizer.encode(_items(answer), encoder=ENCODER)).vectors

    assert torch.equal(persona("3"), persona(" 3 "))
    assert not torch.equal(persona("3"), persona("2"))


def test_personalizer_precomputed_history_gives_the_same_persona() -> None:
    cases: list[dict[str, Any]] = [{}, {"persona_tokens": 0}]
    for settings in cases:
        personalizer = Personalizer(build_plug(ENCODER, **settings), persona_scale=0.5)
        history = personalizer.encode(_items("1", "2", "3"), encoder=ENCODER)
        direct = personalizer.persona("a film 2", history)
        precomputed = personalizer.persona("a film 2", personalizer.precompute(history))
        torch.testing.assert_close(precomputed.vectors, direct.vectors)
