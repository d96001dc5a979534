"""A fake vLLM 0.30 server without a model. It records its requests, and tests can make it fail.

Messages and statuses match the real server; `tests/serving/test_real_vllm.py` checks this if vLLM is installed.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

WIDTH = 32
MAX_MODEL_LEN = 1024
MANY_EMBEDS = 100  # fewer soft tokens do not change the answer


@dataclass
class StandIn:
    """A server that answers "tea" to all requests.

    Attributes:
        flag: whether the server was started with --enable-prompt-embeds.
        width: width of the model's embeddings.
        embeds_say: answer to requests with embeds.
        tokenizer: renders chats with its template; None = each chat has three tokens.
        template_adds: tokens that the template adds before an answer prefix.
        status: HTTP status of chat replies.
        breaks: whether to break off a stream in the middle of an event.
        halts: whether to end a stream normally in the middle of an event.
        endless: whether a stream continues until the client disconnects.
        events: bytes to stream instead of the normal events; the stream ends after them.
        cache: parts that the keys of the prefix cache ignore: "embeds", or also the "salt"; "" = none.
        silent_s: seconds before a reply, or before the first event of a stream.
        instead: status and body that a route always replies with.
        bodies: bodies of the received requests.
        running: number of open streams.
    """

    flag: bool = True
    width: int = WIDTH
    embeds_say: str = "tea"
    tokenizer: Any = None
    template_adds: int = 0
    status: int = 200
    breaks: bool = False
    halts: bool = False
    endless: bool = False
    events: list[bytes] = field(default_factory=list)
    cache: str = ""
    silent_s: float = 0
    instead: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0
    _cached: dict[str, float] = field(default_factory=dict)

    @property
    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            self._route("/v1/models", self._models, "GET"),
            self._route("/health", self._health, "GET"),
            self._route("/tokenize", self._tokenize, "POST"),
            self._route("/v1/completions", self._complete, "POST"),
            self._route("/v1/chat/completions", self._chat, "POST"),
        ]
        return Starlette(routes=routes)

    def _route(self, path: str, answer: Callable[[Request], Awaitable[Response]], method: str) -> Route:
        async def answered(request: Request) -> Response:
            if path in self.instead:
                status, body = self.instead[path]
                return Response(body, status)
            return await answer(request)

        return Route(path, answered, methods=[method])

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "small", "max_model_len": MAX_MODEL_LEN}]})

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200)

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        began = body.get("continue_final_message", False)
        if self.tokenizer is not None:
            return self._rendered(body, began)
        return JSONResponse({"tokens": [1, 2, 3, *([9] * self.template_adds * began), *([0] * began)]})

    def _rendered(self, body: dict[str, Any], began: bool) -> Response:
        """Tokenize a chat with the template of `tokenizer`, like vLLM. Soft tokens count as one token each."""
        turns = [turn for turn in body["messages"] if isinstance(turn["content"], str)]
        options = body.get("chat_template_kwargs", {})
        try:
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **options)
        except Exception as error:  # a template may raise any error
            return _refused(str(error))
        return JSONResponse({"tokens": [*ids, *([0] * began)]})

    async def _complete(self, request: Request) -> Response:
        body = await self._noted(request)
        if "prompt_embeds" in body:
            if not self.flag:
                return _refused("You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
            embeds = read_embeds(body["prompt_embeds"])
            if embeds.shape[1] != self.width:
                width = embeds.shape[1]
                return _refused(
                    f"`prompt_embeds` hidden_size {width} does not match the model's hidden_size {self.width}."
                )
        text = self.embeds_say if "prompt_embeds" in body else "tea"
        logprobs = {"tokens": [text], "token_logprobs": [self._logprob(body, [body.get("prompt_embeds", "")])]}
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": "stop"}
        return JSONResponse({"id": "1", "choices": [choice]})

    async def _chat(self, request: Request) -> Response:
        body = await self._noted(request)
        if self.status != 200:
            return _refused("the text that was sent: " + json.dumps(body["messages"]), status=self.status)
        if body.get("stream"):
            return StreamingResponse(self._events(), media_type="text/event-stream")
        await asyncio.sleep(0 if body.get("logprobs") else self.silent_s)
        parts = [part for turn in body["messages"] if isinstance(turn.get("content"), list) for part in turn["content"]]
        logprob = self._logprob(body, [part.get("data", "") for part in parts])
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": "tea"}}
        if tokens := body.get("logprob_token_ids"):
            embeds = sum(len(read_embeds(part["data"])) for part in parts)
            top = [_token(f"token_id:{token}", label_logprob(token, embeds)) for token in tokens]
            choice["logprobs"] = {"content": [_token("token_id:1", -1.0) | {"top_logprobs": top}]}
            return JSONResponse({"id": "1", "choices": [choice], "usage": {"prompt_tokens": 3 + embeds}})
        return JSONResponse({"id": "1", "choices": [choice | {"logprobs": {"content": [_token("tea", logprob)]}}]})

    async def _events(self) -> AsyncIterator[bytes]:
        self.running += 1
        try:
            await asyncio.sleep(self.silent_s)
            for event in self.events:
                yield event
            if self.events:
                return
            yield b'data: {"choices": [{"index": 0, "delta": {"content": "te"}}]}\n\n'
            while self.endless:
                await asyncio.sleep(0.01)
                yield b'data: {"choices": [{"index": 0, "delta": {"content": "e"}}]}\n\n'
            if self.breaks or self.halts:
                yield b'data: {"choices": [{"index": 0, "delta": {"cont'
            if self.breaks:
                raise ConnectionError("gone")
            if not self.halts:
                yield b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n'
        finally:
            self.running -= 1

    def _logprob(self, body: dict[str, Any], embeds: list[str]) -> float:
        """Return the log-probability of an answer: of its embeds, or of embeds with the same cache key."""
        vectors = [read_embeds(data) for data in embeds if data]
        if sum(len(rows) for rows in vectors) < MANY_EMBEDS:
            return -1.0
        logprob = -1.0 - zlib.crc32(b"".join(rows.float().numpy().tobytes() for rows in vectors)) / 2**32
        if not self.cache:
            return logprob
        size = [len(rows) for rows in vectors]
        key = json.dumps([size, body.get("messages") and len(body["messages"])])
        key += "" if self.cache == "salt" else str(body.get("cache_salt"))
        return self._cached.setdefault(key, logprob)

    async def _noted(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        return body


def label_logprob(token: int, embeds: int) -> float:
    """Return the log-probability of a token that `logprob_token_ids` asks for, behind this many embeddings."""
    return -0.25 * (token % 7) - 0.125 * embeds


def read_embeds(data: str) -> torch.Tensor:
    """Decode the vectors of a request."""
    embeds: torch.Tensor = torch.load(io.BytesIO(base64.b64decode(data)), weights_only=True)
    return embeds


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def _refused(message: str, *, status: int = 400) -> Response:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)
