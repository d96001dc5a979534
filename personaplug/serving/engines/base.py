"""Engine interface: a frozen language model that answers requests with a given persona."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from personaplug.config import ModelConfig
from personaplug.data.records import Prompt, characters
from personaplug.errors import RequestError
from personaplug.infra.model_hub import LLMIdentity
from personaplug.llm.copy_head import Copying
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import PersonaPlug
from personaplug.run import Run
from personaplug.serving.config import ServingConfig
from personaplug.serving.copied_answers import AnswerReader
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest


@dataclass(frozen=True, repr=False)
class EngineRequest:
    """The input of `Engine.respond`."""

    body: ChatRequest | CompletionRequest
    soft: SoftPrompt | None  # (1, S, D)
    choices: Sequence[str] = ()  # the closed set of answers; empty = free text
    id: str = ""
    copying: Copying | None = None  # a copy head and the user's past answers, one row; for free text
    tenant: str = ""
    prepared: object = None  # what `Engine.prepare` returned
    model: str = ""  # the name that the reply of an engine in this process reports; empty = the engine's own


class EventStream(AsyncIterator[bytes]):
    """A streamed reply. It must be closed, even if nobody reads it.

    A plain generator is not enough, because one that never started does not run its `finally`.
    """

    def __init__(self, events: AsyncGenerator[bytes], *, on_close: Callable[[], None]) -> None:
        self._events, self._on_close = events, on_close

    async def __anext__(self) -> bytes:
        return await anext(self._events)

    async def aclose(self) -> None:
        self._on_close()
        await self._events.aclose()


@dataclass(frozen=True, repr=False)
class EngineReply:
    """A reply to send: JSON, or a stream of events."""

    body: bytes | EventStream
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Engine(ABC):
    """A language model that answers concurrent requests of many users.

    Attributes:
        models: the names that requests may use for it.
        is_remote: True if the model runs in another process.
    """

    models: tuple[str, ...]
    is_remote = False

    async def start(self) -> None:  # noqa: B027  # optional
        """Start the engine, and check that soft tokens work as in training. Further calls do nothing."""

    async def is_ready(self) -> bool:
        return True

    def check_length(self, characters: int) -> None:  # noqa: B027  # optional
        """Refuse a number of characters that exceeds the model's maximum number of tokens for any text."""

    async def prepare(self, body: ChatRequest | CompletionRequest, *, choices: Sequence[str] = ()) -> object:
        """Check a request before its persona is computed; return the value for `EngineRequest.prepared`.

        RequestError if the engine does not support the request, or if its prompt is too long.
        """
        return None

    async def check_texts(self, prompt: Prompt, answer: str, *, choices: Sequence[str]) -> None:
        """Check the texts of an explanation before they are used; RequestError if they are too long."""
        self.check_length(characters(prompt) + len(answer))

    @abstractmethod
    async def respond(self, request: EngineRequest) -> EngineReply:
        """Answer a request; RequestError if the engine does not support it, EngineFailure if the model fails."""

    async def log_likelihoods(
        self, prompt: Prompt, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """Return log p of an answer for each soft prompt, all of one shape; RequestError if this is not supported."""
        raise RequestError(
            "This engine cannot compute the likelihood of an answer with soft tokens. Remove `answer`, or use "
            "`personaplug explain`, which loads the model.",
            code="unsupported",
        )

    def load_copy_head(self, run: Run, *, seed: int) -> AnswerReader:
        """Load the copy head of a run, if the engine supports one."""
        raise NotImplementedError

    async def close(self) -> None:  # noqa: B027  # optional
        """Finish the running requests, then free the model."""


LoadPlug = Callable[[LLMIdentity | None], PersonaPlug]
"""Loads the plug and checks that it fits a language model; None = a remote model, which the engine checks."""

EngineOpener = Callable[[ModelConfig, ServingConfig, LoadPlug], tuple[Engine, PersonaPlug]]
"""Opens an engine, and loads the plug with the device and the data type that the engine needs."""


def longest_token(tokenizer: Any) -> int:
    """Return the characters of a tokenizer's longest token. It bounds the number of tokens of a text from below."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def too_long(max_tokens: int) -> RequestError:
    return RequestError(
        f"Prompt, persona and answer together exceed the model's {max_tokens} tokens. Shorten the prompt.",
        code="context_length_exceeded",
    )
