"""Items with pictures and vectors over HTTP: add, list, read, explain, export and erase them, and refuse bad ones."""

from __future__ import annotations

import base64
import json
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from browser import check_accessibility, open_browser, open_page
from drawn_pictures import noise_png, plain_png
from live_server import ENCODER as TEXT_ENCODER
from live_server import TASK, open_service, served
from picture_rows import data_url

from personaplug.data.task import Task
from personaplug.encoders import open_encoder
from personaplug.errors import RequestError
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.api_keys import ApiKeys, create_key
from personaplug.serving.fair_executor import FairExecutor
from personaplug.serving.feedback import MAX_TEXT, items_of_records

ENCODER = open_encoder("hash:32+pictures:pixels+vectors:catalogue:4")
PICTURED = replace(TASK, image_field="photo", vector_field="embedding")
PROMPT = "How would the user rate this? review: a film about tea"
PHOTO = data_url(noise_png(1))


@pytest.fixture(scope="module")
def url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that keeps pictures; each test has its own user."""
    folder = tmp_path_factory.mktemp("pictures")
    with served(open_service(toy, folder, task=PICTURED, encoder=ENCODER, keep_pictures=True)) as base_url:
        yield base_url


def _post(url: str, user: str, *items: dict[str, Any]) -> httpx.Response:
    # Not `json=`, because httpx refuses NaN.
    body = json.dumps({"items": items})
    headers = {"content-type": "application/json"}
    return httpx.post(f"{url}/v1/users/{user}/history", content=body, headers=headers)


def _listed(url: str, user: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = httpx.get(f"{url}/v1/users/{user}/history").raise_for_status().json()["items"]
    return items


def _png_of_size(width: int, height: int) -> bytes:
    """Return a PNG file whose header announces a size, without its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return noise_png(1)[:8] + chunk + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


def test_pictured_items_are_added_listed_explained_exported_and_erased(toy: CausalLM, tmp_path: Path) -> None:
    numbers = [0.123456789, -1.5, 2.25, 0.75]
    items: list[dict[str, Any]] = [
        {"id": "both", "text": "a red chair", "score": "4", "photo": PHOTO, "embedding": numbers},
        {"id": "photo", "score": "2", "photo": data_url(noise_png(2))},
        {"id": "text", "text": "a lamp", "score": "5"},
    ]
    service = open_service(toy, tmp_path, task=PICTURED, encoder=ENCODER, keep_pictures=True)
    with served(service) as url:
        user = f"{url}/v1/users/ann"
        assert _post(url, "ann", *items).json() == {"new": 3, "replaced": 0, "same": 0}
        assert _post(url, "ann", *items).json() == {"new": 0, "replaced": 0, "same": 3}
        about = {"type": "picture", "kept": True}
        both, photo, text = _listed(url, "ann")
        assert (both["photo"], photo["photo"]) == (
            about | {"size": len(noise_png(1))},
            about | {"size": len(noise_png(2))},
        )
        assert (both["embedding"], both["text"], photo["text"]) == (
            {"type": "vector", "kept": False},
            "a red chair",
            "",
        )
        assert {"photo", "embedding"}.isdisjoint(text)

        reply = httpx.get(f"{user}/history/both/picture")
        assert reply.content == noise_png(1)
        assert (reply.headers["content-type"], reply.headers["x-content-type-options"]) == ("image/png", "nosniff")
        assert reply.headers["cache-control"] == "private, no-store"
        missing = [httpx.get(f"{user}/history/{name}/picture") for name in ("text", "nothing")]
        assert [each.status_code for each in missing] == [404, 404]
        assert httpx.get(f"{url}/v1/users/nobody/history/both/picture").status_code == 404

        found = httpx.post(f"{user}/explain", json={"prompt": PROMPT, "answer": "4"}).raise_for_status().json()
        assert {item["id"] for item in found["items"]} == {"both", "photo", "text"}
        assert all(item["weight"] > 0 and item["effect"] for item in found["items"])
        assert all("base64" not in str(item) for item in found["items"])

        exported = httpx.get(f"{user}/export").json()["items"]
        assert [item["picture"] for item in exported] == [PHOTO, data_url(noise_png(2)), None]
        again = [{"id": item["id"], **dict(item["fields"]), "photo": item["picture"]} for item in exported[1:]]
        assert _post(url, "ann", *again).json() == {"new": 0, "replaced": 0, "same": 2}

        assert _post(url, "ann", {**items[0], "photo": data_url(noise_png(3))}).json()["replaced"] == 1
        assert httpx.get(f"{user}/history/both/picture").content == noise_png(3)
        assert httpx.delete(f"{user}/history/photo").status_code == 200
        joint = service.store.load_history("default", "ann").vectors[0].tobytes()
        part = service.store.load_history("default", "ann").vectors[0, -4:].tobytes()
        assert all(trace in _files(tmp_path) for trace in (noise_png(3)[-400:-300], joint, part))
        receipt = httpx.delete(user).json()
        assert (receipt["items"], receipt["wiped"]) == (2, ["tables", "log"])
        files = _files(tmp_path)
        for seed in (1, 2, 3):
            assert noise_png(seed)[100:164] not in files
            assert noise_png(seed)[-400:-300] not in files
        assert not any(trace in files for trace in (joint, part, np.array(numbers, dtype="<f4").tobytes()))
        assert httpx.get(f"{user}/history/both/picture").status_code == 404


