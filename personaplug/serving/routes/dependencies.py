"""What the routes depend on: the server's parts, the caller's tenant, ids in paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Path, Request

from personaplug.serving.middleware import RequestLimits
from personaplug.serving.openai_protocol import Name
from personaplug.serving.service import Service
from personaplug.serving.telemetry import Telemetry


@dataclass(frozen=True)
class ServerParts:
    """The parts of a server that its routes use; an application holds them as `app.state.parts`."""

    service: Service
    limits: RequestLimits
    telemetry: Telemetry


async def _parts(request: Request) -> ServerParts:
    parts: ServerParts = request.app.state.parts
    return parts


async def _tenant(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    return str(request.state.tenant)  # ApiKeyMiddleware reads the header; the parameter documents it


Parts = Annotated[ServerParts, Depends(_parts)]
Tenant = Annotated[str, Depends(_tenant)]
UserId = Annotated[Name, Path(description="The user's id, percent-encoded.")]
ItemId = Annotated[Name, Path()]
