"""The interface of an engine: a frozen language model that answers requests which have their persona."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from personaplug.config import ModelConfig
from personaplug.data.records import Prompt, characters
from personaplug.errors import RequestError
from personaplug.infra.model_hub import LLMIdentity
from personaplug.llm.ngram_cache import UserNgramCache
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import PersonaPlug
from personaplug.serving.config import ServingConfig
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest


@dataclass(frozen=True, repr=False)
class EngineRequest:
    """A request as an engine gets it."""

    body: ChatRequest | CompletionRequest
    soft: SoftPrompt | None  # (1, S, D)
    choices: Sequence[str] = ()  # the closed set of answers; empty = free text
    id: str = ""
    phrases: UserNgramCache | None = None  # the user's own phrases, mixed into free text
    tenant: str = ""
    prepared: object = None  # what `Engine.prepare` returned


class EventStream(AsyncIterator[bytes]):
    """A reply event by event. It has to be closed, even if nobody reads it.

    A generator alone would not do: one that never started runs no `finally`.
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
    """A reply as it goes out: JSON, or event by event."""

    body: bytes | EventStream
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Engine(ABC):
    """A language model that takes requests from many users at once.

    Attributes:
        models: the names by which requests may call it.
        is_remote: whether the model runs in another process.
    """

    models: tuple[str, ...]
    is_remote = False

    async def start(self) -> None:  # noqa: B027  # optional
        """Start, and check that soft tokens work as in training; further calls do nothing."""

    async def is_ready(self) -> bool:
        return True

    def check_length(self, characters: int) -> None:  # noqa: B027  # optional
        """Refuse a text of so many characters if it has too many tokens whatever they are."""

    async def prepare(self, body: ChatRequest | CompletionRequest, *, choices: Sequence[str] = ()) -> object:
        """Check a request before its persona is made, and return what is known of it then.

        RequestError if the engine does not support it or its prompt is too long.
        """
        return None

    async def check_texts(self, prompt: Prompt, answer: str, *, choices: Sequence[str]) -> None:
        """Check the texts of an explanation before anything else reads them; RequestError if they are too long."""
        self.check_length(characters(prompt) + len(answer))

    @abstractmethod
    async def respond(self, request: EngineRequest) -> EngineReply:
        """Answer one request; RequestError if the engine does not support it, EngineFailure if the model fails."""

    async def log_likelihoods(
        self, prompt: Prompt, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """Return log p of an answer under each soft prompt, all of one shape; RequestError if it cannot be measured."""
        raise RequestError(
            "This engine cannot say how likely an answer is behind soft tokens: leave `answer` out, or use "
            "`personaplug explain`, which loads the model itself.",
            code="unsupported",
        )

    def build_phrases(self, answers: Sequence[str]) -> UserNgramCache:
        """Build the phrases of a user's past answers, for an engine that mixes them in."""
        raise NotImplementedError

    async def close(self) -> None:  # noqa: B027  # optional
        """Finish the running requests, then free the model."""


LoadPlug = Callable[[LLMIdentity | None], PersonaPlug]
"""Loads the plug and checks that it fits a language model; None = the model runs elsewhere, and the engine checks."""

EngineOpener = Callable[[ModelConfig, ServingConfig, LoadPlug], tuple[Engine, PersonaPlug]]
"""Opens an engine, and loads the plug with the device and the number format that the engine needs."""


def longest_token(tokenizer: Any) -> int:
    """Characters of a tokenizer's longest token, so a text has at least its length divided by this many tokens."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def too_long(max_tokens: int) -> RequestError:
    return RequestError(
        f"Prompt, persona and answer may have {max_tokens} tokens together in this model; these have more. Shorten "
        f"the prompt.",
        code="context_length_exceeded",
    )