def _files(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())


def test_picture_changes_the_persona(toy: CausalLM, tmp_path: Path) -> None:
    with served(open_service(toy, tmp_path, task=PICTURED, encoder=ENCODER)) as url:
        for user, color in (("ann", "red"), ("bob", "blue")):
            _post(url, user, {"text": "a chair", "score": "4", "photo": data_url(plain_png(color))})
        measured = [
            httpx.post(f"{url}/v1/users/{user}/explain", json={"prompt": PROMPT, "answer": "4"}).json()[
                "log_likelihood"
            ]
            for user in ("ann", "bob")
        ]
        assert measured[0]["with_population"] == pytest.approx(measured[1]["with_population"])
        assert abs(measured[0]["with_persona"] - measured[1]["with_persona"]) > 1e-4
        item = _listed(url, "ann")[0]
        assert item["photo"] == {"type": "picture", "kept": False}
        missing = httpx.get(f"{url}/v1/users/ann/history/{item['id']}/picture")
        assert (missing.status_code, missing.json()["error"]["message"]) == (404, "The store keeps no pictures.")
    assert noise_png(1)[100:164] not in _files(tmp_path)


def test_listed_item_is_refused_without_its_picture(url: str) -> None:
    """Else the item would lose its picture without a word."""
    _post(url, "listed", {"id": "1", "text": "a chair", "score": "4", "photo": PHOTO})
    _post(url, "listed", {"id": "2", "text": "a chair", "score": "4", "embedding": [1, 2, 3, 4]})
    for item in _listed(url, "listed"):
        reply = _post(url, "listed", item)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "item")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"photo": "data:image/png;base64,****secret****"}, "base64 is not valid"),
        ({"photo": data_url(b"a text file with a secret")}, "no picture in one of the formats png"),
        ({"photo": "data:text/plain;base64,c2VjcmV0"}, "a data URL of another kind"),
        ({"photo": "/etc/hostname"}, "expected a data URL"),
        ({"photo": {"path": "/etc/hostname"}}, "expected a data URL"),
        ({"photo": {"bytes": "secret"}}, "expected a data URL"),
        ({"photo": 17}, "expected a data URL"),
        ({"photo": data_url(noise_png(1)[:600])}, "cannot be decoded"),
        ({"photo": data_url(_png_of_size(9_000, 9_000))}, "at most 50,000,000 pixels"),
        ({"photo": data_url(_png_of_size(60_000, 60_000))}, "item 2: The picture"),
        (
            {"embedding": [1, 2, 3]},
            "item 2: The vectors 'catalogue' have 4 numbers each; found 3. No item of its batch",
        ),
        ({"embedding": [1, 2, float("nan"), 4]}, "not finite"),
        ({"embedding": [1, 2, 1e39, 4]}, "not finite"),
        ({"embedding": [0, 0, 0, 0]}, "only zeros"),
        ({"embedding": [1, 2, "secret", 4]}, "is no number"),
        ({"embedding": "secret"}, "expected a list of numbers"),
        ({"embedding": []}, "expected a list of numbers"),
        ({"picture": PHOTO}, "Send it as 'photo'"),
    ],
)
def test_unusable_picture_or_vector_is_a_clear_400(
    url: str, fields: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        reply = _post(url, "bad", {"text": "a chair", "score": "4"}, {"text": "a lamp", "score": "4", **fields})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "item")
    assert message in reply.json()["error"]["message"]
    assert "secret" not in reply.text + caplog.text
    assert base64.b64encode(noise_png(1)).decode()[40:80] not in reply.text + caplog.text
    assert httpx.get(f"{url}/v1/users/bad/history").json()["count"] == 0


