"""The HTTP server: OpenAI's routes with personas, and the routes of users' histories.

A caller's mistake is answered with 4xx and OpenAI's form of an error. No user's id and no text goes into a log.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from personaplug.errors import (
    EncoderMismatch,
    EngineFailure,
    ItemError,
    MissingData,
    PersonaPlugError,
    RequestError,
    StorageError,
)
from personaplug.serving.api_keys import ApiKeys
from personaplug.serving.engines.base import Events
from personaplug.serving.engines.in_process import InProcessEngine
from personaplug.serving.middleware import TENANT, Gate, RequestLimits, refused, retry_after
from personaplug.serving.openai_protocol import (
    ChatRequest,
    CompletionRequest,
    ErrorReply,
    Name,
    Text,
    error_reply,
    event,
    first_flaw,
)
from personaplug.serving.service import Service, ServiceReply
from personaplug.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)


class HistoryPost(BaseModel):
    """Items of a history: many, one, or what a user made of an earlier answer."""

    model_config = ConfigDict(extra="allow", strict=True)

    items: list[dict[str, Any]] | None = Field(
        default=None, description="Items of the task: an id, its fields, a date."
    )
    request_id: Name | None = Field(default=None, description="X-Request-Id of an earlier answer to this user.")
    answer: Text | None = Field(default=None, description="The text that the user kept for that request.")

    @model_validator(mode="after")
    def _one_of_three(self) -> HistoryPost:
        given = [self.items is not None, self.request_id is not None, bool(self.model_extra)]
        if sum(given) != 1 or ((self.request_id is None) != (self.answer is None) and not self.model_extra):
            raise ValueError("give `items`, or `request_id` with `answer`, or the fields of one item")
        return self

    @property
    def records(self) -> list[dict[str, Any]]:
        """The items as they were given."""
        if self.items is not None:
            return self.items
        return [(self.model_extra or {}) | ({"answer": self.answer} if self.answer is not None else {})]


class ExplainPost(BaseModel):
    """What to explain."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text = Field(min_length=1)
    answer: Text | None = Field(default=None, min_length=1, description="Whose likelihood to compare.")
    most: int = Field(default=20, ge=1, le=512, description="So many items are told.")


async def _tenant(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    return str(request.scope[TENANT])  # the header is read by the gate; here it is described


Tenant = Annotated[str, Depends(_tenant)]
User = Annotated[Name, Path(description="The user's id, percent-encoded.")]
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in (
        (400, "The request cannot be answered as it is."),
        (401, "The key is missing or unknown."),
        (404, "There is nothing of that name."),
        (403, "A server without keys was called by a foreign name."),
        (408, "The body did not come in time."),
        (409, "The history is being changed; try again."),
        (413, "The body is too long."),
        (422, "A field is missing or of the wrong type."),
        (429, "Too much at once: come back after Retry-After seconds."),
        (502, "The language model does not answer."),
        (503, "The store cannot be used now."),
    )
}


_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's answer; with `stream`, its events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


def create_app(service: Service, *, accounts: ApiKeys | None = None, limits: RequestLimits | None = None) -> FastAPI:
    """The server as an ASGI application.

    Args:
        service: what it does.
        accounts: who may use it; None = everybody, for servers that only this machine reaches.
        limits: what requests may take.
    """
    accounts, limits, telemetry = accounts or ApiKeys(), limits or RequestLimits(), Telemetry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.engine.start()
        yield
        await service.close()

    app = FastAPI(
        title="personaplug",
        description="A frozen language model that knows its users. OpenAI's routes, and the users' histories.",
        lifespan=lifespan,
        redirect_slashes=False,  # what was meant for an item is not to reach its user
        responses=_ERRORS,
    )
    app.add_middleware(Gate, accounts=accounts, limits=limits, telemetry=telemetry)
    _handle_errors(app)

    async def answered(request: ChatRequest | CompletionRequest, whose: str) -> Response:
        answer = await service.answer(request, tenant=whose)
        telemetry.personas.labels(answer.persona.applied, str(answer.persona.kept).lower()).inc()
        return _response(answer)

    @app.post("/v1/chat/completions", summary="Chat as a user", response_model=None, responses=_STREAMED)
    async def chat(request: ChatRequest, whose: Tenant) -> Response:
        return await answered(request, whose)

    @app.post("/v1/completions", summary="Complete a text as a user", response_model=None, responses=_STREAMED)
    async def complete(request: CompletionRequest, whose: Tenant) -> Response:
        return await answered(request, whose)

    @app.get("/v1/models", summary="The language model behind this server")
    async def models(whose: Tenant) -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in service.engine.models]}

    @app.get("/v1/models/{model:path}", summary="One model")
    async def model(model: str, whose: Tenant) -> dict[str, Any]:
        service.check_model(model)
        return _model(model)

    @app.post("/v1/users/{user}/history", summary="Add to a history")
    async def add(user: User, post: HistoryPost, whose: Tenant) -> dict[str, int]:
        if post.request_id is not None:
            done = await service.keep(whose, user, request=post.request_id, answer=post.answer or "")
        elif len(post.records) > limits.items:
            raise RequestError(f"At most {limits.items} items a request; found {len(post.records)}.", code="too_many")
        else:
            done = await service.add(whose, user, post.records)
        return done._asdict()

    @app.get("/v1/users/{user}/history", summary="A user's items, oldest first")
    async def history(
        user: User, whose: Tenant, latest: Annotated[int, Query(ge=1, le=100_000)] = 1000
    ) -> dict[str, Any]:
        items = await service.history(whose, user)
        return {"user": user, "count": len(items), "items": items[-latest:]}

    @app.delete("/v1/users/{user}/history/{item}", summary="Remove an item")
    async def delete_item(user: User, item: Annotated[Name, Path()], whose: Tenant) -> dict[str, bool]:
        await service.delete_item(whose, user, item)
        return {"deleted": True}

    @app.get("/v1/users/{user}/export", summary="Everything that is known of a user")
    async def export(user: User, whose: Tenant) -> dict[str, Any]:
        return await service.export(whose, user)

    @app.delete("/v1/users/{user}", summary="Erase a user; the answer is a receipt")
    async def erase(user: User, whose: Tenant) -> dict[str, Any]:
        return await service.erase(whose, user)

    @app.post("/v1/users/{user}/explain", summary="Which items made the persona, and what an answer owes to them")
    async def explain(user: User, post: ExplainPost, whose: Tenant) -> dict[str, Any]:
        return await service.explain(whose, user, prompt=post.prompt, answer=post.answer, most=post.most)

    @app.get("/v1/users/{user}/drift", summary="How far a persona moved between two days")
    async def drift(user: User, since: date, until: date, whose: Tenant) -> dict[str, Any]:
        return await service.drift(whose, user, since=since, until=until)

    @app.get("/health", summary="Whether the server is there")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether it would answer now")
    async def ready() -> dict[str, str]:
        if not await service.engine.ready():
            raise EngineFailure("The language model is not ready.")
        return {"status": "ready"}

    @app.get("/metrics", summary="Counters, for Prometheus", response_class=Response)
    async def metrics() -> Response:
        telemetry.kept_users.set(service.personas.kept_users)
        telemetry.kept_bytes.set(service.personas.kept_bytes)
        return Response(telemetry.text(), media_type="text/plain; version=0.0.4")

    return app


