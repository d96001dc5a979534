"""Joint encoders: parts of vectors, missing parts, names, identities, and the store of embeddings."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_pictures import drawn

from personaplug.data.records import Content, HistoryItem, ItemContent
from personaplug.encoders import EncoderIdentity, HashEncoder, JointEncoder, open_encoder
from personaplug.encoders.base import encode_items
from personaplug.encoders.embedding_store import EmbeddingStore, content_key
from personaplug.encoders.joint import OutsideVectors, only_part, part_slice
from personaplug.encoders.pictures import PixelEncoder
from personaplug.errors import ConfigError, EncoderMismatch, ItemError

NAME = "hash:16+pictures:pixels+vectors:shop-1:3"
RED = drawn("red")
OUTSIDE = np.array([0, 3, 4], dtype="<f4").tobytes()


def _parts(vectors: np.ndarray) -> list[np.ndarray]:
    return np.split(vectors, [16, 16 + PixelEncoder.width], axis=1)


def test_each_part_of_an_item_is_the_unit_vector_of_its_encoder() -> None:
    encoder = open_encoder(NAME)
    vectors = encode_items(encoder, ["a cup", ItemContent("", RED), ItemContent("a cup", RED, OUTSIDE)])
    text, picture, outside = _parts(vectors)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    expected = HashEncoder(16).encode(["a cup"])[0]
    np.testing.assert_allclose(text, [expected, 0 * expected, expected / np.sqrt(3)], atol=1e-6)
    expected = PixelEncoder().encode([RED])[0]
    np.testing.assert_allclose(picture, [0 * expected, expected, expected / np.sqrt(3)], atol=1e-6)
    np.testing.assert_allclose(outside[2] * np.sqrt(3), [0, 0.6, 0.8], atol=1e-6)
    assert not outside[:2].any()


def test_texts_alone_and_queries_have_the_text_part_alone() -> None:
    encoder = open_encoder(NAME)
    items, queries = encoder.encode(["tea", ""]), encoder.query_encoder().encode(["tea", ""])
    for vectors in (items, queries):
        assert vectors.shape == (2, encoder.width)
        np.testing.assert_allclose(vectors[:, :16], HashEncoder(16).encode(["tea", ""]), atol=1e-6)
        assert not vectors[:, 16:].any()
    assert encode_items(encoder, []).shape == (0, encoder.width)


def test_trained_copy_for_queries_learns_the_text_part() -> None:
    query_encoder = open_encoder(NAME).query_encoder()
    vectors = query_encoder(query_encoder.features(["tea"]))
    vectors[:, :4].sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in query_encoder.parameters())


def test_blank_texts_of_an_item_with_a_picture_are_no_text() -> None:
    fields = (("title", " "), ("label", "good"))
    item = HistoryItem("1", fields, "label", picture=RED)
    assert item.encoded(with_answer=False) == ItemContent("", RED)
    assert item.encoded(with_answer=True) == ItemContent("title:   label: good", RED)
    assert HistoryItem("1", fields, "label").encoded(with_answer=False) == "title:  "


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("hash:16", ItemContent("a", RED), r"reads texts alone.*\+pictures:NAME"),
        ("hash:16", ItemContent("a", None, OUTSIDE), r"reads texts alone"),
        ("hash:16+pictures:pixels", ItemContent("a", RED, OUTSIDE), r"no part for it. Add \+vectors:NAME:WIDTH"),
        ("hash:16+vectors:x:3", ItemContent("", RED), r"no part for it. Add \+pictures:NAME"),
    ],
)
def test_item_with_a_part_that_the_encoder_does_not_read_is_refused(name: str, content: Content, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_items(open_encoder(name), ["other", content])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([1.0, 2.0], "'shop-1' have 3 numbers each; found 2"),
        ([0.0, 0.0, 0.0], "only zeros"),
        ([1.0, float("nan"), 0.0], "not finite"),
    ],
)
def test_outside_vector_of_another_width_or_without_direction_is_refused(numbers: list[float], message: str) -> None:
    with pytest.raises(ItemError, match=message):
        OutsideVectors("shop-1", 3).unit_rows([OUTSIDE, np.array(numbers, dtype="<f4").tobytes()])


def test_vectors_of_large_numbers_keep_their_direction() -> None:
    rows = OutsideVectors("shop-1", 2).unit_rows([np.array([3e38, -3e38], dtype="<f4").tobytes()])
    np.testing.assert_allclose(rows, [[np.sqrt(0.5), -np.sqrt(0.5)]], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hash:16+pictures:pixels+pictures:pixels", "at most one part"),
        ("hash:16+vectors:shop", "need a name and a width"),
        ("hash:16+vectors:shop:0", "need a name and a width"),
        ("hash:16+vectors:a shop:3", "need a name and a width"),
    ],
)
def test_wrong_name_of_a_joint_encoder_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_encoder(name)


def test_name_in_the_identity_opens_an_equal_encoder() -> None:
    identity = open_encoder(NAME).identity
    assert identity.name == "hash:16+pictures:pixels+vectors:shop-1:3"
    assert open_encoder(identity.name).identity == identity
    assert identity.parts == (("text", 16), ("picture", PixelEncoder.width), ("vector", 3))


def test_identity_survives_json_and_that_of_a_text_encoder_is_as_before() -> None:
    identity = open_encoder(NAME).identity
    values = {**identity.to_dict(), "parts": [list(part) for part in identity.parts]}  # as JSON has it
    assert EncoderIdentity.from_dict(values) == identity
    assert "parts" not in HashEncoder(16).identity.to_dict()
    with pytest.raises(ConfigError, match="needs exactly these fields"):
        EncoderIdentity.from_dict({**values, "parts": [["text"]]})


def test_identities_differ_by_every_part() -> None:
    names = ["hash:16", "hash:16+pictures:pixels", "hash:16+vectors:a:3", "hash:16+vectors:b:3", NAME]
    identities = [open_encoder(name).identity for name in names]
    assert not any(one.same_items_as(other) for one, other in permutations(identities, 2))


def test_parts_are_found_by_name() -> None:
    identity = open_encoder("hash:16+vectors:shop-1:3").identity
    assert part_slice(identity, "vector") == slice(16, 19)
    with pytest.raises(ConfigError, match="no part 'picture'; it has the parts: text, vector"):
        part_slice(identity, "picture")
    with pytest.raises(ConfigError, match="it has the parts: text"):
        part_slice(HashEncoder(16).identity, "picture")


def test_one_part_alone_has_length_1_or_is_missing() -> None:
    encoder = open_encoder(NAME)
    contents: list[Content] = ["a cup", ItemContent("a cup", RED)]
    vectors = torch.from_numpy(encode_items(encoder, contents)).half()
    alone = only_part(vectors, encoder.identity, "picture")
    assert alone.dtype == torch.float16
    np.testing.assert_allclose(alone.float().norm(dim=1), [0, 1], atol=1e-3)
    np.testing.assert_allclose(alone[1, 16:-3], PixelEncoder().encode([RED])[0], atol=1e-3)


def test_embedding_store_encodes_a_pictured_item_once(tmp_path: Path) -> None:
    encoder = open_encoder("hash:16+pictures:pixels")
    path = tmp_path / "red.png"
    path.write_bytes(RED.read())
    store = EmbeddingStore.open(tmp_path / "vectors", encoder)
    rows = store.add(["a cup", ItemContent("a cup", RED), ItemContent("a cup", drawn("blue")), ItemContent("", RED)])
    again = store.add([ItemContent("a cup", type(RED)(path)), "a cup"])
    assert len(set(rows.tolist())) == 4
    assert again.tolist() == [rows[1], rows[0]]
    np.testing.assert_allclose(store.gather(rows[:1])[0], encoder.encode(["a cup"])[0], atol=1e-3)
    with pytest.raises(EncoderMismatch):
        EmbeddingStore.open(tmp_path / "vectors", HashEncoder(16))


def test_content_keys_differ_by_every_part() -> None:
    contents: list[Content] = [
        "a",
        ItemContent("a"),
        ItemContent("a", RED),
        ItemContent("", RED),
        ItemContent("a", None, OUTSIDE),
    ]
    contents += [ItemContent("a", drawn("blue")), ItemContent("a", RED, OUTSIDE), ItemContent("a", None, RED.read())]
    keys = {content_key(content) for content in contents}
    assert len(keys) == len(contents)


def test_truncated_texts_are_counted_by_the_text_encoder() -> None:
    assert JointEncoder(HashEncoder(16), pictures=PixelEncoder()).truncated == 0