def test_preference_with_a_picture_is_refused(url: str) -> None:
    reply = _post(url, "bad", {"preference": "Only red things.", "photo": PHOTO})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "item")


def test_picture_may_be_longer_than_a_text(url: str) -> None:
    photo = data_url(noise_png(4, side=240))
    assert len(photo) > MAX_TEXT
    assert _post(url, "long", {"score": "4", "photo": photo}).json()["new"] == 1
    for fields in ({"text": photo}, {"preference": photo}, {"text": "x" * (MAX_TEXT + 1)}):
        assert _post(url, "long", {"score": "4", **fields}).status_code in (400, 422)
    assert _post(url, "long", {"score": "4", "text": photo}).status_code == 422


def test_a_picture_counts_as_several_texts_when_tenants_share_the_encoder(
    toy: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs: list[float] = []
    run = FairExecutor.run_weighted

    async def noted(self: FairExecutor, *arguments: Any, cost: float) -> Any:
        costs.append(cost)
        return await run(self, *arguments, cost=cost)

    with served(open_service(toy, tmp_path, task=PICTURED, encoder=ENCODER)) as url:
        monkeypatch.setattr(FairExecutor, "run_weighted", noted)
        _post(url, "ann", {"text": "a chair", "score": "4"}, {"text": "a lamp", "score": "2", "photo": PHOTO})
    assert 1 + (1 + 10) in costs


def test_encoder_without_a_part_for_pictures_refuses_them(toy: CausalLM, tmp_path: Path) -> None:
    with served(open_service(toy, tmp_path, task=PICTURED, encoder=TEXT_ENCODER)) as url:
        for fields in ({"photo": PHOTO}, {"embedding": [1, 2, 3, 4]}):
            reply = _post(url, "ann", {"text": "a chair", "score": "4", **fields})
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "item")
            assert "a part for it" in reply.json()["error"]["message"]
        assert _post(url, "ann", {"text": "a chair", "score": "4"}).json()["new"] == 1


@pytest.mark.parametrize("seed", [1, 4])
def test_task_without_pictures_refuses_one_and_ignores_other_fields(toy: CausalLM, tmp_path: Path, seed: int) -> None:
    photo = data_url(noise_png(seed, side=10 if seed == 1 else 240))
    with served(open_service(toy, tmp_path)) as url:
        reply = _post(url, "ann", {"text": "a chair", "score": "4", "photo": photo})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "item")
        assert "no field for pictures of Films. Leave it out." in reply.json()["error"]["message"]
        chat_part = {"type": "image_url", "image_url": {"url": photo}}
        for other in (photo.replace("data:image", "DATA:Image"), f" {photo}", [photo], chat_part, [chat_part]):
            assert _post(url, "ann", {"text": "a chair", "score": "4", "photo": other}).status_code == 400
        assert _post(url, "ann", {"text": "a chair", "score": "4", "photo": "a word", "x": [1]}).json()["new"] == 1


def test_task_route_names_the_fields_of_pictures_and_vectors(url: str) -> None:
    about = httpx.get(f"{url}/v1/task").json()
    assert (about["image_field"], about["vector_field"]) == ("photo", "embedding")
    assert about["item_fields"] == ["text", "score"]
    assert about["name_field"] is None


