"""Routes that generate text: OpenAI's chat completions and completions, with a persona."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from personaplug.errors import EngineFailure, RequestError
from personaplug.serving.concepts import header_of
from personaplug.serving.engines.base import EventStream
from personaplug.serving.error_responses import retry_after
from personaplug.serving.json_bodies import JsonRoute
from personaplug.serving.openai_protocol import USER_HEADER, ChatRequest, CompletionRequest, error_reply, event
from personaplug.serving.routes.dependencies import KeyUser, Parts, Tenant

router = APIRouter(route_class=JsonRoute)

UserHeader = Annotated[
    str | None, Header(alias=USER_HEADER, description="The user whose persona to apply, like `user`.")
]

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A reply in OpenAI's format; with `stream`, server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


@router.post(
    "/v1/chat/completions", summary="Create a chat completion with a persona", response_model=None, responses=_RESPONSES
)
async def chat(
    http: Request, request: ChatRequest, tenant: Tenant, key_user: KeyUser, parts: Parts, user: UserHeader = None
) -> Response:
    return await _respond(http, request, tenant=tenant, parts=parts, user_header=user, key_user=key_user)


@router.post(
    "/v1/completions", summary="Create a text completion with a persona", response_model=None, responses=_RESPONSES
)
async def complete(
    http: Request,
    request: CompletionRequest,
    tenant: Tenant,
    key_user: KeyUser,
    parts: Parts,
    user: UserHeader = None,
) -> Response:
    return await _respond(http, request, tenant=tenant, parts=parts, user_header=user, key_user=key_user)


async def _respond(
    http: Request,
    request: ChatRequest | CompletionRequest,
    *,
    tenant: str,
    parts: Parts,
    user_header: str | None,
    key_user: str | None,
) -> Response:
    service = parts.service
    http.state.model = service.name_of(service.find_plug(request.model))  # for the metrics, also of refused requests
    reply = await service.respond(request, tenant=tenant, user_header=user_header, key_user=key_user)
    persona, body, status = reply.persona, reply.reply.body, reply.reply.status
    parts.telemetry.personas.labels(persona.applied, str(persona.cached).lower(), reply.model).inc()
    headers = {
        "X-Request-Id": reply.id,
        "X-Personaplug-Persona": persona.applied,
        "X-Personaplug-Items": str(persona.items),
        "X-Personaplug-Persona-Scale": f"{persona.persona_scale:g}",
        **({"X-Personaplug-Reason": reply.reason} if reply.reason else {}),
        **({"X-Personaplug-Concepts": header_of(reply.concepts)} if reply.concepts else {}),
        **reply.reply.headers,
        **retry_after(status),  # a busy vLLM server does not send Retry-After
    }
    if isinstance(body, bytes):
        return Response(body, status, headers, media_type="application/json")
    return _EventResponse(body, status=status, headers=headers)


class _EventResponse(StreamingResponse):
    """A streamed response that closes its event stream even if the client never reads it."""

    def __init__(self, events: EventStream, *, status: int, headers: dict[str, str]) -> None:
        super().__init__(_with_failure(events), status, headers, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _with_failure(events: EventStream) -> AsyncGenerator[bytes]:
    """Report a failure as the last event, because the status has already been sent."""
    try:
        async for chunk in events:
            yield chunk
    except (EngineFailure, RequestError) as error:
        yield event(error_reply(str(error), code=error.code, status=error.http_status))
