"""Concepts over HTTP: mentioned and shown ones, edits, two users, refused pictures. The embedded engine answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live_server import CONFIG, served
from PIL import Image
from plugs import head_of

from personaplug.data.task import Task
from personaplug.encoders import Encoder, HashEncoder, JointEncoder
from personaplug.encoders.pictures import PixelEncoder
from personaplug.errors import StoreConflict
from personaplug.llm.causal_lm import CausalLM
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.serving.engines.in_process import InProcessEngine
from personaplug.serving.middleware import RequestLimits
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest
from personaplug.serving.persona_cache import PersonaCache, store_settings
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore

TASK = Task("Pets", "chat", ("name", "info"), None, ("rouge_1",), image_field="picture", name_field="name")
JOINT = JointEncoder(HashEncoder(32), pictures=PixelEncoder())
HEADER = "x-personaplug-concepts"


class ListeningEngine(InProcessEngine):
    """The embedded engine, which also keeps the texts that the model reads."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.read: list[str] = []

    async def prepare(self, body: ChatRequest | CompletionRequest, *, choices: Sequence[str] = ()) -> Any:
        self.read.append(body.prompt_text)
        return await super().prepare(body, choices=choices)


def drawn(color: str, dot: str = "white", *, at: int = 12) -> str:
    """Return a data URL of a picture: a square on a ground."""
    image, file = Image.new("RGB", (48, 48), color), io.BytesIO()
    image.paste(dot, (at, at, at + 20, at + 20))
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def open_service(llm: CausalLM, folder: Path, *, task: Task = TASK, encoder: Encoder = JOINT,
                 keep_text: bool = True) -> Service:  # fmt: skip
    torch.manual_seed(1)
    config = replace(CONFIG, answer_channel="text", label_prior="none")
    spec = PlugSpec(llm.identity, llm.embedding_scale, encoder.identity, ())
    plug = PersonaPlug(config, spec=spec, encoder=encoder).eval()
    torch.nn.init.normal_(head_of(plug).population)
    store = HistoryStore.open(folder / "histories.db", encoder, settings=store_settings(plug, keep_text=keep_text))
    engine = ListeningEngine(llm, name="toy", max_new_tokens=8)
    return Service(PersonaCache(Personalizer(plug), store), engine, task=task)


