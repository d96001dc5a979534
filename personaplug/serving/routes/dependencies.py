"""Dependencies of the routes: the server's parts, the caller's tenant, and ids in paths."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request
from pydantic import BeforeValidator

from personaplug.serving.fair_executor import FairExecutor
from personaplug.serving.middleware import RequestLimits
from personaplug.serving.middleware.admission import Budget
from personaplug.serving.middleware.paths import decode_segment
from personaplug.serving.openai_protocol import Name
from personaplug.serving.readiness import Readiness
from personaplug.serving.served_task import ServedPlug
from personaplug.serving.service import Service
from personaplug.serving.telemetry import Telemetry


@dataclass(frozen=True)
class ServerParts:
    """The objects that the routes share, stored as `app.state.parts`."""

    service: Service
    limits: RequestLimits
    telemetry: Telemetry
    places: Budget
    readiness: Readiness
    parsers: FairExecutor  # parses JSON bodies
    at_exit: ExitStack = field(default_factory=ExitStack)  # what to close after all requests and the service

    def close(self) -> None:
        self.readiness.close()
        self.parsers.shutdown()
        self.at_exit.close()


async def _parts(request: Request) -> ServerParts:
    parts: ServerParts = request.app.state.parts
    return parts


async def _key_user(request: Request) -> str | None:
    user: str | None = request.state.user
    return user


async def _tenant(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    return str(request.state.tenant)  # ApiKeyMiddleware reads the header; the parameter documents it


Parts = Annotated[ServerParts, Depends(_parts)]


async def _plug(
    parts: Parts,
    model: Annotated[
        str | None, Query(description="The plug to use, by a name that GET /v1/models lists; by default the first.")
    ] = None,
) -> ServedPlug:
    return parts.service.plugs[0] if model is None else parts.service.find_plug(model)


Plug = Annotated[ServedPlug, Depends(_plug)]
Tenant = Annotated[str, Depends(_tenant)]
KeyUser = Annotated[str | None, Depends(_key_user)]
"""The user that the caller's key belongs to; None for a key of a whole tenant."""
PathId = Annotated[Name, BeforeValidator(decode_segment)]
UserId = Annotated[PathId, Path(description="The user's id, percent-encoded.")]
ItemId = Annotated[PathId, Path(description="The item's id, percent-encoded.")]
RequestId = Annotated[PathId, Path(description="The request's id, percent-encoded.")]
