"""A vLLM server as engine: requests go to it as they came, with the soft tokens beside the text.

In a chat only the soft tokens are sent, and vLLM renders its template around them: with the placement `suffix` as the
beginning of the answer, with `prefix` in front of the user's last text. What stands in front of the former is the same
for all users, so vLLM's prefix cache serves them all. A completion has no place for them: the whole prompt is sent
embedded.

vLLM 0.30 can be brought down from outside by what it does not check, so this is checked here: soft tokens that are no
numbers spoil other requests' answers, so callers cannot send any of their own; and its placeholder's name, wherever it
gets into a prompt, or `echo` beside embeds, end its process.
"""

from __future__ import annotations

import asyncio
import base64
import io
import re
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from personaplug.backends.rendering import frame_of
from personaplug.engines.base import CHARACTERS, Events, Question, Reply
from personaplug.errors import BadConfig, EngineFailure, RequestError
from personaplug.soft_prompt import SoftPrompt
from personaplug.wire import Kind, as_json

PLACEHOLDER = "<prompt_embeds>"
_EMBEDS = "prompt_embeds"  # a field of a completion, and a type of content in a chat
_ESCAPED = re.compile(rb"\\u00([2-7][0-9a-fA-F])")
_ROUTES: dict[Kind, str] = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
_CALLERS = (400, 413, 422, 429)  # statuses that tell the caller something about the request
_CONNECT_S = 5
_PROBE = "The quick brown fox jumps over the lazy dog, and then"
_PROBE_TOKENS = 8
_CLOSE = 0.05  # log-probability of the first token, between text and embeds