def test_fields_of_a_picture_decide_among_several_tasks() -> None:
    ratings = replace(TASK, name="Ratings")
    photos = replace(ratings, name="Photos", image_field="photo")
    titles = Task("Titles", "text", ("body", "title"), "title", ("rouge_1",), vector_field="embedding")
    tasks = [ratings, photos, titles]

    def pictured(record: dict[str, Any]) -> tuple[bool, bool]:
        (item,) = items_of_records(tasks, [record], content_id=lambda item: "id")
        return item.picture is not None, item.vector is not None

    assert pictured({"text": "a chair", "score": "4", "photo": PHOTO}) == (True, False)
    assert pictured({"score": "4", "photo": PHOTO}) == (True, False)
    assert pictured({"rejected": "4", "photo": PHOTO}) == (True, False)
    assert pictured({"title": "Tea!", "embedding": [1.0]}) == (False, True)
    assert pictured({"text": "a chair", "score": "4", "task": "Ratings"}) == (False, False)
    with pytest.raises(RequestError, match="name one as `task`"):
        pictured({"text": "a chair", "score": "4"})
    with pytest.raises(RequestError, match="Photos: text, score, photo"):
        pictured({"photo": PHOTO})


def test_playground_adds_imports_and_shows_pictures(toy: CausalLM, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "chair.png").write_bytes(noise_png(1, side=300))
    records = [{"score": "2", "photo": data_url(noise_png(seed, side=300))} for seed in (2, 3)]
    (files / "items.json").write_text(json.dumps(records))
    (files / "items.csv").write_text(f'text,score,photo\n"a ""lamp""",5,"{records[0]["photo"]}"\n')
    service = open_service(toy, tmp_path, task=PICTURED, encoder=ENCODER, keep_pictures=True)
    key = create_key(tmp_path / "keys.json", "shop")
    with (
        served(service, api_keys=ApiKeys.load(tmp_path / "keys.json"), has_playground=True) as url,
        open_browser() as browser,
        open_page(browser, f"{url}/") as page,
    ):
        for user in ("bob", "cleo"):
            item, headers = {"text": "a lamp", "score": "4"}, {"Authorization": f"Bearer {key}"}
            httpx.post(f"{url}/v1/users/{user}/history", json=item, headers=headers).raise_for_status()
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        column = page.locator(".column.first")
        column.get_by_text("History (1 item)").wait_for()  # of the user whom the page has chosen
        column.get_by_label("User: choose one").fill("ann")
        column.get_by_label("User: choose one").press("Tab")
        column.get_by_text("History (0 items)").click()
        column.get_by_label("New item: photo (a picture)").focus()
        assert page.evaluate("document.activeElement.type") == "file"
        column.get_by_label("New item: photo (a picture)").set_input_files(files / "chair.png")
        column.get_by_label("New item: score").select_option("4")
        column.get_by_role("button", name="Add the item").press("Enter")
        column.get_by_text("History (1 item)").wait_for()
        column.get_by_text("photo: picture · score: 4").wait_for()
        thumbnails = column.locator("img.thumbnail")
        for name, count in (("items.json", 3), ("items.csv", 4)):
            page.locator("#first-file:enabled").wait_for()
            column.get_by_label("Import a file of items").set_input_files(files / name)
            column.get_by_text(f"History ({count} items)").wait_for()
        for index in range(4):
            thumbnails.nth(index).scroll_into_view_if_needed()
        column.get_by_text('text: a "lamp" · score: 5').wait_for()
        page.wait_for_function(
            "[...document.querySelectorAll('.first img.thumbnail')].every((image) => image.naturalWidth === 300)"
        )
        check_accessibility(page)
        column.get_by_label("New item: text").fill("words alone")
        column.get_by_label("New item: score").select_option("1")
        column.get_by_role("button", name="Add the item").click()
        column.get_by_text("History (5 items)").wait_for()
        assert thumbnails.count() == 4
    pictures = {item.picture_bytes for item in service.store.list_items("shop", "ann")}
    assert pictures == {None, *(len(noise_png(seed, side=300)) for seed in (1, 2, 3))}