def serve(
    service: Service, *, accounts: ApiKeys, limits: RequestLimits, host: str, port: int, patience_s: int = 30
) -> None:
    """Serve until told to stop, then finish what was begun.

    Args:
        patience_s: seconds that streams have to end.
    Raises:
        ConfigError: if there are no keys and others than this machine would be let in, or the engine does not fit.
        EngineFailure: if the language model is not there.
    """
    accounts.check_address(host)
    app = create_app(service, accounts=accounts, limits=limits)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,  # it would hold users' ids, which stand in paths
        log_config=None,  # uvicorn's own closes every handler of the process
        log_level="warning",
        timeout_graceful_shutdown=patience_s,
    )

    async def run() -> None:
        await service.engine.start()  # here and not in the server, so that what is wrong reaches the caller
        whom = "this machine alone" if accounts.open else "whoever has a key"
        place = f"http://{host}:{port}"
        logger.info("%s with personas at %s/v1 for %s; routes: %s/docs", service.engine.models[0], place, whom, place)
        if not isinstance(service.engine, InProcessEngine):
            # A persona is too little work to share: a second thread makes it no faster, and is missed where vLLM runs.
            torch.set_num_threads(1)
        # What is loaded by now stays: to look through half a million objects for garbage would halt answers for 0.2 s.
        gc.freeze()
        await uvicorn.Server(config).serve()

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "personaplug"}


def _response(answered: ServiceReply) -> Response:
    persona = answered.persona
    headers = {
        "X-Request-Id": answered.id,
        "X-Personaplug-Persona": persona.applied,
        "X-Personaplug-Items": str(persona.items),
        "X-Personaplug-Persona-Scale": f"{persona.persona_scale:g}",
        **retry_after(answered.reply.status),  # vLLM may refuse for want of room, and does not say this
    }
    reply = answered.reply
    if isinstance(reply.body, bytes):
        return Response(reply.body, reply.status, headers, media_type="application/json")
    return _Streamed(reply.body, reply.status, headers)


class _Streamed(StreamingResponse):
    """A stream that is closed whether or not it was read, and says so if the model breaks off."""

    def __init__(self, events: Events, status: int, headers: dict[str, str]) -> None:
        super().__init__(_to_the_end(events), status, headers, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _to_the_end(events: Events) -> AsyncGenerator[bytes]:
    try:
        async for one in events:
            yield one
    except EngineFailure as error:  # the status has been sent by then
        yield event(error_reply(str(error), code="engine", status=502))


def _handle_errors(app: FastAPI) -> None:
    """Let every error be told in OpenAI's form, with the status that says whose it is."""

    async def known(request: Request, error: Exception) -> Response:
        status, code, text = _told(error)
        if status >= 500:
            logger.error("%s: %s", type(error).__name__, code)
        return refused(status, text, code=code)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refused(422, first_flaw(error.errors()), code="invalid_value")

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reply = error_reply(str(error.detail), code="http", status=error.status_code)
        return JSONResponse(reply, error.status_code, error.headers)

    app.add_exception_handler(PersonaPlugError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _told(error: Exception) -> tuple[int, str, str]:
    """Status, code and sentence of an error: the caller's mistakes in their own words, the server's without names."""
    if isinstance(error, RequestError):
        return error.status, error.code, str(error)
    if isinstance(error, MissingData):
        return 404, "not_found", str(error)
    if isinstance(error, ItemError):
        return 400, "item", str(error)
    if isinstance(error, EngineFailure):
        return 502, "engine", str(error)
    if isinstance(error, (StorageError, EncoderMismatch)):  # the latter while the store is moved to another encoder
        return 503, "store", "The store of histories cannot be used now; try again."
    return 500, "internal", "The server is not set up for this request."