class EmbeddingTable:
    """The served model's own embeddings and tokenizer, for prompts that have to be sent embedded.

    Args:
        rows: (V, D).
        tokenizer: of transformers.
    Raises:
        BadConfig: if the tokenizer does not leave a text in one piece.
    """

    def __init__(self, rows: Tensor, tokenizer: Any) -> None:
        self.rows, self.tokenizer = rows, tokenizer
        self._one_at_a_time = threading.Lock()  # a tokenizer of transformers may change itself when it is called
        self._before = len(frame_of(tokenizer)[0])

    @classmethod
    def of_folder(cls, folder: Path) -> EmbeddingTable:
        """Read them from a model's folder; of its weights, the embeddings alone."""
        from transformers import AutoTokenizer

        from personaplug.weights import read_embeddings

        return cls(read_embeddings(folder), AutoTokenizer.from_pretrained(folder))

    def embedded(self, text: str) -> Tensor:
        """(n, D) of a text, with the special tokens that the tokenizer puts around it."""
        return self._rows_of(self._ids(text))

    def embedded_with(self, text: str, soft: SoftPrompt, *, most: int | None = None) -> Tensor:
        """(n, D) of a text with soft tokens: behind it all, or between the tokenizer's BOS, if any, and the text.

        Args:
            most: tokens that the model can read, if known; what is too long is refused before it takes memory.
        Raises:
            RequestError: if it is too long.
        """
        own = soft.vectors[0].to(self.rows)
        if most is not None and len(text) > most * CHARACTERS:
            raise _too_long(most, f"{len(text)} characters")
        ids = self._ids(text)
        if most is not None and len(ids) + len(own) > most:
            raise _too_long(most, f"{len(ids)} tokens and the persona's {len(own)}")
        at = len(ids) if soft.placement == "suffix" else self._before
        return torch.cat([self._rows_of(ids[:at]), own, self._rows_of(ids[at:])])

    def _rows_of(self, ids: Sequence[int]) -> Tensor:
        return self.rows[torch.tensor(ids, dtype=torch.int64)]

    def _ids(self, text: str, **options: Any) -> list[int]:
        with self._one_at_a_time:
            return list(self.tokenizer(text, **options)["input_ids"])


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
        self.name, self.url = "vllm", url.rstrip("/").removesuffix("/v1")
        self.models: tuple[str, ...] = (model,) if model else ()
        self.table, self.width, self.placement = table, width, placement
        self.max_model_len: int | None = None
        self._theirs = ""
        self._timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        self._patience = httpx.Timeout(answer_s, connect=_CONNECT_S)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._client = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=self._timeout, limits=limits)

    async def start(self) -> None:
        """Learn the model's name, then make sure that embeds are taken, and mean what text means."""
        if self._theirs:
            return
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
            return (await self._client.get("/health")).status_code == 200
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def answer(self, question: Question) -> Reply:
        """Pass a request on; see `Engine.answer`. What vLLM refuses is answered with its own words and status."""
        streams = bool(question.body.get("stream"))
        content = await asyncio.to_thread(self._written, question)  # long prompts take a while to embed
        request = self._client.build_request(
            "POST",
            _ROUTES[question.kind],
            content=content,
            headers={"X-Request-Id": question.id, "Content-Type": "application/json"},
            timeout=self._timeout if streams else self._patience,
        )
        try:
            response = await self._client.send(request, stream=True)
            if streams and response.status_code == 200:
                return Reply(_Events(response))
            async with aclosing(response):
                said = await response.aread()
        except httpx.HTTPError as error:
            raise EngineFailure(f"The vLLM server does not answer ({type(error).__name__}).") from None
        if response.status_code == 200 or response.status_code in _CALLERS:
            return Reply(said, response.status_code)
        raise self._failure(response.status_code)

    async def likelihoods(
        self, prompt: str, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """vLLM gives no likelihood of a text behind embeds."""
        raise RequestError(
            "vLLM cannot say how likely an answer is behind soft tokens: leave `answer` out, or use "
            "`personaplug explain`, which loads the model itself.",
            code="unsupported",
        )

    def _written(self, question: Question) -> bytes:
        """The request as vLLM gets it."""
        body = {**question.body, "model": self._theirs}
        _check_fields(body)
        if question.choices and not _constrained(body):
            body = {"temperature": 0} | body | {"structured_outputs": {"choice": list(question.choices)}}
        written = as_json(body)
        _check_text(body, written)
        if question.soft is None:
            return written
        if question.kind == "chat":
            return as_json(with_soft_tokens(body, question.soft))
        embeds = self.table.embedded_with(body.pop("prompt"), question.soft, most=self.max_model_len)
        return as_json({**body, _EMBEDS: encoded(embeds)})

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
        if response.status_code in (401, 403):
            raise BadConfig(f"The vLLM server at {self.url} asks for another key (status {response.status_code}).")
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
            raise BadConfig(
                f"The vLLM server at {self.url} takes no soft tokens: start it with --enable-prompt-embeds."
            )
        if "hidden_size" in said and f"hidden_size {self.width}." not in said:
            raise BadConfig(
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
            if response.status_code != 200:
                raise BadConfig(
                    f"The vLLM server at {self.url} refused a test request (status {response.status_code})."
                )
            with self._reading("/v1/completions"):
                choice = response.json()["choices"][0]
                answers.append((choice["text"], float(choice["logprobs"]["token_logprobs"][0])))
        (text, sure), (other, as_sure) = answers
        if text != other or not abs(sure - as_sure) <= _CLOSE:
            raise BadConfig(
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
            raise BadConfig(
                f"The chat template of {name} writes something else before an answer that has begun than before one "
                f"that is to begin: soft tokens would stand elsewhere than in training. Start vLLM with a "
                f"--chat-template that writes the same before both."
            )

    async def _tokens(self, body: dict[str, Any]) -> list[int]:
        """The tokens of a chat."""
        path = "/tokenize"
        response = await self._asked(path, body)
        found, tokens = f"status {response.status_code}", None
        if response.status_code == 200:
            with self._reading(path):
                found, tokens = "no tokens", response.json().get("tokens")
        if not tokens or not isinstance(tokens, list):
            raise BadConfig(
                f"The vLLM server at {self.url} must say on {path} how it writes a chat, to see where soft tokens "
                f"stand; found {found}. Let this server reach that route."
            )
        return tokens

    async def _asked(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return await (self._client.get(path) if body is None else self._client.post(path, json=body))
        except httpx.HTTPError as error:
            raise EngineFailure(f"There is no vLLM server at {self.url} ({type(error).__name__}).") from None

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Around what takes a reply apart that may be another server's."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError):
            raise EngineFailure(f"What {self.url} says on {path} is not what vLLM says: is it a vLLM server?") from None


def encoded(vectors: Tensor) -> str:
    """(n, D) vectors as vLLM takes them.

    Raises:
        EngineFailure: if one of them is no finite number, which would spoil other requests' answers.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise EngineFailure("The persona holds values that are no numbers; it was not sent.")
    buffer = io.BytesIO()
    torch.save(vectors.detach().cpu().clone(), buffer)  # a view would be saved with all that it is a view of
    return base64.b64encode(buffer.getvalue()).decode()


def with_soft_tokens(body: dict[str, Any], soft: SoftPrompt) -> dict[str, Any]:
    """A chat with soft tokens: as the beginning of the answer, or right before the last user's text."""
    part = {"type": _EMBEDS, "data": encoded(soft.vectors[0].to(torch.bfloat16))}
    messages = list(body["messages"])
    if soft.placement == "suffix":
        if body.get("continue_final_message"):
            raise RequestError(
                "continue_final_message leaves no place for a persona behind the prompt.", code="messages"
            )
        messages.append({"role": "assistant", "content": [part]})
        return {**body, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    asked = messages[place]
    content = asked.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    messages[place] = {**asked, "content": [part, *parts]}
    return {**body, "messages": messages}


def _constrained(body: dict[str, Any]) -> bool:
    """Whether a request says itself what form its answer has."""
    return any(body.get(name) for name in ("structured_outputs", "response_format", "tools"))


def _check_fields(body: dict[str, Any]) -> None:
    """Refuse the fields that spoil vLLM or end its process."""
    if _EMBEDS in body or any(_is_embeds(part) for part in _parts(body)):
        raise RequestError(f"{_EMBEDS} is reserved: only this server puts embeds into a prompt.", code="reserved")
    if body.get("echo") or body.get("prompt_logprobs") is not None:
        raise RequestError("echo and prompt_logprobs cannot be had here.", code="unsupported")


def _check_text(body: dict[str, Any], written: bytes) -> None:
    """Refuse the placeholder, wherever a template might write it into a prompt."""
    # Arguments of tools are JSON within a string, which vLLM reads again before its template writes them.
    plain = _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), written).replace(b"\\", b"")
    # Some templates join the parts of a message with nothing between them.
    texts = [text for part in _parts(body) for name, text in part.items() if name != "type" and isinstance(text, str)]
    if PLACEHOLDER.encode() in plain or PLACEHOLDER in "".join("".join(texts).split()):
        raise RequestError(f"A request may not hold {PLACEHOLDER}, which is reserved.", code="reserved_text")


def _parts(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of messages whose content is a list."""
    for message in _dicts(body.get("messages")):
        yield from _dicts(message.get("content"))


def _dicts(value: Any) -> list[dict[str, Any]]:
    """Those of a list; of what is none, as a completion's own `messages` may be, nothing."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _is_embeds(part: dict[str, Any]) -> bool:
    """Whether vLLM takes a part for embeds, which it does by its type and, beside a `uuid`, by the name of a field."""
    return part.get("type") == _EMBEDS or _EMBEDS in part


def _too_long(most: int, found: str) -> RequestError:
    return RequestError(
        f"The model reads {most} tokens at most; the prompt has {found}. Shorten it.", code="context_length_exceeded"
    )


class _Events(Events):
    """vLLM's events; it owns the response, so that closing it ends the answer even if nobody has read from it.

    A generator alone would not do: the end of one that never began is never run.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response, self._whole = response, _whole_events(response)

    async def __anext__(self) -> bytes:
        return await anext(self._whole)

    async def aclose(self) -> None:
        """End the answer."""
        try:
            await self._whole.aclose()
        finally:
            await self._response.aclose()


async def _whole_events(response: httpx.Response) -> AsyncGenerator[bytes]:
    """Half an event is held back: what follows it, if only an error, could not be read behind it."""
    held = b""
    try:
        async with aclosing(response):
            async for chunk in response.aiter_bytes():
                events, end, held = (held + chunk).rpartition(b"\n\n")
                if end:
                    yield events + end
    except httpx.HTTPError as error:
        raise EngineFailure(f"The vLLM server broke off ({type(error).__name__}).") from None
    if held:
        raise EngineFailure("The vLLM server broke off amid an event.")
