"""A vLLM server as engine: requests go to it as they came, with the soft tokens beside the text.

What it runs, and whether it takes soft tokens to mean what they mean in training, is found out at the start.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import torch

from personaplug.errors import ConfigError, EngineFailure, RequestError
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines.base import EngineReply, EngineRequest, Events
from personaplug.serving.engines.vllm_requests import EmbeddingTable, encoded, with_soft_tokens, written
from personaplug.serving.openai_protocol import Kind

_ROUTES: dict[Kind, str] = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
_CALLERS = (400, 413, 422, 429)  # statuses that tell the caller something about the request
_CONNECT_S = 5
_IDLE_S = 4  # a connection is kept; vLLM itself lets go of one after 5
_GONE = (aiohttp.ClientError, TimeoutError)
_PROBE = "The quick brown fox jumps over the lazy dog, and then"
_PROBE_TOKENS = 8
_CLOSE = 0.05  # log-probability of the first token, between text and embeds


@dataclass(frozen=True)
class _Said:
    """What vLLM said of itself."""

    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class VLLMEngine:
    """A vLLM server, started with `--enable-prompt-embeds`.

    Args:
        url: its address, without /v1.
        table: the model's embeddings.
        width: D of the plug's soft tokens.
        placement: of the soft tokens.
        model: by what name requests call it; empty = as it calls itself.
        key: that it asks for, if any.
        timeout_s: seconds between two signs of life.
        answer_s: seconds that an answer in one piece may take, which is silent until it is there.
    Raises:
        ConfigError: if the address is none.

    Attributes:
        max_model_len: tokens of a prompt and its answer, as vLLM says at the start.
    """

    def __init__(
        self,
        url: str,
        *,
        table: EmbeddingTable,
        width: int,
        placement: str,
        model: str = "",
        key: str | None = None,
        timeout_s: float = 120,
        answer_s: float = 600,
    ) -> None:
        self.name, self.url = "vllm", _checked_address(url)
        self.models: tuple[str, ...] = (model,) if model else ()
        self.table, self.width, self.placement = table, width, placement
        self.max_model_len: int | None = None
        self._theirs = ""
        self.timeout_s, self.answer_s = timeout_s, answer_s
        self._headers = {"Authorization": f"Bearer {key.strip()}"} if key else {}
        self._opened: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Learn the model's name, then make sure that embeds are taken, and mean what text means."""
        if self._theirs:
            return
        try:
            await self._look()
        except BaseException:
            await self.close()
            raise

    async def _look(self) -> None:
        name, most = await self._served()
        await self._check_width(name)
        await self._check_same(name)
        if self.placement == "suffix":
            await self._check_layout(name)
        # Last, so that whoever asks again after a refusal is refused again.
        self.max_model_len, self.models, self._theirs = most, self.models or (name,), name

    async def ready(self) -> bool:
        """Whether it says that it is well."""
        try:
            return (await self._asked("/health")).status == 200
        except EngineFailure:
            return False

    async def close(self) -> None:
        """Close the connections."""
        if self._opened is not None:
            await self._opened.close()

    async def answer(self, question: EngineRequest) -> EngineReply:
        """Pass a request on; see `Engine.answer`. What vLLM refuses is answered with its own words and status."""
        streams = bool(question.body.get("stream"))
        content = await asyncio.to_thread(self._written, question)  # long prompts take a while to check and to embed
        headers = {"X-Request-Id": question.id, "Content-Type": "application/json"}
        try:
            async with asyncio.timeout(self.timeout_s if streams else self.answer_s):
                response = await self._session.post(
                    self.url + _ROUTES[question.kind], data=content, headers=headers, allow_redirects=False
                )
                if streams and response.status == 200:
                    return EngineReply(_Events(response, timeout_s=self.timeout_s))
                async with response:
                    said = await response.read()
        except _GONE as error:
            raise EngineFailure(f"The vLLM server does not answer ({type(error).__name__}).") from None
        if response.status == 200 or response.status in _CALLERS:
            return EngineReply(said, response.status)
        raise self._failure(response.status)

    @property
    def _session(self) -> aiohttp.ClientSession:
        """Connections that are kept; they belong to the event loop that first asks for them."""
        if self._opened is None or self._opened.closed:
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                # Answers are waited for by timers of our own: a reply that breaks amid its framing stops aiohttp's.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            )
        return self._opened

    async def likelihoods(
        self, prompt: str, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """vLLM gives no likelihood of a text behind embeds."""
        raise RequestError(
            "vLLM cannot say how likely an answer is behind soft tokens: leave `answer` out, or use "
            "`personaplug explain`, which loads the model itself.",
            code="unsupported",
        )

    def _written(self, question: EngineRequest) -> bytes:
        return written(question, model=self._theirs, table=self.table, most=self.max_model_len)

    def _failure(self, status: int) -> EngineFailure:
        """What a status says that is not the caller's fault."""
        if status in (401, 403):
            why = ": it asks for another key than this server was started with"
        elif status == 404:
            why = f": it no longer knows the model {self._theirs}. If it runs another one now, restart this server too"
        else:
            why = ""
        return EngineFailure(f"The vLLM server failed (status {status}){why}.")

    async def _served(self) -> tuple[str, int | None]:
        """The model that vLLM serves: its name, and how many tokens it reads."""
        path = "/v1/models"
        response = await self._asked(path)
        if response.status in (401, 403):
            raise ConfigError(f"The vLLM server at {self.url} asks for another key (status {response.status}).")
        with self._reading(path):
            first = response.json()["data"][0]
            name, most = str(first["id"]), first.get("max_model_len")
        return name, most if isinstance(most, int) else None

    async def _check_width(self, name: str) -> None:
        # A single value as embeds: refused either way, and the words tell why.
        body = {"model": name, "prompt_embeds": encoded(torch.zeros(1, 1)), "max_tokens": 1}
        response = await self._asked("/v1/completions", body)
        said = response.text
        if "--enable-prompt-embeds" in said:
            raise ConfigError(
                f"The vLLM server at {self.url} takes no soft tokens: start it with --enable-prompt-embeds."
            )
        if "hidden_size" in said and f"hidden_size {self.width}." not in said:
            raise ConfigError(
                f"The vLLM server at {self.url} runs {name}, whose embeddings have another width than the "
                f"plug's {self.width}: serve the model that the plug was trained for."
            )

    async def _check_same(self, name: str) -> None:
        """Compare a text with the same text embedded."""
        common = {"model": name, "max_tokens": _PROBE_TOKENS, "temperature": 0, "logprobs": 1}
        embeds = encoded(self.table.embedded(_PROBE))
        answers = []
        for given in ({"prompt": _PROBE}, {"prompt_embeds": embeds}):
            response = await self._asked("/v1/completions", common | given)
            if response.status != 200:
                raise ConfigError(f"The vLLM server at {self.url} refused a test request (status {response.status}).")
            with self._reading("/v1/completions"):
                choice = response.json()["choices"][0]
                answers.append((choice["text"], float(choice["logprobs"]["token_logprobs"][0])))
        (text, sure), (other, as_sure) = answers
        if text != other or not abs(sure - as_sure) <= _CLOSE:
            raise ConfigError(
                f"The vLLM server at {self.url} answers a text and the same text embedded differently: {name} "
                f"is another model than the plug's, or its prompt_embeds are broken. Serve the plug's model."
            )

    async def _check_layout(self, name: str) -> None:
        """Make sure that soft tokens stand where the answer would begin, as they did in training."""
        asked = [{"role": "user", "content": _PROBE}]
        opened = {"model": name, "messages": asked, "add_generation_prompt": True}
        soft = SoftPrompt(torch.zeros(1, 1, self.width), placement="suffix")
        plain = await self._tokens(opened)
        behind = await self._tokens(with_soft_tokens({"model": name, "messages": asked}, soft))
        if behind[:-1] != plain:
            raise ConfigError(
                f"The chat template of {name} writes something else before an answer that has begun than before one "
                f"that is to begin: soft tokens would stand elsewhere than in training. Start vLLM with a "
                f"--chat-template that writes the same before both."
            )

    async def _tokens(self, body: dict[str, Any]) -> list[int]:
        """The tokens of a chat."""
        path = "/tokenize"
        response = await self._asked(path, body)
        found, tokens = f"status {response.status}", None
        if response.status == 200:
            with self._reading(path):
                found, tokens = "no tokens", response.json().get("tokens")
        if not tokens or not isinstance(tokens, list):
            raise ConfigError(
                f"The vLLM server at {self.url} must say on {path} how it writes a chat, to see where soft tokens "
                f"stand; found {found}. Let this server reach that route."
            )
        return tokens

    async def _asked(self, path: str, body: dict[str, Any] | None = None) -> _Said:
        method = "GET" if body is None else "POST"
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                self._session.request(method, self.url + path, json=body, allow_redirects=False) as response,
            ):
                return _Said(response.status, await response.text("utf-8", errors="replace"))
        except (*_GONE, ValueError) as error:  # the latter for a key or an address that nothing can be sent with
            raise EngineFailure(f"There is no vLLM server at {self.url} ({type(error).__name__}).") from None

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Around what takes a reply apart that may be another server's."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError):
            raise EngineFailure(f"What {self.url} says on {path} is not what vLLM says: is it a vLLM server?") from None


