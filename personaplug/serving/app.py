"""The HTTP server: assembles routes and middlewares into an application, and runs it.

Logs contain no user ids and no user texts.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
import uvicorn
from fastapi import APIRouter, FastAPI

from personaplug.errors import MissingExtra
from personaplug.serving.api_keys import ApiKeys
from personaplug.serving.connections import ConnectionGuard, ConnectionLimits, guarded_protocol
from personaplug.serving.error_responses import add_error_handlers
from personaplug.serving.fair_executor import FairExecutor
from personaplug.serving.middleware import RequestLimits, middlewares
from personaplug.serving.middleware.admission import Budget
from personaplug.serving.middleware.origins import check_origin
from personaplug.serving.openai_protocol import ErrorReply
from personaplug.serving.readiness import Readiness
from personaplug.serving.routes import admin, chat, history, pages, playground, preferences, task, users
from personaplug.serving.routes.dependencies import ServerParts
from personaplug.serving.service import Service
from personaplug.serving.spans import are_traces_wanted
from personaplug.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)

# The event loop releases the GIL at each read and write. A busy thread may then hold the GIL for this long.
_SWITCH_INTERVAL_S = 0.0005

_ROUTERS = (*(chat.router, history.router, preferences.router, users.router, task.router, admin.router, pages.router),)

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 502, 503)
}


def create_app(
    service: Service,
    *,
    api_keys: ApiKeys | None = None,
    limits: RequestLimits | None = None,
    allow_origins: Sequence[str] = (),
    has_playground: bool = False,
) -> FastAPI:
    """Build the ASGI application. Without keys, it accepts requests from this machine only.

    Args:
        allow_origins: origins of web pages that may call the server from a browser.
        has_playground: serve the playground, a page for people, at `/`.
    """
    routers = (*_ROUTERS, playground.router) if has_playground else _ROUTERS
    api_keys, limits, telemetry = api_keys or ApiKeys(), limits or RequestLimits(), Telemetry()
    places = Budget(limits.requests, is_shared=not api_keys.is_open)
    parsers = FairExecutor(1, name="personaplug-json")
    parts = ServerParts(service, limits, telemetry, places, Readiness(service), parsers)
    guards = middlewares(
        api_keys=api_keys,
        limits=limits,
        telemetry=telemetry,
        places=places,
        origins=[check_origin(origin) for origin in allow_origins],
        routes=[route for router in routers for route in router.routes],
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()
        parts.close()

    app = documented_app(routers=routers, lifespan=lifespan, middleware=guards)
    app.state.parts = parts
    add_error_handlers(app)
    return app


def documented_app(*, routers: Sequence[APIRouter] = _ROUTERS, **settings: Any) -> FastAPI:
    """Build an application with the routes and their documentation; it cannot answer requests without a service."""
    app = FastAPI(
        title="personaplug",
        description="A frozen language model with user personas: OpenAI-compatible routes and user histories.",
        redirect_slashes=False,  # DELETE `history/` without an item id must not reach another route
        responses=_ERRORS,
        openapi_url=None,  # `routes/pages.py` serves it, and a documentation page without external resources
        **_without_telemetry(),
        **settings,
    )
    for router in routers:
        app.include_router(router)
    return app


def _without_telemetry() -> dict[str, Any]:
    """Return the setting that turns off FastAPI's own telemetry, which newer versions have; it records user ids."""
    off = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    return {"telemetry": off} if "telemetry" in inspect.signature(FastAPI).parameters else {}


def server_config(app: FastAPI, *, connections: ConnectionLimits | None = None, **settings: Any) -> uvicorn.Config:
    """Return uvicorn's settings for an application, with connection limits that fit the process."""
    parts: ServerParts = app.state.parts
    connections = connections or ConnectionLimits.of_process(body_bytes=parts.limits.body_bytes)
    parts.places.total = min(parts.places.total, connections.requests)
    guard = ConnectionGuard(connections, on_drop=lambda reason: parts.telemetry.closed_connections.labels(reason).inc())
    return uvicorn.Config(
        app,
        http=guarded_protocol(guard),
        ws="none",
        backlog=connections.backlog,
        access_log=False,  # paths contain user ids
        log_config=None,  # uvicorn's default closes every log handler of the process
        log_level="warning",
        **settings,
    )


def serve(
    service: Service,
    *,
    api_keys: ApiKeys,
    limits: RequestLimits,
    host: str,
    port: int,
    listener: socket.socket,
    allow_origins: Sequence[str] = (),
    has_playground: bool = False,
) -> None:
    """Serve until SIGTERM, then give the running requests 30 seconds to end.

    Args:
        listener: a socket bound to `host` and `port`.
    """
    api_keys.check_address(host)
    app = create_app(
        service, api_keys=api_keys, limits=limits, allow_origins=allow_origins, has_playground=has_playground
    )
    config = server_config(app, host=host, port=port, timeout_graceful_shutdown=30)
    if are_traces_wanted():
        _trace(app, service)

    async def run() -> None:
        await service.start()  # outside of uvicorn, so that its errors reach the caller
        callers = "this machine only" if api_keys.is_open else "callers with an API key"
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        models = ", ".join(service.models)
        logger.info("%s with personas at %s/v1 for %s; routes: %s/docs", models, url, callers, url)
        if has_playground:
            logger.info("playground: open %s/ in a browser", url)
        if service.engine.is_remote:
            # Computing a persona is too little work for a second thread, and vLLM needs the core.
            torch.set_num_threads(1)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        gc.freeze()  # a full collection visits the models' half a million objects and pauses replies for 0.2 s
        await uvicorn.Server(config).serve(sockets=[listener])

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())


def _trace(app: FastAPI, service: Service) -> None:
    """Export traces; if the extra is not installed, serve without them, because a platform may set the variables."""
    try:
        from personaplug.serving.traces import start_traces
    except MissingExtra as missing:
        logger.warning("no traces: %s", missing)
    else:
        provider = start_traces(app, service.store)
        # uvicorn ends the process by the signal that it got, so functions of `atexit` do not run.
        app.state.parts.at_exit.callback(provider.shutdown)
        logger.info("traces: spans of requests, without user ids and texts")
