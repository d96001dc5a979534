"""A server of conversations with the toy model, on a real socket, that records the requests of its engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import httpx
import torch
from live_server import CONFIG, open_service, served

from personaplug.data.task_registry import CHAT
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.api_keys import ApiKeys
from personaplug.serving.engines.base import EngineReply, EngineRequest
from personaplug.serving.engines.in_process import InProcessEngine
from personaplug.serving.service import Service

T = TypeVar("T")

MODEL = "mine"
USERS = {"ann": "tea!!! yay", "bob": "A drink, Sir."}
QUESTIONS = ("What is tea?", "And coffee?")


class RecordingEngine(InProcessEngine):
    """The embedded engine; it records its requests."""

    def __init__(self, llm: CausalLM) -> None:
        super().__init__(llm, name=MODEL, max_new_tokens=12)
        self.requests: list[EngineRequest] = []

    async def respond(self, request: EngineRequest) -> EngineReply:
        self.requests.append(request)
        return await super().respond(request)


@dataclass
class RecordingServer:
    url: str
    service: Service
    engine: RecordingEngine
    headers: dict[str, str]

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers=self.headers, timeout=60).raise_for_status()

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self.headers, timeout=60).raise_for_status()

    def answer(self, user: str, *texts: str) -> str:
        """Return the most likely answer to a user's conversation, over plain HTTP."""
        roles = ("user", "assistant")
        turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
        reply = self.post("/v1/chat/completions", {"messages": turns, "user": user, "temperature": 0})
        text: str = reply.json()["choices"][0]["message"]["content"]
        return text

    def persona(self, user: str | None, question: str, *, tenant: str = "default") -> torch.Tensor:
        """Return the soft tokens for a user's question; without a user, the tokens for new users."""
        history = self.service.store.load_history(tenant, user or "nobody")
        return self.service.personas.personalizer.persona(question, history).vectors

    def asked(self, work: Callable[[], T]) -> tuple[T, list[EngineRequest]]:
        """Run `work`; return its result and the requests that the engine received meanwhile."""
        start = len(self.engine.requests)
        return work(), self.engine.requests[start:]


def assert_persona(request: EngineRequest, persona: torch.Tensor) -> None:
    assert request.soft is not None
    torch.testing.assert_close(request.soft.vectors, persona)


@contextmanager
def recording(
    toy: CausalLM,
    folder: Path,
    *,
    api_keys: ApiKeys | None = None,
    key: str = "none",
    users: Sequence[str] = tuple(USERS),
) -> Iterator[RecordingServer]:
    """Serve conversations to users with different histories."""
    engine = RecordingEngine(toy)
    config = replace(CONFIG, answer_channel="style", label_prior="none")
    service = open_service(toy, folder, task=CHAT, config=config, engine=engine)
    with served(service, api_keys=api_keys) as url:
        server = RecordingServer(url, service, engine, {"Authorization": f"Bearer {key}"})
        for user in users:
            server.post(f"/v1/users/{user}/history", {"question": "Hi?", "answer": USERS[user]})
        yield server