@pytest.fixture(scope="module")
def service(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return open_service(toy, tmp_path_factory.mktemp("concepts"))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(service, limits=RequestLimits(body_bytes=200_000)) as base_url:
        yield base_url


def add(url: str, user: str, *items: dict[str, Any]) -> None:
    httpx.post(f"{url}/v1/users/{user}/history", json={"items": items}).raise_for_status()


def ask(url: str, text: str | None, *pictures: object, user: str | None = "ann", **fields: Any) -> httpx.Response:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    parts += [] if text is None else [{"type": "text", "text": text}]
    content = parts if pictures else text
    body = {"messages": [{"role": "user", "content": content}], "user": user, "max_tokens": 2} | fields
    return httpx.post(f"{url}/v1/chat/completions", json=body)


def read(service: Service) -> str:
    engine = service.engine
    assert isinstance(engine, ListeningEngine)
    return engine.read[-1]


BO = {"id": "1", "name": "bo", "info": "Bo is a dog with a red collar.", "picture": drawn("red")}
TEA = {"id": "cup, blue", "name": "tea cup", "info": "It was a gift.", "picture": drawn("blue")}


def test_concepts_of_a_user_are_named_in_the_prompts_of_this_user_alone(service: Service, url: str) -> None:
    add(url, "ann", BO, TEA)
    add(url, "bob", BO | {"info": "Bo is a parrot."})
    reply = ask(url, "What is Bo?")
    assert (reply.status_code, reply.headers[HEADER]) == (200, "1")
    assert read(service) == "The user has noted:\nname: bo; info: Bo is a dog with a red collar.\n\nWhat is Bo?"
    assert ask(url, "What is Bo?", user="bob").headers[HEADER] == "1"
    assert "parrot" in read(service)
    assert "dog" not in read(service)
    for user in ("cleo", None):
        assert HEADER not in ask(url, "What is Bo?", user=user).headers
        assert read(service) == "What is Bo?"
    assert HEADER not in ask(url, "What is new?").headers


def test_completions_and_messages_in_parts_get_the_texts_too(service: Service, url: str) -> None:
    add(url, "eve", BO)
    reply = httpx.post(f"{url}/v1/completions", json={"prompt": "My bo is", "user": "eve", "max_tokens": 2})
    assert reply.headers[HEADER] == "1"
    assert read(service).endswith("Bo is a dog with a red collar.\n\nMy bo is")
    parts = [{"type": "text", "text": "Hello."}, {"type": "text", "text": "What is bo?", "cache_control": {}}]
    reply = ask(url, None, user="eve", messages=[{"role": "user", "content": parts}])
    assert (reply.status_code, reply.headers[HEADER]) == (200, "1")
    assert read(service).endswith("Hello.\nWhat is bo?")
    first = {"role": "user", "content": "What is bo?"}
    answered = {"role": "assistant", "content": "A dog."}
    later = ask(url, None, user="eve", messages=[first, answered, {"role": "user", "content": "I see."}])
    assert HEADER not in later.headers  # the last message decides


def test_a_picture_names_the_concept_that_it_shows(service: Service, url: str) -> None:
    add(url, "ann", BO, TEA)
    reply = ask(url, "What is this?", drawn("blue", at=14))
    assert (reply.status_code, reply.headers[HEADER]) == (200, "cup%2C%20blue")
    assert "It was a gift." in read(service)
    assert "The picture shows tea cup.\n\n" in read(service)
    assert "dog" not in read(service)
    both = ask(url, "And bo?", drawn("red"), drawn("blue"), drawn("green", "black"), stream=True)
    assert both.headers[HEADER] == "1,cup%2C%20blue"
    shown = "Picture 1 shows bo.\nPicture 2 shows tea cup.\nPicture 3 shows nothing that the user has noted."
    assert shown in read(service)
    assert HEADER not in ask(url, None, drawn("blue"), user="bob").headers  # bob has no such cup
    assert "The picture shows nothing that the user has noted." in read(service)


def test_edits_and_erasures_count_at_once(service: Service, url: str) -> None:
    add(url, "dan", BO)
    assert ask(url, "Is bo big?", user="dan").headers[HEADER] == "1"
    add(url, "dan", BO | {"name": "max", "picture": drawn("yellow", "purple")})
    assert HEADER not in ask(url, "Is bo big?", user="dan").headers
    assert ask(url, "Is this <max>?", drawn("yellow", "purple"), user="dan").headers[HEADER] == "1"
    assert "The picture shows max." in read(service)
    assert HEADER not in ask(url, "Who?", drawn("red"), user="dan").headers
    httpx.delete(f"{url}/v1/users/dan/history/1").raise_for_status()
    assert HEADER not in ask(url, "Is max big?", user="dan").headers


REFUSED: dict[str, tuple[object, str]] = {
    "web address": ("https://example.org/bo.png", "no URLs"),
    "no text": (7, "has no URL"),
    "empty": ("", "has no URL"),
    "another type": ("data:text/plain;base64,aGk=", "a data URL of another kind"),
    "broken base64": ("data:image/png;base64,é", "base64 is not valid"),
    "no picture": ("data:image/png;base64,aGVsbG8=", "no picture in one of the formats"),
    "cut off": (drawn("red")[:160] + "=" * (-len(drawn("red")[22:160]) % 4), "cannot be decoded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_picture_is_a_400_without_its_bytes(url: str, name: str) -> None:
    picture, message = REFUSED[name]
    reply = ask(url, "What is this?", picture)
    assert (reply.status_code, message in reply.json()["error"]["message"]) == (400, True), reply.text
    assert "aGVsbG8" not in reply.text


def test_pictures_are_limited_in_size_and_number(url: str) -> None:
    assert ask(url, "What is this?", "data:image/png;base64," + "A" * 200_000).status_code == 413
    assert "at most 8 pictures" in ask(url, "What?", *[drawn("red")] * 9).json()["error"]["message"]


def test_a_picture_needs_a_user_and_a_persona(url: str) -> None:
    for fields in ({"user": None}, {"personaplug": {"persona_scale": 0}}):
        reply = ask(url, "What is this?", drawn("red"), **fields)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "picture")
    plain = ask(url, "What is bo?", personaplug={"persona_scale": 0})
    assert (plain.status_code, plain.headers.get(HEADER)) == (200, None)


@pytest.mark.parametrize("lack", ["name_field", "pictures"])
def test_without_concepts_or_a_picture_encoder_a_picture_is_a_400(toy: CausalLM, tmp_path: Path, lack: str) -> None:
    task = replace(TASK, name_field=None) if lack == "name_field" else TASK
    encoder = JOINT if lack == "name_field" else HashEncoder(32)
    with served(open_service(toy, tmp_path, task=task, encoder=encoder)) as base_url:
        reply = ask(base_url, "What is this?", drawn("red"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "messages")
        assert "'name_field'" in reply.json()["error"]["message"]
        add(base_url, "ann", {"name": "bo", "info": "A dog."})
        assert (HEADER in ask(base_url, "What is bo?").headers) == (lack == "pictures")


def test_store_without_texts_is_refused_at_the_start(toy: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(StoreConflict, match="the store has none"):
        open_service(toy, tmp_path, keep_text=False)
