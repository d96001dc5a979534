"""What answers a request once it has its persona: a frozen language model behind OpenAI's forms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from personaplug.llm.ngram_cache import UserNgramCache
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.openai_protocol import Kind

CHARACTERS = 16
"""A token has at most so many on average: a prompt of more is too long, which is seen before it is tokenized."""


@dataclass(frozen=True, repr=False)
class EngineRequest:
    """A request as an engine gets it.

    Attributes:
        kind: chat or completion.
        body: the request's fields, personaplug's own left out.
        soft: (1, S, D), or None.
        choices: the closed set that the answer must be from; empty = it is written freely.
        id: of the request.
        phrases: of the user's own answers, to be mixed in where this one is written freely; None = nothing is.
    """

    kind: Kind
    body: dict[str, Any]
    soft: SoftPrompt | None
    choices: Sequence[str] = ()
    id: str = ""
    phrases: UserNgramCache | None = None


class Events(AsyncIterator[bytes]):
    """An answer event by event; to be closed, whether or not it was read."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of what makes it."""


@dataclass(frozen=True, repr=False)
class EngineReply:
    """An answer as it goes out.

    Attributes:
        body: whole, or event by event.
        status: of HTTP.
    """

    body: bytes | Events
    status: int = 200


class Engine(Protocol):
    """A language model that takes requests from many users at once.

    Attributes:
        name: for people and metrics.
        models: by what names requests may call it.
    """

    name: str
    models: tuple[str, ...]

    async def start(self) -> None:
        """Get ready, and make sure that soft tokens do what they should; once, however often it is asked.

        Raises:
            ConfigError: if the engine is not set up for them.
            EngineFailure: if it is not there.
        """
        ...

    async def ready(self) -> bool:
        """Whether it would answer now."""
        ...

    async def answer(self, question: EngineRequest) -> EngineReply:
        """Answer one request.

        Raises:
            RequestError: if it asks for what this engine does not do.
            EngineFailure: if the model does not answer.
        """
        ...

    async def likelihoods(
        self, prompt: str, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """Return log p of an answer to a prompt under each of some soft prompts, which are all of one shape.

        Args:
            choices: the closed set that the answer is from, if it is.
        Raises:
            RequestError: if this engine cannot say.
        """
        ...

    async def close(self) -> None:
        """Finish what was begun, then let go of the model."""
        ...
