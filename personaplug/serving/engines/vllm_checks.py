"""Checks of a vLLM server at start: soft tokens have the same effect as in training, and users' answers stay apart."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from personaplug.errors import ConfigError, EngineFailure
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines.vllm_requests import EMBEDS, EmbeddingTable, add_soft_tokens, encode_embeds

logger = logging.getLogger(__name__)

Fetch = Callable[..., Awaitable[tuple[int, str]]]
"""Requests a path of the server, optionally with a JSON body; returns status and text."""

_PROBE = "The quick brown fox jumps over the lazy dog, and then"
_PROBE_TOKENS = 8
_MAX_DIFFERENCE = 0.05  # of a token's log-probability between two computations of one prompt

# Two users whose personas are embeddings of different texts, followed by the same prompt. The prompt fills whole cache
# blocks: it has 384 tokens, and a block has 16 to 256.
_SECRETS = ("The password is tiger. " * 8, "The password is seven. " * 8)
_FILLER, _QUESTION = "The weather was fine, and the children played in the garden all day. ", "The password is"
_FILLER_TOKENS = 384
_TEMPLATE_TOKENS = 96  # upper bound, including the question and the answer
_SAME = 2e-3  # if log-probabilities differ by less, two users got the same answer
_CHANGED = 0.25  # if they differ by more than rounding of a warm cache, a user got another user's answer


@dataclass(frozen=True)
class Signature:
    """The tokens of a server's answer, with their log-probabilities."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    def is_same(self, other: Signature) -> bool:
        """True if the tokens and their probabilities are the same."""
        pairs = zip(self.logprobs, other.logprobs, strict=False)
        return self.tokens == other.tokens and all(abs(a - b) <= _SAME for a, b in pairs)

    def has_changed(self, later: Signature) -> bool:
        """True if the first token's probability differs by more than rounding."""
        return abs(self.logprobs[0] - later.logprobs[0]) > _CHANGED


@dataclass(frozen=True)
class ServerFacts:
    """The results of the checks.

    Attributes:
        max_model_len: maximum tokens of a prompt and its answer.
        salts_personas: True if each persona needs its own cache salt to keep answers apart.
    """

    name: str
    max_model_len: int | None
    salts_personas: bool


