"""Rejections and stated preferences in a plug, and which items of a long history are used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from plugs import OUT, QUERIES, WIDTH, build_history, build_plug, head_of

from personaplug.data.parsing import item_of
from personaplug.data.records import ITEM_KINDS
from personaplug.data.task_registry import CHAT
from personaplug.encoders import HashEncoder
from personaplug.encoders.encoded_sample import PREFERENCE_KIND, all_answers, latest_items
from personaplug.plug.layers import ColdStart
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer

REJECTION_KIND = ITEM_KINDS.index("rejection")


def build_trained(**settings: Any) -> PersonaPlug:
    """Return a plug that distinguishes item kinds, like a trained plug."""
    plug = build_plug(kinds=True, **settings)
    kind = head_of(plug).projector.kind
    assert kind is not None
    with torch.no_grad():
        kind.copy_(torch.randn_like(kind))
    return plug


def test_kinds_do_not_change_a_persona_of_answers_only() -> None:
    history = build_history()
    torch.testing.assert_close(build_trained()(QUERIES, history).vectors, build_plug()(QUERIES, history).vectors)


@pytest.mark.parametrize("kind_id", [REJECTION_KIND, PREFERENCE_KIND])
def test_kind_of_an_item_changes_only_the_persona_of_its_user(kind_id: int) -> None:
    plug, history = build_trained(), build_history()
    kind_ids = history.kind_ids.clone()
    kind_ids[0] = kind_id
    before, after = (plug(QUERIES, h).vectors for h in (history, replace(history, kind_ids=kind_ids)))
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:])


def test_precomputed_history_gives_the_same_persona_with_kinds() -> None:
    plug, history = build_trained(), build_history()
    history = replace(history, kind_ids=torch.tensor([0, 1, 2, 0, 2, 1]))
    head = head_of(plug)
    torch.testing.assert_close(plug(QUERIES, head.precompute(history)).vectors, plug(QUERIES, history).vectors)


def test_user_with_a_preference_is_never_cold() -> None:
    plug, history = build_trained(), build_history()
    plug.cold_start = ColdStart(torch.zeros(2, OUT), max_items=3)
    assert plug.cold_start.is_cold(history).tolist() == [False, True, True]
    assert not plug(QUERIES, history).vectors[1].any()
    kind_ids = history.kind_ids.clone()
    kind_ids[4] = PREFERENCE_KIND
    stated = replace(history, kind_ids=kind_ids)
    assert plug.cold_start.is_cold(stated).tolist() == [False, False, True]
    assert plug(QUERIES, stated).vectors[1].any()


@pytest.mark.parametrize(
    ("kinds", "limit", "expected"),
    [
        ([2, 0, 0, 2, 0, 1], 4, [0, 3, 4, 5]),
        ([2, 0, 0, 2, 0, 1], 1, [3]),
        ([2, 0, 0, 2, 0, 1], 0, []),
        ([0, 0, 0], 2, [1, 2]),
        ([0, 2], 9, [0, 1]),
        ([], 3, []),
    ],
)
def test_latest_items_keep_stated_preferences(kinds: list[int], limit: int, expected: list[int]) -> None:
    assert latest_items(np.array(kinds, dtype=np.int8), limit).tolist() == expected


@pytest.mark.parametrize("kinds", [True, False])
def test_items_of_kinds_without_training_are_ignored(kinds: bool) -> None:
    plug, kind_ids = build_plug(kinds=kinds), np.array([0, 2, 1, 0], dtype=np.int8)
    assert plug.known_items(kind_ids).tolist() == [0, 3]
    assert build_trained().known_items(kind_ids).tolist() == [0, 1, 2, 3]
    record = {"id": "p", "preference": "short answers"}
    encoder = HashEncoder(WIDTH)
    assert len(Personalizer(build_plug(encoder, kinds=kinds)).encode([item_of(CHAT, record)[1]], encoder=encoder)) == 0


def test_old_preference_is_encoded_with_the_latest_items() -> None:
    records = [{"id": "p", "preference": "short answers"}]
    records += [{"id": str(n), "question": f"q{n}", "answer": "a"} for n in range(9)]
    items = [item_of(CHAT, record)[1] for record in records]
    encoder = HashEncoder(WIDTH)
    personalizer = Personalizer(build_trained(encoder=encoder, max_history=3))
    history = personalizer.encode(items, encoder=encoder)
    assert history.kind_ids.tolist() == [PREFERENCE_KIND, 0, 0]
    np.testing.assert_array_equal(history.vectors[0], encoder.encode(["preference: short answers"])[0].astype("f2"))
    assert history.select(slice(1, None)).kind_ids.tolist() == all_answers(2).tolist()
