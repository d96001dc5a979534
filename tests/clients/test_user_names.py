"""Ways to name a user from each client: those that docs/clients.md lists, and those that do not work."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from client_programs import run_program, running_program
from free_ports import free_port
from recording_server import MODEL, QUESTIONS, RecordingServer, assert_persona

pytest_plugins = ["client_fixtures"]

HEADER = {"X-Personaplug-User": "ann"}
TURNS: Any = [{"role": "user", "content": QUESTIONS[0]}]


class Way(NamedTuple):
    """Fields of a call, and whether they name the user to the server."""

    fields: dict[str, Any]
    arrives: bool = True


OPENAI = [
    Way({"user": "ann"}),
    Way({"safety_identifier": "ann"}),
    Way({"metadata": {"user_id": "ann"}}),
    Way({"extra_headers": HEADER}),
    Way({"extra_body": {"user": "ann"}}),
    Way({"extra_body": {"personaplug": {"user": "ann"}}}),
]
JAVASCRIPT = [
    Way({"body": {"user": "ann"}}),
    Way({"body": {"safety_identifier": "ann"}}),
    Way({"body": {"metadata": {"user_id": "ann"}}}),
    Way({"body": {"personaplug": {"user": "ann"}}}),
    Way({"options": {"headers": HEADER}}),
]
LITELLM = [
    Way({"extra_headers": HEADER}),
    Way({"safety_identifier": "ann"}),
    Way({"extra_body": {"user": "ann"}}),
    Way({"user": "ann", "allowed_openai_params": ["user"]}),
    Way({"user": "ann"}, arrives=False),
    Way({"metadata": {"user_id": "ann"}}, arrives=False),
]
LANGCHAIN = [
    Way({"call": {"user": "ann"}}),
    Way({"call": {"safety_identifier": "ann"}}),
    Way({"model": {"default_headers": HEADER}}),
    Way({"model": {"extra_body": {"user": "ann"}}}),
    Way({"model": {"model_kwargs": {"user": "ann"}}}),
    Way({"model": {"metadata": {"user_id": "ann"}}}, arrives=False),
]
LLAMA_INDEX = [
    Way({"model": {"additional_kwargs": {"user": "ann"}}}),
    Way({"model": {"default_headers": HEADER}}),
    Way({"call": {"user": "ann"}}),
]

JAVASCRIPT_CODE = """
import OpenAI from "openai";
const [url, model, messages, ways] = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
for (const { body, options } of ways) await client.chat.completions.create({ model, messages, ...body }, options);
"""
PYTHON_CODE = """
import json, sys
url, model, messages, ways = json.loads(sys.argv[1])
for fields in ways:
    ask(**fields)
"""
ASK = {
    "litellm": """
import litellm
def ask(**fields):
    litellm.completion(model=f"openai/{model}", api_base=url, api_key="none", messages=messages, **fields)
""",
    "langchain_openai": """
from langchain_openai import ChatOpenAI
place = {"api_key": "none", "max_retries": 0}
def ask(*, call={}, **given):
    ChatOpenAI(model=model, base_url=url, **place, **given.get("model", {})).invoke(messages, **call)
""",
    "llama_index": """
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
place = {"api_key": "none", "max_retries": 0, "is_chat_model": True}
def ask(*, call={}, **given):
    llm = OpenAILike(model=model, api_base=url, **place, **given.get("model", {}))
    llm.chat([ChatMessage(messages[0]["content"])], **call)
""",
}


def _check(server: RecordingServer, ways: list[Way], ask_all: Callable[[list[dict[str, Any]]], object]) -> None:
    _, requests = server.asked(lambda: ask_all([way.fields for way in ways]))
    for way, request in zip(ways, requests, strict=True):
        assert_persona(request, server.persona("ann" if way.arrives else None, QUESTIONS[0]))


def _argument(url: str, ways: list[dict[str, Any]]) -> str:
    return json.dumps([f"{url}/v1", MODEL, TURNS, ways])


def _ask_all(client: openai.OpenAI, ways: list[dict[str, Any]]) -> None:
    for fields in ways:
        client.chat.completions.create(model=MODEL, messages=TURNS, **fields)


def test_openai_python(server: RecordingServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    _check(server, OPENAI, lambda ways: _ask_all(client, ways))


@pytest.mark.slow
def test_openai_javascript(server: RecordingServer, node_folder: Path) -> None:
    (node_folder / "ways.mjs").write_text(JAVASCRIPT_CODE)
    _check(
        server,
        JAVASCRIPT,
        lambda ways: run_program(["node", "ways.mjs", _argument(server.url, ways)], folder=node_folder),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "ways"), [("litellm", LITELLM), ("langchain_openai", LANGCHAIN), ("llama_index", LLAMA_INDEX)]
)
def test_python_library(
    server: RecordingServer, client_python: Callable[[str], Path], module: str, ways: list[Way]
) -> None:
    python, code = client_python(module), ASK[module] + PYTHON_CODE
    _check(server, ways, lambda fields: run_program([python, "-c", code, _argument(server.url, fields)]))


@pytest.fixture
def proxy(
    server: RecordingServer,
    client_python: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[openai.OpenAI]:
    """LiteLLM's proxy with a model that forwards `user`, and one that does not."""
    key = f"sk-{secrets.token_hex(24)}"
    monkeypatch.setenv("LITELLM_MASTER_KEY", key)
    litellm = client_python("litellm").parent / "litellm"
    to = f"litellm_params: {{model: openai/{MODEL}, api_base: {server.url}/v1, api_key: none"
    (tmp_path / "litellm.yaml").write_text(
        f"model_list:\n  - {{model_name: {MODEL}, {to}}}}}\n"
        f'  - {{model_name: with-user, {to}, allowed_openai_params: ["user"]}}}}\n'
        "general_settings: {forward_client_headers_to_llm_api: true}\n"
    )
    port = str(free_port())
    command = [str(litellm), "--config", str(tmp_path / "litellm.yaml"), "--host", "127.0.0.1", "--port", port]
    url = f"http://127.0.0.1:{port}"
    with running_program(command, output=tmp_path / "output.txt", ready_url=f"{url}/health/liveliness"):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.mark.slow
def test_litellm_proxy(server: RecordingServer, proxy: openai.OpenAI) -> None:
    ways = [
        Way({"model": MODEL, "extra_headers": HEADER}),
        Way({"model": MODEL, "safety_identifier": "ann"}),
        Way({"model": "with-user", "user": "ann"}),
        Way({"model": MODEL, "user": "ann"}, arrives=False),
    ]

    def ask_all(calls: list[dict[str, Any]]) -> None:
        for fields in calls:
            proxy.chat.completions.create(messages=TURNS, **fields)

    _check(server, ways, ask_all)