class StartChecks:
    def __init__(
        self,
        fetch: Fetch,
        url: str,
        *,
        table: EmbeddingTable,
        width: int,
        placement: str,
        chat_date: str | None,
    ) -> None:
        self._fetch, self.url, self.table = fetch, url, table
        self.width, self.placement, self.chat_date = width, placement, chat_date

    async def run(self) -> ServerFacts:
        """Run all checks; ConfigError if the server is not suitable, EngineFailure if its replies are not valid."""
        name, max_model_len = await self._find_model()
        await self._check_width(name)
        await self._check_embeddings(name)
        if self.chat_date is not None:
            await self._check_date(name)
        await self._check_template(name)
        return ServerFacts(name, max_model_len, await self._needs_salts(name, max_model_len))

    async def _find_model(self) -> tuple[str, int | None]:
        """Return the name of vLLM's model and its maximum number of tokens."""
        status, text = await self._fetch("/v1/models")
        if status in (401, 403):
            raise self._unfit(f"requires another key (status {status}). Set --engine-key.")
        with self._parsing("/v1/models"):
            model = json.loads(text)["data"][0]
            name, max_model_len = str(model["id"]), model.get("max_model_len")
        return name, max_model_len if isinstance(max_model_len, int) else None

    async def _check_width(self, name: str) -> None:
        # vLLM always refuses embeds of one value, and its message has the reason.
        body = {"model": name, EMBEDS: encode_embeds(torch.zeros(1, 1)), "max_tokens": 1}
        _, message = await self._fetch("/v1/completions", body)
        if "--enable-prompt-embeds" in message:
            raise self._unfit("does not accept soft tokens. Start it with --enable-prompt-embeds.")
        if "hidden_size" in message and f"hidden_size {self.width}." not in message:
            raise self._unfit(
                f"runs {name}, whose embeddings do not have the plug's width {self.width}. Serve the model that the "
                f"plug was trained for."
            )

    async def _check_embeddings(self, name: str) -> None:
        """Check that a text and its embeddings get the same answer."""
        text, log_prob = await self._probe(name, {"prompt": _PROBE})
        embeds = {EMBEDS: encode_embeds(self.table.embed(_PROBE))}
        embeds_text, embeds_log_prob = await self._probe(name, embeds)
        if text != embeds_text or not abs(log_prob - embeds_log_prob) <= _MAX_DIFFERENCE:
            raise self._unfit(
                f"gives different answers to a text and to the embeddings of the text. {name} is not the plug's model, "
                f"or its prompt_embeds are broken. Serve the plug's model."
            )

    async def _probe(self, name: str, prompt: dict[str, str]) -> tuple[str, float]:
        """Return vLLM's answer to a prompt, and its first token's log-probability."""
        body = {"model": name, "max_tokens": _PROBE_TOKENS, "temperature": 0, "logprobs": 1, **prompt}
        with self._parsing("/v1/completions"):
            choice = (await self._answer("/v1/completions", body))["choices"][0]
            return choice["text"], float(choice["logprobs"]["token_logprobs"][0])

    async def _check_template(self, name: str) -> None:
        """Check that vLLM renders a chat as in training, with the soft tokens in the same place."""
        body = {"model": name, "messages": [{"role": "user", "content": _PROBE}]}
        unanswered = body | {"add_generation_prompt": True, "chat_template_kwargs": {"enable_thinking": False}}
        expected = self.table.chat_ids(_PROBE, day=self.chat_date) or await self._tokenize(unanswered)
        if self.placement == "suffix":
            soft = SoftPrompt(torch.zeros(1, 1, self.width), placement="suffix")
            ids = (await self._tokenize(add_soft_tokens(body, soft)))[:-1]
        else:
            ids = await self._tokenize(unanswered)
        if ids != expected:
            raise ConfigError(
                f"vLLM renders a chat for {name} differently from training, so soft tokens would follow other tokens. "
                f"Start vLLM with the model's own --chat-template. It must write the same tokens before a started "
                f"answer as before a new one."
            )

    async def _check_date(self, name: str) -> None:
        """Check that the template does not write today's date: if it does, it fails without the date function."""
        options = {"enable_thinking": False, "strftime_now": ""}
        body = {"model": name, "messages": [{"role": "user", "content": _PROBE}], "chat_template_kwargs": options}
        if (await self._fetch("/tokenize", body))[0] != 200:
            raise self._unfit(
                f"writes today's date into the chats of {name}, but training used {self.chat_date}. Copy the model's "
                f"template, replace each strftime_now(…) with that date, and pass the copy as --chat-template."
            )

    async def _tokenize(self, body: dict[str, Any]) -> list[int]:
        status, text = await self._fetch("/tokenize", body)
        problem, tokens = f"status {status}", None
        if status == 200:
            with self._parsing("/tokenize"):
                problem, tokens = "no tokens", json.loads(text).get("tokens")
        if not tokens or not isinstance(tokens, list):
            raise self._unfit(
                f"must tokenize chats on /tokenize, to check the place of soft tokens; found {problem}. Allow this "
                f"server to access that route."
            )
        return tokens

    async def _needs_salts(self, name: str, max_model_len: int | None) -> bool:
        """Check that a warm prefix cache does not mix the answers of two users with the same prompt.

        Return True if this requires a cache salt for each persona; ConfigError if answers mix even with salts.
        """
        filler = self._filler(max_model_len)
        if not await self._mixes(name, filler, with_salts=False):
            return False
        if await self._mixes(name, filler, with_salts=True):
            raise self._unfit(
                "answers a user with another user's soft tokens, because the keys of its prefix cache ignore embeds. "
                "Start vLLM without external KV connectors (--kv-transfer-config, LMCache). If answers still mix, use "
                "--no-enable-prefix-caching."
            )
        logger.warning(
            "The keys of vLLM's prefix cache ignore soft tokens. Each persona gets its own cache salt, so users do not "
            "share cached prompts. To share them, start vLLM without external KV connectors."
        )
        return True

    async def _mixes(self, name: str, filler: str, *, with_salts: bool) -> bool:
        run = secrets.token_hex(8)  # a new salt, so that the cache has no prompts of earlier checks
        for signature_of in (self._completion_signature, self._chat_signature):
            answers: list[list[Signature]] = []
            for _ in range(2):
                salts = [f"{run}{user if with_salts else ''}" for user in range(len(_SECRETS))]
                answers.append(
                    [await signature_of(name, text, filler, salt) for text, salt in zip(_SECRETS, salts, strict=True)]
                )
            if _is_mixed(answers):
                return True
        return False

    async def _completion_signature(self, name: str, secret: str, filler: str, salt: str) -> Signature:
        embeds = torch.cat([self.table.embed(secret), self.table.embed(filler + _QUESTION)])
        body = _probe_body(name, salt) | {EMBEDS: encode_embeds(embeds), "logprobs": 1}
        with self._parsing("/v1/completions"):
            logprobs = (await self._answer("/v1/completions", body))["choices"][0]["logprobs"]
            return Signature(tuple(logprobs["tokens"]), tuple(map(float, logprobs["token_logprobs"])))

    async def _chat_signature(self, name: str, secret: str, filler: str, salt: str) -> Signature:
        part = {"type": EMBEDS, "data": encode_embeds(self.table.embed(secret).to(torch.bfloat16))}
        content = [part, {"type": "text", "text": filler + _QUESTION}]
        body = _probe_body(name, salt) | {"messages": [{"role": "user", "content": content}], "logprobs": True}
        with self._parsing("/v1/chat/completions"):
            tokens = (await self._answer("/v1/chat/completions", body))["choices"][0]["logprobs"]["content"]
            return Signature(tuple(t["token"] for t in tokens), tuple(float(t["logprob"]) for t in tokens))

    def _filler(self, max_model_len: int | None) -> str:
        """Return a text of several cache blocks, shorter if the model's maximum length requires it."""
        room = (max_model_len or 4 * _FILLER_TOKENS) - len(self.table.embed(_SECRETS[0])) - _TEMPLATE_TOKENS
        return _FILLER * max(1, min(_FILLER_TOKENS, room) // len(self.table.embed(_FILLER)))

    async def _answer(self, path: str, body: dict[str, Any]) -> Any:
        status, reply = await self._fetch(path, body)
        if status != 200:
            raise self._unfit(f"refused a test request to {path} (status {status}).")
        return json.loads(reply)

    def _unfit(self, reason: str) -> ConfigError:
        return ConfigError(f"The vLLM server at {self.url} {reason}")

    @contextmanager
    def _parsing(self, path: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise EngineFailure(
                f"The reply of {self.url}{path} is not vLLM's. Check that this is a vLLM server."
            ) from None


def _probe_body(name: str, salt: str) -> dict[str, Any]:
    return {
        "model": name,
        "max_tokens": _PROBE_TOKENS,
        "temperature": 0,
        "ignore_eos": True,  # so that there are tokens to compare
        "cache_salt": salt,
    }


def _is_mixed(rounds: Sequence[Sequence[Signature]]) -> bool:
    """True if two users got the same answer, or if a user's answer changed once the cache was warm."""
    cold, warm = rounds
    return any(one.is_same(other) for one, other in rounds) or any(map(Signature.has_changed, cold, warm))
