"""The HTTP server: assembles routes and middlewares into an application, and runs it.

No user's id and no text goes into a log.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from personaplug.serving.api_keys import ApiKeys
from personaplug.serving.error_responses import add_error_handlers
from personaplug.serving.middleware import RequestLimits, guards
from personaplug.serving.openai_protocol import ErrorReply
from personaplug.serving.routes import admin, chat, history, task
from personaplug.serving.routes.dependencies import ServerParts
from personaplug.serving.service import Service
from personaplug.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 403, 404, 408, 409, 413, 422, 429, 502, 503)
}


def create_app(service: Service, *, api_keys: ApiKeys | None = None, limits: RequestLimits | None = None) -> FastAPI:
    """The server as an ASGI application; without keys, it answers to this machine only."""
    parts = ServerParts(service, limits or RequestLimits(), Telemetry())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.engine.start()
        yield
        await service.close()

    app = FastAPI(
        title="personaplug",
        description="A frozen language model that knows its users. OpenAI's routes, and the users' histories.",
        lifespan=lifespan,
        middleware=guards(api_keys or ApiKeys(), parts.limits, telemetry=parts.telemetry),
        redirect_slashes=False,  # to delete `history/` without an item must not reach the user
        responses=_ERRORS,
    )
    app.state.parts = parts
    for router in (chat.router, history.router, task.router, admin.router):
        app.include_router(router)
    add_error_handlers(app)
    return app


def serve(
    service: Service, *, api_keys: ApiKeys, limits: RequestLimits, host: str, port: int, listener: socket.socket
) -> None:
    """Serve until SIGTERM, then give the running requests 30 seconds to end.

    Args:
        listener: bound to that host and port before the models were loaded.
    """
    api_keys.check_address(host)
    config = uvicorn.Config(
        create_app(service, api_keys=api_keys, limits=limits),
        host=host,
        port=port,
        access_log=False,  # it would hold users' ids, which are part of paths
        log_config=None,  # uvicorn's own closes every handler of the process
        log_level="warning",
        timeout_graceful_shutdown=30,
    )

    async def run() -> None:
        await service.engine.start()  # not in the server, so that its errors reach the caller
        callers = "this machine alone" if api_keys.is_open else "whoever has a key"
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        logger.info("%s with personas at %s/v1 for %s; routes: %s/docs", service.engine.models[0], url, callers, url)
        if service.engine.is_remote:
            # A persona is too little work to share: a second thread makes it no faster, and vLLM needs the core.
            torch.set_num_threads(1)
        gc.freeze()  # a collection that visits the models' half a million objects would halt replies for 0.2 s
        await uvicorn.Server(config).serve(sockets=[listener])

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())
