"""Pictures: the forms of a value that are read, those that are refused, and pictures in files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from picture_rows import BLUE, RED, cut_png, data_url, png

from personaplug.data import pictures
from personaplug.data.picture_decoding import is_damaged
from personaplug.data.pictures import Picture, format_of, picture_of
from personaplug.data.values import Flaw
from personaplug.errors import MissingData

SECRET = "zanzibar"
PNG = png(RED)
FORMS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda _: PNG,
    "bytearray": lambda _: bytearray(PNG),
    "memoryview": lambda _: memoryview(PNG),
    "data URL": lambda _: data_url(PNG),
    "data URL of another type": lambda _: data_url(PNG).replace("image/png", "image/svg+xml"),
    "data URL in capitals, after spaces": lambda _: "  " + data_url(PNG).replace("data:image/png", "DATA:Image/PNG"),
    "bytes of Hugging Face": lambda _: {"bytes": PNG, "path": "elsewhere.png"},
    "path of Hugging Face": lambda _: {"bytes": None, "path": "red.png"},
    "relative path": lambda _: "red.png",
    "absolute path": lambda folder: str(folder / "red.png"),
    "Path": lambda folder: folder / "red.png",
    "Picture": lambda _: Picture(PNG),
}
PLACES = ("path of Hugging Face", "relative path", "absolute path", "Path")


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_picture(form: str, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(PNG)
    picture = picture_of(FORMS[form](tmp_path), "it", folder=tmp_path)
    assert picture is not None
    assert (picture.read(), picture.format, picture.to_url()) == (PNG, "png", data_url(PNG))
    assert (picture, hash(picture)) == (Picture(PNG), hash(Picture(PNG)))
    assert picture != Picture(png(BLUE))
    assert picture != PNG
    assert isinstance(picture.source, Path) == (form in PLACES)


@pytest.mark.parametrize("form", PLACES)
def test_paths_of_strangers_are_refused_whether_the_file_exists_or_not(form: str, tmp_path: Path) -> None:
    messages = set()
    for content in (PNG, b"no picture", None):
        (tmp_path / "red.png").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "red.png").write_bytes(content)
        with pytest.raises(Flaw) as caught:
            picture_of(FORMS[form](tmp_path), "its 'photo'")
        messages.add(str(caught.value))
    assert messages == {"its 'photo' is no picture: expected a data URL such as data:image/png;base64,…"}


@pytest.mark.parametrize("value", [None, "", b"", {"bytes": None, "path": None}, {"bytes": b"", "path": ""}])
def test_empty_values_are_no_picture(value: object) -> None:
    assert picture_of(value, "it") is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (SECRET.encode(), "is no picture in one of the formats png, jpeg, gif, webp, bmp"),
        (b"<svg>" + SECRET.encode(), "is no picture in one of the formats"),
        (data_url(SECRET.encode()), "is no picture in one of the formats"),
        (f"data:image/png;base64,{SECRET}!", "its base64 is not valid"),
        (f"data:image/png;base64,{SECRET}a", "its base64 is not valid"),
        (f"data:text/plain;base64,{SECRET}", "is a data URL of another kind"),
        (f"data:image/png,{SECRET}", "is a data URL of another kind"),
        (f"{SECRET}.png", "names a file that does not exist"),
        (f"{SECRET}\0.png", "names a file that does not exist"),
        (SECRET * 600, "names a file that does not exist"),
        (".", "names a file that does not exist"),
        ("text.png", "names a file that is no picture in one of the formats"),
        (f"https://{SECRET}/a.png", "names a file that does not exist"),
        (7, "is no picture: expected"),
        ([SECRET], "is no picture: expected"),
        ({"url": SECRET}, "is no picture: expected"),
    ],
)
def test_other_values_are_refused_without_quoting_them(value: object, reason: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text(SECRET)
    with pytest.raises(Flaw) as caught:
        picture_of(value, "its 'photo'", folder=tmp_path)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("its 'photo'")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("form", ["bytes", "data URL", "relative path"])
def test_too_large_pictures_are_refused(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", len(PNG) - 1)
    (tmp_path / "red.png").write_bytes(PNG)
    with pytest.raises(Flaw, match="is larger than 0 MiB"):
        picture_of(FORMS[form](tmp_path), "it", folder=tmp_path)


def test_a_picture_in_a_file_is_read_when_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(PNG)
    picture = picture_of("red.png", "it", folder=tmp_path)
    assert picture is not None
    assert picture == Picture(PNG)
    path.write_bytes(png(BLUE))
    os.utime(path, ns=(1, 1))  # as if it was changed at another time
    assert picture == Picture(png(BLUE))
    path.unlink()
    with pytest.raises(MissingData, match=r"red\.png cannot be read"):
        picture.read()
    with pytest.raises(MissingData, match=r"red\.png cannot be read"):
        hash(picture)


def test_a_repr_shows_no_pixels() -> None:
    assert repr(Picture(PNG)) == "Picture(bytes)"
    assert repr(Picture(Path("red.png"))) == "Picture(file)"


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"GIF89a", "gif"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "webp"),
        (b"BM\x10\0", "bmp"),
        (b"\x89PNG\r\n", None),
        (b"RIFF\x10\0\0\0WAVE", None),
        (b"", None),
    ],
)
def test_formats_are_told_by_the_first_bytes(start: bytes, name: str | None) -> None:
    assert format_of(start) == name


def test_images_of_pillow_become_png() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    picture = picture_of(image.new("CMYK", (4, 3)), "it")
    assert picture is not None
    assert picture.format == "png"
    assert not is_damaged(picture)


def test_damaged_pictures_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    (tmp_path / "cut.png").write_bytes(cut_png())
    found = [Picture(PNG), Picture(cut_png()), Picture(tmp_path / "cut.png"), Picture(tmp_path / "gone.png")]
    assert [is_damaged(picture) for picture in found] == [False, True, True, True]
    monkeypatch.setattr("personaplug.data.picture_decoding.MAX_PIXELS", 63)
    assert is_damaged(Picture(PNG))