def _checked_address(url: str) -> str:
    """The address without /v1.

    Raises:
        ConfigError: if it is none, or holds a password, which would be told in errors.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"The address of a vLLM server is such as http://127.0.0.1:8123; found {url!r}.")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("The address of a vLLM server holds no name or password; its key is --engine-key.")
    return url.rstrip("/").removesuffix("/v1")


class _Events(Events):
    """vLLM's events; it owns the response, so that closing it ends the answer even if nobody has read from it.

    A generator alone would not do: the end of one that never began is never run.
    """

    def __init__(self, response: aiohttp.ClientResponse, *, timeout_s: float) -> None:
        self._response, self._whole = response, _whole_events(response, timeout_s=timeout_s)

    async def __anext__(self) -> bytes:
        return await anext(self._whole)

    async def aclose(self) -> None:
        """End the answer: what has not been read of it by now never comes."""
        try:
            await self._whole.aclose()
        finally:
            self._response.close()


async def _whole_events(response: aiohttp.ClientResponse, *, timeout_s: float) -> AsyncGenerator[bytes]:
    """Half an event is held back: what follows it, if only an error, could not be read behind it."""
    held = b""
    try:
        while chunk := await _next_chunk(response, timeout_s=timeout_s):
            events, end, held = (held + chunk).rpartition(b"\n\n")
            if end:
                yield events + end
    except _GONE as error:
        raise EngineFailure(f"The vLLM server broke off ({type(error).__name__}).") from None
    if held:
        raise EngineFailure("The vLLM server broke off amid an event.")


async def _next_chunk(response: aiohttp.ClientResponse, *, timeout_s: float) -> bytes:
    """What has come of an answer by now; empty at its end."""
    async with asyncio.timeout(timeout_s):
        return await response.content.readany()
