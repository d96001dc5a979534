"""A vLLM server as engine: sends it requests with text and soft tokens.

At start, it checks which model the server runs, and that soft tokens have the same effect as in training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from personaplug.config import ModelConfig
from personaplug.errors import ConfigError, EngineFailure
from personaplug.infra.model_hub import find_model
from personaplug.plug.model import PersonaPlug
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest, EventStream, LoadPlug, too_long
from personaplug.serving.engines.vllm_checks import StartChecks
from personaplug.serving.engines.vllm_labels import (
    LabelReply,
    LabelTree,
    build_query,
    check_label_request,
    wants_probabilities,
)
from personaplug.serving.engines.vllm_replies import (
    CONNECTION_ERRORS,
    check_is_stream,
    check_refusal,
    check_reply,
    checked_events,
    read_bounded,
)
from personaplug.serving.engines.vllm_requests import EmbeddingTable, build_body, cache_salt, check_body
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest, Kind, ReplyFormatter
from personaplug.serving.spans import trace_headers

_ROUTES: dict[Kind, str] = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
_CALLER_STATUSES = (400, 413, 422, 429)  # these errors are about the request, so the caller gets them
_CONNECT_S = 5
_KEEPALIVE_S = 4  # below the 5 seconds after which vLLM closes idle connections
_MAX_CHECK_BYTES = 4 * 2**20
_LABEL_QUERIES = 64  # at once, for the probabilities of labels


@dataclass(frozen=True)
class Prepared:
    """A request that passed the checks."""

    labels: LabelTree | None = None  # the labels whose probabilities it asks for


class VLLMEngine(Engine):
    """A vLLM server, started with `--enable-prompt-embeds`.

    Args:
        width: dimension D of the plug's soft tokens.
        model: name of the model for callers; empty = vLLM's name.
        chat_date: date in the plug's training prompts, if the chat template writes one.
    """

    is_remote = True
    timeout_s: float = 120  # maximum time between two events of a stream
    answer_s: float = 600  # maximum time of a reply in one piece
    stream_s: float = 3600  # maximum time of a stream

    def __init__(
        self,
        url: str,
        *,
        table: EmbeddingTable,
        width: int,
        placement: str,
        model: str = "",
        key: str | None = None,
        chat_date: str | None = None,
    ) -> None:
        self.url = _checked_url(url)
        self.models = (model,) if model else ()
        self.table, self.width, self.placement, self.chat_date = table, width, placement, chat_date
        self.max_model_len: int | None = None  # maximum tokens of a prompt and its answer, reported by vLLM at start
        self.salts_personas = False  # True if each persona needs its own cache salt; set at start
        self._served_name = ""
        self._headers = {"Authorization": f"Bearer {key.strip()}"} if key else {}
        self._open_session: aiohttp.ClientSession | None = None
        self._label_slots = asyncio.Semaphore(_LABEL_QUERIES)

    @classmethod
    def open(cls, model: ModelConfig, config: ServingConfig, load_plug: LoadPlug) -> tuple[Engine, PersonaPlug]:
        """Open the engine; see `EngineOpener`. Its `start` checks the width and the answers of vLLM's model."""
        url = _checked_url(config.engine)  # before models are loaded
        plug = load_plug(None).compute_items_in("bfloat16")
        engine = cls(
            url,
            table=EmbeddingTable.of_folder(find_model(model.llm)),
            width=plug.spec.llm.width,
            placement=plug.config.placement,
            model=config.model,
            key=config.engine_key,
            chat_date=plug.spec.llm.chat_date,
        )
        return engine, plug

    async def start(self) -> None:
        if self._served_name:
            return
        checks = StartChecks(
            self._fetch,
            self.url,
            table=self.table,
            width=self.width,
            placement=self.placement,
            chat_date=self.chat_date,
        )
        try:
            facts = await checks.run()
        except BaseException:
            await self.close()
            raise
        # Set last, so that `start` checks again after a failure.
        self.max_model_len, self.salts_personas = facts.max_model_len, facts.salts_personas
        self.models, self._served_name = self.models or (facts.name,), facts.name

    async def is_ready(self) -> bool:
        try:
            return (await self._fetch("/health"))[0] == 200
        except EngineFailure:
            return False

    async def close(self) -> None:
        if self._open_session is not None:
            await self._open_session.close()

    def check_length(self, characters: int) -> None:
        if self.max_model_len is not None and characters > self.max_model_len * self.table.longest_token:
            raise too_long(self.max_model_len)

    async def prepare(self, body: ChatRequest | CompletionRequest, *, choices: Sequence[str] = ()) -> Prepared:
        self.check_length(body.characters)
        await asyncio.to_thread(check_body, body, table=self.table, max_tokens=self.max_model_len)
        if not wants_probabilities(body, choices=choices):
            return Prepared()
        check_label_request(body, choices=choices, placement=self.placement)
        return Prepared(await asyncio.to_thread(LabelTree.of, choices, self.table))

    async def respond(self, request: EngineRequest) -> EngineReply:
        """Forward a request. The caller gets vLLM's refusals with their message and status."""
        prepared = request.prepared
        if not isinstance(prepared, Prepared):
            prepared = await self.prepare(request.body, choices=request.choices)
        if prepared.labels is not None:
            return await self._respond_with_probabilities(request, prepared.labels)
        content = await asyncio.to_thread(self._body, request)  # embedding a long prompt takes long
        if not request.body.stream:
            return EngineReply(*await self._ask(content, request))
        with _answering():
            async with asyncio.timeout(self.timeout_s):
                response = await self._post(content, request)
                if response.status == 200:
                    return EngineReply(self._stream(response, is_chat=request.body.kind == "chat"))
                async with response:
                    refusal = await read_bounded(response)
        self._check(refusal, response.status, request=request)
        return EngineReply(refusal, response.status)

    async def _ask(self, content: bytes, request: EngineRequest) -> tuple[bytes, int]:
        """Send a request and return the whole reply and its status: 200, or that of a refusal."""
        with _answering():
            async with asyncio.timeout(self.answer_s), await self._post(content, request) as response:
                reply = await read_bounded(response)
        self._check(reply, response.status, request=request)
        return reply, response.status

    async def _ask_all(self, bodies: Sequence[bytes], request: EngineRequest) -> list[tuple[bytes, int]]:
        """Send requests side by side, and return the replies; the first failure ends all."""

        async def ask(body: bytes) -> tuple[bytes, int]:
            async with self._label_slots:
                return await self._ask(body, request)

        tasks = [asyncio.ensure_future(ask(body)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _post(self, content: bytes, request: EngineRequest) -> aiohttp.ClientResponse:
        url = self.url + _ROUTES[request.body.kind]
        headers = {"X-Request-Id": request.id, "Content-Type": "application/json", **trace_headers()}
        return await self._session.post(url, data=content, headers=headers, allow_redirects=False)

    def _check(self, reply: bytes, status: int, *, request: EngineRequest) -> None:
        if status == 200:
            check_reply(reply, is_chat=request.body.kind == "chat")
        elif status in _CALLER_STATUSES:
            check_refusal(reply, status)
        else:
            raise self._failure(status)

    async def _respond_with_probabilities(self, request: EngineRequest, tree: LabelTree) -> EngineReply:
        """Ask for the probabilities of the labels' tokens side by side, and choose the likeliest label."""
        salt = cache_salt(request, of_persona=self.salts_personas)
        build = partial(build_query, request, model=self._served_name, table=self.table, salt=salt)
        bodies = await asyncio.to_thread(lambda: [build(query) for query in tree.queries])
        replies = await self._ask_all(bodies, request)
        refused = next((reply for reply in replies if reply[1] != 200), None)
        if refused is not None:
            return EngineReply(*refused)
        answer = LabelReply(request, tree, [reply for reply, _ in replies])
        formatter = ReplyFormatter(request.body.kind, model=self._served_name, request_id=request.id)
        if request.body.stream:
            return EngineReply(EventStream(answer.events(formatter), on_close=lambda: None))
        return EngineReply(answer.whole(formatter))

    def _body(self, request: EngineRequest) -> bytes:
        salt = cache_salt(request, of_persona=self.salts_personas)
        table, max_tokens = self.table, self.max_model_len
        return build_body(request, model=self._served_name, table=table, max_tokens=max_tokens, salt=salt)

    def _stream(self, response: aiohttp.ClientResponse, *, is_chat: bool) -> EventStream:
        try:
            check_is_stream(response)
        except EngineFailure:
            response.close()
            raise
        events = checked_events(response, is_chat=is_chat, silence_s=self.timeout_s, total_s=self.stream_s)
        return EventStream(events, on_close=response.close)

    @property
    def _session(self) -> aiohttp.ClientSession:
        """The HTTP session; it belongs to the event loop that first uses it."""
        if self._open_session is None or self._open_session.closed:
            self._open_session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                # asyncio.timeout limits replies, because broken framing stops aiohttp's own timers.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            )
        return self._open_session

    def _failure(self, status: int) -> EngineFailure:
        name, reason = self._served_name, ""
        if status in (401, 403):
            reason = ": it requires another key. Start this server with that --engine-key"
        elif status == 404:
            reason = f": it no longer serves the model {name}. If it serves another model now, restart this server"
        return EngineFailure(f"The vLLM server failed (status {status}){reason}.")

    async def _fetch(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        method = "GET" if body is None else "POST"
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                self._session.request(method, self.url + path, json=body, allow_redirects=False) as response,
            ):
                reply = await read_bounded(response, max_bytes=_MAX_CHECK_BYTES)
                return response.status, reply.decode("utf-8", errors="replace")
        except (*CONNECTION_ERRORS, ValueError) as error:  # ValueError: the key or address cannot be sent
            raise EngineFailure(f"Cannot reach a vLLM server at {self.url} ({type(error).__name__}).") from None


@contextmanager
def _answering() -> Iterator[None]:
    """Report a broken connection or a timeout as a failure of the engine."""
    try:
        yield
    except CONNECTION_ERRORS as error:
        raise EngineFailure(f"The vLLM server does not answer ({type(error).__name__}). Try again later.") from None


def _checked_url(url: str) -> str:
    """Return the address without /v1; ConfigError if it is invalid or has a password, which messages would show."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or " " in url:
        raise ConfigError("The address of the vLLM server is not valid. Use an address such as http://127.0.0.1:8123.")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("The address of the vLLM server must not have a name or password. Use --engine-key.")
    return url.rstrip("/").removesuffix("/v1")
