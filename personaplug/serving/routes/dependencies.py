"""What the routes depend on: the server's parts, the caller's tenant, ids in paths."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Request
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator

from personaplug.serving.fair_executor import FairExecutor
from personaplug.serving.middleware import RequestLimits
from personaplug.serving.middleware.admission import Budget
from personaplug.serving.middleware.paths import decode_segment
from personaplug.serving.openai_protocol import Name, to_json
from personaplug.serving.readiness import Readiness
from personaplug.serving.service import Service
from personaplug.serving.telemetry import Telemetry

PIECE_BYTES = 64 * 2**10
"""Replies are sent in pieces of this size, so that a caller who reads slowly makes the server hold few of them."""


@dataclass(frozen=True)
class ServerParts:
    """The parts of a server that its routes use; an application holds them as `app.state.parts`."""

    service: Service
    limits: RequestLimits
    telemetry: Telemetry
    places: Budget
    readiness: Readiness
    parsers: FairExecutor  # parse bodies and write replies

    def close(self) -> None:
        self.readiness.close()
        self.parsers.shutdown()


async def _parts(request: Request) -> ServerParts:
    parts: ServerParts = request.app.state.parts
    return parts


async def _tenant(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    return str(request.state.tenant)  # ApiKeyMiddleware reads the header; the parameter documents it


class JsonReply:
    """Sends JSON that may be large: written in a thread, counted as the caller's memory, sent in pieces."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def __call__(self, value: Mapping[str, Any]) -> StreamingResponse:
        state, parts = self._request.state, self._request.app.state.parts
        body = await parts.parsers.run(state.tenant, "", partial(to_json, value))
        state.place.add_bytes(len(body))
        headers = {"Content-Length": str(len(body))}
        return StreamingResponse(_pieces(body), headers=headers, media_type="application/json")


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


Parts = Annotated[ServerParts, Depends(_parts)]
Tenant = Annotated[str, Depends(_tenant)]
Reply = Annotated[JsonReply, Depends(JsonReply)]
PathId = Annotated[Name, BeforeValidator(decode_segment)]
UserId = Annotated[PathId, Path(description="The user's id, percent-encoded.")]
ItemId = Annotated[PathId, Path(description="The item's id, percent-encoded.")]
