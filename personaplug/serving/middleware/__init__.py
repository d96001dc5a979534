"""ASGI middlewares between the network and the routes. To refuse a request, they raise RequestError."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from personaplug.serving.api_keys import ApiKeys
from personaplug.serving.middleware.admission import ApiKeyMiddleware, BodyMiddleware, Budget, PlacesMiddleware
from personaplug.serving.middleware.origins import (
    CORS_HEADERS,
    CORS_METHODS,
    EXPOSED_HEADERS,
    JsonOnlyMiddleware,
    LoopbackHostMiddleware,
    OriginMiddleware,
)
from personaplug.serving.middleware.paths import PathMiddleware, RouteMiddleware, SingleHeadersMiddleware
from personaplug.serving.middleware.replies import DisconnectMiddleware, ErrorMiddleware, MetricsMiddleware
from personaplug.serving.telemetry import Telemetry

_BODIES_IN_MEMORY = 32  # maximum-size bodies in the memory budget, which replies share


@dataclass(frozen=True)
class RequestLimits:
    """Limits of requests."""

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30  # to receive the whole body
    requests: int = 256  # to /v1/, concurrently
    items: int = 1000  # added to a history by one request


def middlewares(
    *,
    api_keys: ApiKeys,
    limits: RequestLimits,
    telemetry: Telemetry,
    places: Budget,
    origins: Sequence[str],
    routes: Sequence[BaseRoute],
) -> list[Middleware]:
    """Return the middlewares of a server, outermost first. Cheap checks come first, so that refusals cost little."""
    is_open = api_keys.is_open
    memory = Budget(_BODIES_IN_MEMORY * limits.body_bytes, is_shared=not is_open)
    return [
        Middleware(MetricsMiddleware, telemetry=telemetry),
        *([_cors(origins)] if origins else []),
        Middleware(ErrorMiddleware),
        Middleware(SingleHeadersMiddleware),
        *([Middleware(LoopbackHostMiddleware)] if is_open else []),
        Middleware(PathMiddleware),
        Middleware(OriginMiddleware, allowed=origins),
        Middleware(ApiKeyMiddleware, api_keys=api_keys),
        Middleware(RouteMiddleware, routes=routes),
        Middleware(JsonOnlyMiddleware),
        Middleware(PlacesMiddleware, places=places, memory=memory, running=telemetry.running),
        Middleware(BodyMiddleware, max_bytes=limits.body_bytes, timeout_s=limits.body_seconds),
        Middleware(DisconnectMiddleware),
    ]


def _cors(origins: Sequence[str]) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=CORS_METHODS,
        allow_headers=CORS_HEADERS,
        expose_headers=EXPOSED_HEADERS,
    )
