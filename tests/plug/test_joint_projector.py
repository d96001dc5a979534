"""JointProjector: shares of parts, missing parts, and plugs that read joint vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_pictures import drawn
from plugs import build_plug, head_of
from torch import Tensor

from personaplug.data.records import HistoryItem
from personaplug.encoders import open_encoder
from personaplug.encoders.encoded_sample import EncodedHistory, all_answers, no_style
from personaplug.encoders.pictures import PixelEncoder
from personaplug.errors import DamagedFile
from personaplug.plug.layers import JointProjector
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import check_sizes, read_description

ENCODER = "hash:16+pictures:pixels"
TEXT = [1.0, 0.0]
PICTURE = [0.0, 0.6, 0.8]
ITEMS = torch.tensor([[*TEXT, 0, 0, 0], [0, 0, *PICTURE], [*TEXT, *PICTURE]])
ITEMS[2] /= 2**0.5
ANSWERS: dict[str, Any] = {
    "label_ids": torch.full((3,), -1),
    "style": torch.zeros(3, 0),
    "kind_ids": torch.zeros(3, dtype=torch.int64),
}


def _projector() -> JointProjector:
    torch.manual_seed(0)
    projector = JointProjector([2, 3], hidden=6, tokens=2, out=4, labels=0, style=0, kinds=0)
    for part in projector.parts:
        torch.nn.init.normal_(part.outer.bias)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        projector.part_scores.copy_(torch.tensor([0.0, 1.0]))
    return projector


def _single(projector: JointProjector, part: int, vector: Tensor) -> Tensor:
    """Return the tokens of one item with one part, from the part's own projector."""
    own = projector.parts[part]
    answers = {name: values[:1] for name, values in ANSWERS.items()}
    hidden = own.hidden(vector[None], **answers)  # type: ignore[operator]
    return own.out(hidden, weight_sums=torch.ones(1), tokens=slice(None))[0]  # type: ignore[no-any-return, operator]


def _tokens(projector: JointProjector, items: Tensor, weights: Tensor) -> Tensor:
    hidden = projector.hidden(items, **{name: values[: len(items)] for name, values in ANSWERS.items()})
    return projector.out((weights @ hidden)[None], weight_sums=weights.sum()[None], tokens=slice(None))[0]


def test_tokens_are_the_weighted_sum_of_each_parts_projection() -> None:
    projector = _projector()
    text = _single(projector, 0, torch.tensor(TEXT))
    picture = _single(projector, 1, torch.tensor(PICTURE))
    share = 1 / (1 + torch.tensor(1.0).exp())  # of the text, if an item has both parts
    both = share * text + (1 - share) * picture
    weights = torch.tensor([0.5, 0.3, 0.2])
    expected = 0.5 * text + 0.3 * picture + 0.2 * both
    torch.testing.assert_close(_tokens(projector, ITEMS, weights), expected)


def test_missing_part_has_no_influence_and_gets_no_gradient() -> None:
    projector = _projector()
    torch.autograd.backward(_tokens(projector, ITEMS[:1], torch.ones(1)).sum())
    picture_part = [parameter.grad for parameter in projector.parts[1].parameters()]
    assert not any(gradient is not None and gradient.any() for gradient in picture_part)
    assert projector.part_scores.grad is not None
    assert not projector.part_scores.grad.any()


def test_item_without_any_part_adds_nothing() -> None:
    projector = _projector()
    nothing = torch.zeros(1, 5)
    assert not _tokens(projector, nothing, torch.ones(1)).any()
    assert torch.isfinite(projector.hidden(torch.cat([ITEMS[:2], nothing]), **ANSWERS)).all()


def test_user_without_items_gets_finite_tokens() -> None:
    hidden = _projector().hidden(ITEMS[:0], **{name: values[:0] for name, values in ANSWERS.items()})
    assert hidden.shape == (0, 14)


def _plug(**settings: Any) -> PersonaPlug:
    return build_plug(open_encoder(ENCODER), shrinkage=True, kinds=True, query_encoder="head", **settings)


def _item(name: str, *, color: str | None) -> HistoryItem:
    return HistoryItem(name, (("title", name),), None, picture=drawn(color) if color else None)


def _persona(plug: PersonaPlug, *items: HistoryItem) -> Tensor:
    personalizer = Personalizer(plug)
    return personalizer.persona("tea", personalizer.encode(items, encoder=open_encoder(ENCODER))).vectors


def test_plug_reads_texts_and_pictures() -> None:
    plug = _plug()
    red, blue = _persona(plug, _item("a", color="red")), _persona(plug, _item("a", color="blue"))
    other, without = _persona(plug, _item("b", color="red")), _persona(plug, _item("a", color=None))
    for changed in (blue, other, without):
        assert not torch.allclose(red, changed, atol=1e-3)


@pytest.mark.parametrize(("part", "unread"), [("text", _item("a", color="blue")), ("picture", _item("b", color="red"))])
def test_plug_of_one_part_ignores_the_other(part: Any, unread: HistoryItem) -> None:
    plug = _plug(item_parts=part)
    torch.testing.assert_close(_persona(plug, unread), _persona(plug, _item("a", color="red")), atol=1e-3, rtol=1e-3)


def test_precomputed_history_gives_the_same_persona() -> None:
    personalizer = Personalizer(_plug())
    items = [_item("a", color="red"), _item("b", color=None)]
    history = personalizer.encode(items, encoder=open_encoder(ENCODER))
    expected = personalizer.persona("tea", history).vectors
    torch.testing.assert_close(personalizer.persona("tea", personalizer.precompute(history)).vectors, expected)


def test_items_in_bfloat16_give_nearly_the_same_persona() -> None:
    plug, items = _plug(), [_item("a", color="red"), _item("b", color=None), _item("c", color="green")]
    exact = _persona(plug, *items)
    approximate = _persona(plug.compute_items_in("bfloat16"), *items)
    assert not torch.equal(approximate, exact)
    torch.testing.assert_close(approximate, exact, atol=0.02, rtol=0.03)


def test_saved_plug_reads_pictures_as_before(tmp_path: Path) -> None:
    plug, encoder = _plug(), open_encoder(ENCODER)
    plug.save_pretrained(tmp_path)
    loaded = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=plug.spec.llm)
    assert loaded.spec == plug.spec
    item = _item("a", color="red")
    torch.testing.assert_close(_persona(loaded, item), _persona(plug, item))


def test_description_with_parts_of_another_width_is_refused(tmp_path: Path) -> None:
    plug = _plug()
    plug.save_pretrained(tmp_path)
    config, spec, _ = read_description(tmp_path)
    narrower = replace(spec, encoder=replace(spec.encoder, parts=(("text", 16), ("picture", PixelEncoder.width - 1))))
    check_sizes(tmp_path, config, spec)
    with pytest.raises(DamagedFile):
        check_sizes(tmp_path, config, narrower)


def test_rejected_item_with_a_picture_is_known_after_training() -> None:
    plug = _plug()
    with torch.no_grad():
        head_of(plug).projector.parts[1].kind[0, 0] = 1.0
    assert plug.known_kinds == ("answer", "rejection")
    assert _plug().known_kinds == ("answer",)


def test_vectors_of_a_store_are_read_by_parts() -> None:
    encoder = open_encoder(ENCODER)
    plug = _plug(item_parts="picture")
    vectors = encoder.encode(["only text"]).astype(np.float16)
    history = EncodedHistory(vectors, np.full(1, -1, np.int16), no_style(1), all_answers(1))
    assert not Personalizer(plug).collate(history).vectors.any()
