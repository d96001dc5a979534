"""Helpers for tests of the server: a real server on a real socket, with the toy model."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import uvicorn
from plugs import head_of

from personaplug.config import PlugConfig
from personaplug.data.task import Task
from personaplug.data.wording import Wording
from personaplug.encoders import Encoder, HashEncoder
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.serving.api_keys import ApiKeys
from personaplug.serving.app import create_app, server_config
from personaplug.serving.connections import ConnectionLimits
from personaplug.serving.engines.base import Engine, EngineRequest
from personaplug.serving.engines.in_process import InProcessEngine
from personaplug.serving.middleware import RequestLimits
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest, Kind
from personaplug.serving.persona_cache import PersonaCache, store_settings
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore

ENCODER = HashEncoder(32)
LABELS = ("1", "2", "3", "4", "5")
TASK = Task("Films", "rating", ("text",), "score", ("mae",), labels=LABELS, query_after="review: ")
CONFIG = replace(
    PlugConfig(), answer_channel="label", options="ignore", label_prior="counts", instruction_start="random"
)


def open_service(
    llm: CausalLM,
    folder: Path,
    *,
    task: Task = TASK,
    config: PlugConfig = CONFIG,
    engine: Engine | None = None,
    encoder: Encoder = ENCODER,
    keep_text: bool = True,
    keep_pictures: bool = False,
    wordings: Sequence[Wording] = (),
    **settings: Any,
) -> Service:
    """Open a service with an untrained plug; its personas still depend on the history."""
    torch.manual_seed(1)
    labels = task.labels if config.answer_channel == "label" else ()
    spec = PlugSpec(llm.identity, llm.embedding_scale, encoder.identity, labels)
    plug = PersonaPlug(config, spec=spec, encoder=encoder).eval()
    torch.nn.init.normal_(head_of(plug).population)
    stored = store_settings(plug, keep_text=keep_text, keep_pictures=keep_pictures)
    store = HistoryStore.open(folder / "histories.db", encoder, settings=replace(stored, shards=2))
    personas = PersonaCache(Personalizer(plug), store, **settings)
    engine = engine or InProcessEngine(llm, name="toy", max_new_tokens=200)
    return Service(personas, engine, task=task, wordings=wordings)


def run_engine(llm: CausalLM, scenario: Callable[[InProcessEngine], Awaitable[Any]], **settings: Any) -> Any:
    """Start an engine, run a scenario with it, and close it."""

    async def run() -> Any:
        engine = InProcessEngine(llm, name="toy", **settings)
        await engine.start()
        try:
            return await scenario(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def engine_request(
    kind: Kind, fields: dict[str, Any], soft: SoftPrompt | None, choices: Sequence[str] = (), *, id: str = ""
) -> EngineRequest:
    """Build an engine's request from the fields of an HTTP body."""
    model = ChatRequest if kind == "chat" else CompletionRequest
    return EngineRequest(model.model_validate(fields), soft, choices, id)


@contextmanager
def served(
    service: Service,
    *,
    api_keys: ApiKeys | None = None,
    limits: RequestLimits | None = None,
    allow_origins: Sequence[str] = (),
    connections: ConnectionLimits | None = None,
    has_playground: bool = False,
) -> Iterator[str]:
    """Serve a service like `personaplug serve`; yield the base URL, without /v1."""
    app = create_app(
        service, api_keys=api_keys, limits=limits, allow_origins=allow_origins, has_playground=has_playground
    )
    with running(server_config(app, connections=connections, timeout_graceful_shutdown=10)) as url:
        yield url


@contextmanager
def running(app: Any, *, port: int = 0, patience_s: int = 10) -> Iterator[str]:
    """Run an application, or a uvicorn configuration, until the block ends. Without a port, use a free one."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    config = app
    if not isinstance(app, uvicorn.Config):
        settings: dict[str, Any] = {"access_log": False, "log_config": None, "log_level": "warning"}
        config = uvicorn.Config(app, timeout_graceful_shutdown=patience_s, **settings)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
