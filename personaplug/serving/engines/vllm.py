"""A vLLM server as engine: requests reach it unchanged, with soft tokens beside the text.

At the start it is checked which model it runs, and whether soft tokens mean there what they mean in training.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import torch

from personaplug.config import ModelConfig
from personaplug.errors import ConfigError, EngineFailure
from personaplug.infra.model_hub import find_model
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import PersonaPlug
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest, EventStream, LoadPlug
from personaplug.serving.engines.vllm_requests import EmbeddingTable, add_soft_tokens, build_body, encode_embeds
from personaplug.serving.openai_protocol import Kind

_ROUTES: dict[Kind, str] = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
_CALLER_STATUSES = (400, 413, 422, 429)  # they tell the caller something about the request
_CONNECT_S = 5
_KEEPALIVE_S = 4  # vLLM itself closes idle connections after 5
_CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError)
_PROBE = "The quick brown fox jumps over the lazy dog, and then"
_PROBE_TOKENS = 8
_MAX_DIFFERENCE = 0.05  # of the first token's log-probability, between text and embeds


class VLLMEngine(Engine):
    """A vLLM server, started with `--enable-prompt-embeds`.

    Args:
        width: D of the plug's soft tokens.
        model: empty = vLLM's own name.
        chat_date: the day of the plug's prompts, if the chat template writes one.
    """

    is_remote = True
    timeout_s: float = 120  # longest silence within a stream
    answer_s: float = 600  # longest time for an answer in one piece

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
        self.max_model_len: int | None = None  # tokens of a prompt and its answer, as vLLM says at the start
        self._served_name = ""
        self._headers = {"Authorization": f"Bearer {key.strip()}"} if key else {}
        self._open_session: aiohttp.ClientSession | None = None

    @classmethod
    def open(cls, model: ModelConfig, config: ServingConfig, load_plug: LoadPlug) -> tuple[Engine, PersonaPlug]:
        """Open the engine as `EngineOpener` says. At its start it checks vLLM's model, by width and by answers."""
        plug = load_plug(None).compute_items_in("bfloat16")
        engine = cls(
            config.engine,
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
        try:
            name, max_model_len = await self._find_model()
            await self._check_width(name)
            await self._check_embeddings(name)
            if self.chat_date is not None:
                await self._check_date(name)
            await self._check_template(name)
        except BaseException:
            await self.close()
            raise
        # Set last, so that a second start after a refusal checks again.
        self.max_model_len, self.models, self._served_name = max_model_len, self.models or (name,), name

    async def is_ready(self) -> bool:
        try:
            return (await self._fetch("/health"))[0] == 200
        except EngineFailure:
            return False

    async def close(self) -> None:
        if self._open_session is not None:
            await self._open_session.close()

    async def respond(self, request: EngineRequest) -> EngineReply:
        """Pass a request on; vLLM's refusals reach the caller with its own words and status."""
        streams, url = bool(request.body.stream), self.url + _ROUTES[request.body.kind]
        content = await asyncio.to_thread(  # checking and embedding a long prompt takes a while
            build_body, request, model=self._served_name, table=self.table, max_tokens=self.max_model_len
        )
        headers = {"X-Request-Id": request.id, "Content-Type": "application/json"}
        try:
            async with asyncio.timeout(self.timeout_s if streams else self.answer_s):
                response = await self._session.post(url, data=content, headers=headers, allow_redirects=False)
                if streams and response.status == 200:
                    events = _complete_events(response, timeout_s=self.timeout_s)
                    return EngineReply(EventStream(events, on_close=response.close))
                async with response:
                    reply = await response.read()
        except _CONNECTION_ERRORS as error:
            raise EngineFailure(f"The vLLM server does not answer ({type(error).__name__}).") from None
        if response.status == 200 or response.status in _CALLER_STATUSES:
            return EngineReply(reply, response.status)
        raise self._failure(response.status)

    @property
    def _session(self) -> aiohttp.ClientSession:
        """Connections of the event loop that first uses them."""
        if self._open_session is None or self._open_session.closed:
            self._open_session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                # Replies are bounded by asyncio.timeout: one that breaks amid its framing stops aiohttp's own timers.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            )
        return self._open_session

    def _failure(self, status: int) -> EngineFailure:
        name, reason = self._served_name, ""
        if status in (401, 403):
            reason = ": it asks for another key than this server was started with"
        elif status == 404:
            reason = f": it no longer knows the model {name}. If it runs another one now, restart this server too"
        return EngineFailure(f"The vLLM server failed (status {status}){reason}.")

    def _unfit(self, reason: str) -> ConfigError:
        return ConfigError(f"The vLLM server at {self.url} {reason}")

    async def _find_model(self) -> tuple[str, int | None]:
        """Return the name of vLLM's model, and how many tokens it reads."""
        status, text = await self._fetch("/v1/models")
        if status in (401, 403):
            raise self._unfit(f"asks for another key (status {status}).")
        with self._parsing("/v1/models"):
            model = json.loads(text)["data"][0]
            name, max_model_len = str(model["id"]), model.get("max_model_len")
        return name, max_model_len if isinstance(max_model_len, int) else None

    async def _check_width(self, name: str) -> None:
        # A single value as embeds is refused either way, and the message tells why.
        body = {"model": name, "prompt_embeds": encode_embeds(torch.zeros(1, 1)), "max_tokens": 1}
        _, message = await self._fetch("/v1/completions", body)
        if "--enable-prompt-embeds" in message:
            raise self._unfit("takes no soft tokens: start it with --enable-prompt-embeds.")
        if "hidden_size" in message and f"hidden_size {self.width}." not in message:
            raise self._unfit(
                f"runs {name}, whose embeddings have another width than the plug's {self.width}: serve the model that "
                f"the plug was trained for."
            )

    async def _check_embeddings(self, name: str) -> None:
        """Check that a text and its embeddings get the same answer."""
        text, log_prob = await self._probe(name, {"prompt": _PROBE})
        embeds = {"prompt_embeds": encode_embeds(self.table.embed(_PROBE))}
        embeds_text, embeds_log_prob = await self._probe(name, embeds)
        if text != embeds_text or not abs(log_prob - embeds_log_prob) <= _MAX_DIFFERENCE:
            raise self._unfit(
                f"answers a text and the same text embedded differently: {name} is another model than the plug's, or "
                f"its prompt_embeds are broken. Serve the plug's model."
            )

    async def _probe(self, name: str, prompt: dict[str, str]) -> tuple[str, float]:
        """Return vLLM's answer to a prompt, and its first token's log-probability."""
        body = {"model": name, "max_tokens": _PROBE_TOKENS, "temperature": 0, "logprobs": 1, **prompt}
        status, reply = await self._fetch("/v1/completions", body)
        if status != 200:
            raise self._unfit(f"refused a test request (status {status}).")
        with self._parsing("/v1/completions"):
            choice = json.loads(reply)["choices"][0]
            return choice["text"], float(choice["logprobs"]["token_logprobs"][0])

    async def _check_template(self, name: str) -> None:
        """Check that vLLM writes a chat as training did, and that soft tokens stand where the answer would begin."""
        body = {"model": name, "messages": [{"role": "user", "content": _PROBE}]}
        unanswered = body | {"add_generation_prompt": True, "chat_template_kwargs": {"enable_thinking": False}}
        expected = self.table.chat_ids(_PROBE, day=self.chat_date) or await self._tokenize(unanswered)
        if self.placement == "suffix":
            soft = SoftPrompt(torch.zeros(1, 1, self.width), placement="suffix")
            found = (await self._tokenize(add_soft_tokens(body, soft)))[:-1]
        else:
            found = await self._tokenize(unanswered)
        if found != expected:
            raise ConfigError(
                f"vLLM writes a chat for {name} otherwise than training did: soft tokens would stand behind other "
                f"tokens. Start it with a --chat-template that writes the model's own, and the same before an answer "
                f"that has begun as before one that is to begin."
            )

    async def _check_date(self, name: str) -> None:
        """Check that no template asks for today's date: it then fails if the date's function is none."""
        options = {"enable_thinking": False, "strftime_now": ""}
        body = {"model": name, "messages": [{"role": "user", "content": _PROBE}], "chat_template_kwargs": options}
        if (await self._fetch("/tokenize", body))[0] != 200:
            raise self._unfit(
                f"writes today's date into the chats of {name}; those of training hold {self.chat_date}. Start it with "
                f"--chat-template and a copy of the model's template in which each strftime_now(…) is that day."
            )

    async def _tokenize(self, body: dict[str, Any]) -> list[int]:
        status, text = await self._fetch("/tokenize", body)
        found, tokens = f"status {status}", None
        if status == 200:
            with self._parsing("/tokenize"):
                found, tokens = "no tokens", json.loads(text).get("tokens")
        if not tokens or not isinstance(tokens, list):
            raise self._unfit(
                f"must say on /tokenize how it writes a chat, to see where soft tokens stand; found {found}. Let this "
                f"server reach that route."
            )
        return tokens

    async def _fetch(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        method = "GET" if body is None else "POST"
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                self._session.request(method, self.url + path, json=body, allow_redirects=False) as response,
            ):
                return response.status, await response.text("utf-8", errors="replace")
        except (*_CONNECTION_ERRORS, ValueError) as error:  # ValueError: the key or address cannot be sent
            raise EngineFailure(f"There is no vLLM server at {self.url} ({type(error).__name__}).") from None

    @contextmanager
    def _parsing(self, path: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError):
            raise EngineFailure(f"What {self.url} says on {path} is not what vLLM says: is it a vLLM server?") from None


async def _complete_events(response: aiohttp.ClientResponse, *, timeout_s: float) -> AsyncGenerator[bytes]:
    """Hold half an event back: a client could not parse what follows it, even if that is an error."""
    unfinished = b""
    try:
        while True:
            async with asyncio.timeout(timeout_s):
                chunk = await response.content.readany()
            if not chunk:  # the end
                break
            events, end, unfinished = (unfinished + chunk).rpartition(b"\n\n")
            if end:
                yield events + end
    except _CONNECTION_ERRORS as error:
        raise EngineFailure(f"The vLLM server broke off ({type(error).__name__}).") from None
    if unfinished:
        raise EngineFailure("The vLLM server broke off amid an event.")


def _checked_url(url: str) -> str:
    """Return the address without /v1; ConfigError if it is invalid, or holds a password, which errors would show."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"The address of a vLLM server is such as http://127.0.0.1:8123; found {url!r}.")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("The address of a vLLM server holds no name or password; its key is --engine-key.")
    return url.rstrip("/").removesuffix("/v1")
