"""A vLLM server as engine: requests go to it as they came, with the soft tokens beside the text.

In a chat only the soft tokens are sent, and vLLM renders its template around them: with the placement `suffix` as the
beginning of the answer, with `prefix` as a message of their own in front of the user's last one. The text in front of
the former is the same for all users, so vLLM's prefix cache serves them all. A completion has no place for them: the
whole prompt is sent embedded.

vLLM 0.30 can be brought down from outside by what it does not check, so this is checked here: soft tokens that are no
numbers spoil other requests' answers, and its placeholder's name in a completion, or `echo` beside embeds, end its
process.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from personaplug.engines.base import Question, Reply
from personaplug.errors import BadConfig, EngineFailure, RequestError
from personaplug.soft_prompt import SoftPrompt
from personaplug.wire import Kind

logger = logging.getLogger(__name__)

PLACEHOLDER = "<prompt_embeds>"
_ROUTES: dict[Kind, str] = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
_FATAL = ("echo", "prompt_logprobs")  # beside embeds they end vLLM's process
_PROBE = "The quick brown fox jumps over the lazy dog, and then"
_PROBE_TOKENS = 8
_CLOSE = 0.05  # log-probability of the first token, between text and embeds


class EmbeddingTable:
    """The served model's own embeddings and tokenizer, for prompts that have to be sent embedded.

    Args:
        rows: (V, D).
        tokenizer: of transformers.
    """

    def __init__(self, rows: Tensor, tokenizer: Any) -> None:
        self.rows, self.tokenizer = rows, tokenizer

    @classmethod
    def of_folder(cls, folder: Path) -> EmbeddingTable:
        """Read them from a model's folder; of its weights, the embeddings alone."""
        from transformers import AutoTokenizer

        from personaplug.weights import read_embeddings

        return cls(read_embeddings(folder), AutoTokenizer.from_pretrained(folder))

    def embedded(self, text: str) -> Tensor:
        """(n, D) of a text, with the special tokens that the tokenizer puts around it."""
        return self.rows[self.tokenizer(text)["input_ids"]]


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
    ) -> None:
        self.name, self.url = "vllm", url.rstrip("/").removesuffix("/v1")
        self.models: tuple[str, ...] = (model,) if model else ()
        self.table, self.width, self.placement = table, width, placement
        self._theirs = ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout_s, connect=5), limits=limits
        )

    async def start(self) -> None:
        """Learn the model's name, then make sure that embeds are taken, and mean what text means."""
        if self._theirs:
            return
        listed = await self._json("GET", "/v1/models")
        self._theirs = str(listed["data"][0]["id"])
        self.models = self.models or (self._theirs,)
        await self._check_width()
        await self._check_same()
        if self.placement == "suffix":
            await self._check_layout()

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
        body = self._passed_on(question)
        request = self._client.build_request(
            "POST", _ROUTES[question.kind], json=body, headers={"X-Request-Id": question.id}
        )
        try:
            response = await self._client.send(request, stream=True)
            if body.get("stream") and response.status_code == 200:
                return Reply(_events(response))
            async with aclosing(response):
                content = await response.aread()
        except httpx.HTTPError as error:
            raise EngineFailure(f"The vLLM server does not answer ({type(error).__name__}).") from None
        if response.status_code >= 500:
            raise EngineFailure(f"The vLLM server failed (status {response.status_code}).")
        return Reply(content, response.status_code)

    async def likelihoods(
        self, prompt: str, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """vLLM gives no likelihood of a text behind embeds."""
        raise RequestError(
            "vLLM cannot say how likely an answer is behind soft tokens: leave `answer` out, or use "
            "`personaplug explain`, which loads the model itself.",
            code="unsupported",
        )

    def _passed_on(self, question: Question) -> dict[str, Any]:
        """The request as vLLM gets it."""
        body = {**question.body, "model": self._theirs}
        if question.kind == "completion" and PLACEHOLDER in body["prompt"]:
            raise RequestError(f"A prompt may not hold {PLACEHOLDER}, which is reserved.", code="reserved_text")
        if question.choices and not _constrained(body):
            body = {"temperature": 0} | body | {"structured_outputs": {"choice": list(question.choices)}}
        if question.soft is None:
            return body
        if unsafe := [name for name in _FATAL if body.get(name) is not None]:
            raise RequestError(f"{', '.join(unsafe)} cannot be had with a persona.", code="unsupported")
        if question.kind == "completion":
            return _with_embeds(body, self._whole(body["prompt"], question.soft))
        return with_soft_tokens(body, question.soft)

    def _whole(self, prompt: str, soft: SoftPrompt) -> Tensor:
        text, own = self.table.embedded(prompt), soft.vectors[0].to(self.table.rows)
        return torch.cat([text, own] if soft.placement == "suffix" else [own, text])

    async def _check_width(self) -> None:
        # A single value as embeds: refused either way, and the words tell why.
        body = {"model": self._theirs, "prompt_embeds": encoded(torch.zeros(1, 1)), "max_tokens": 1}
        response = await self._post("/v1/completions", body)
        said = response.text
        if "--enable-prompt-embeds" in said:
            raise BadConfig(
                f"The vLLM server at {self.url} takes no soft tokens: start it with --enable-prompt-embeds."
            )
        if "hidden_size" in said and f"hidden_size {self.width}." not in said:
            raise BadConfig(
                f"The vLLM server at {self.url} runs {self._theirs}, whose embeddings have another width than the "
                f"plug's {self.width}: serve the model that the plug was trained for."
            )

    async def _check_same(self) -> None:
        """Compare a text with the same text embedded."""
        common = {"model": self._theirs, "max_tokens": _PROBE_TOKENS, "temperature": 0, "logprobs": 1}
        embeds = encoded(self.table.embedded(_PROBE))
        answers = []
        for given in ({"prompt": _PROBE}, {"prompt_embeds": embeds}):
            response = await self._post("/v1/completions", common | given)
            if response.status_code != 200:
                raise BadConfig(
                    f"The vLLM server at {self.url} refused a test request (status {response.status_code})."
                )
            choice = response.json()["choices"][0]
            answers.append((choice["text"], choice["logprobs"]["token_logprobs"][0]))
        (text, sure), (other, as_sure) = answers
        if text != other or abs(sure - as_sure) > _CLOSE:
            raise BadConfig(
                f"The vLLM server at {self.url} answers a text and the same text embedded differently: {self._theirs} "
                f"is another model than the plug's, or its prompt_embeds are broken. Serve the plug's model."
            )

    async def _check_layout(self) -> None:
        """Make sure that soft tokens stand where the answer would begin, as they did in training."""
        asked, name = [{"role": "user", "content": _PROBE}], self._theirs
        opened = {"model": name, "messages": asked, "add_generation_prompt": True}
        soft = SoftPrompt(torch.zeros(1, 1, self.width), placement="suffix")
        plain, behind = [
            (await self._post("/tokenize", body)).json().get("tokens", [])
            for body in (opened, with_soft_tokens({"model": name, "messages": asked}, soft))
        ]
        if behind[:-1] != plain:
            raise BadConfig(
                f"The chat template of {name} writes something else before an answer that has begun than before one "
                f"that is to begin: soft tokens would stand elsewhere than in training. Start vLLM with a "
                f"--chat-template that writes the same before both."
            )

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return await self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise EngineFailure(f"There is no vLLM server at {self.url} ({type(error).__name__}).") from None

    async def _json(self, method: str, path: str) -> dict[str, Any]:
        try:
            response = await self._client.request(method, path)
            response.raise_for_status()
            found: dict[str, Any] = response.json()
            return found
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise EngineFailure(f"There is no vLLM server at {self.url} ({type(error).__name__}).") from None


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


def _with_embeds(body: dict[str, Any], vectors: Tensor) -> dict[str, Any]:
    return {**{name: value for name, value in body.items() if name != "prompt"}, "prompt_embeds": encoded(vectors)}


def with_soft_tokens(body: dict[str, Any], soft: SoftPrompt) -> dict[str, Any]:
    """A chat with soft tokens: as the beginning of the answer, or right before the last user's text."""
    part = {"type": "prompt_embeds", "data": encoded(soft.vectors[0].to(torch.bfloat16))}
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


async def _events(response: httpx.Response) -> AsyncGenerator[bytes]:
    """vLLM's events as they come."""
    try:
        async with aclosing(response):
            async for chunk in response.aiter_bytes():
                yield chunk
    except httpx.HTTPError as error:
        raise EngineFailure(f"The vLLM server broke off ({type(error).__name__}).") from None
