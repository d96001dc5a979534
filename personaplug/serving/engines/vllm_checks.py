"""Checks of a vLLM server at the start: that soft tokens mean there what they mean in training, and stay apart."""

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
"""Calls a path of the server, with a JSON body if one is given; returns status and text."""

_PROBE = "The quick brown fox jumps over the lazy dog, and then"
_PROBE_TOKENS = 8
_MAX_DIFFERENCE = 0.05  # of a token's log-probability between two computations of the same

# Two users whose persona is the embedding of a text, with the same text behind it. The text fills whole blocks of the
# cache: 384 tokens are more than a block, which has 16 to 256.
_SECRETS = ("The password is tiger. " * 8, "The password is seven. " * 8)
_FILLER, _QUESTION = "The weather was fine, and the children played in the garden all day. ", "The password is"
_FILLER_TOKENS = 384
_TEMPLATE_TOKENS = 96  # at most, and those of the question and the answer
_SAME = 2e-3  # log-probabilities that differ by less are those of one user
_CHANGED = 0.25  # by more, those of another user: a warm cache rounds otherwise than a cold one


@dataclass(frozen=True)
class Signature:
    """How a server answers a prompt: the tokens that it writes, with their log-probabilities."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    def is_same(self, other: Signature) -> bool:
        """True if the same tokens are written, with the same probabilities."""
        pairs = zip(self.logprobs, other.logprobs, strict=False)
        return self.tokens == other.tokens and all(abs(a - b) <= _SAME for a, b in pairs)

    def has_changed(self, later: Signature) -> bool:
        """True if the first token's probability is another one, by more than rounding."""
        return abs(self.logprobs[0] - later.logprobs[0]) > _CHANGED


@dataclass(frozen=True)
class ServerFacts:
    """What the checks found out.

    Attributes:
        max_model_len: tokens of a prompt and its answer.
        salts_personas: whether answers stay apart only if each persona has a cache salt of its own.
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
        """Check everything; ConfigError if the server cannot be used, EngineFailure if it talks nonsense."""
        name, max_model_len = await self._find_model()
        await self._check_width(name)
        await self._check_embeddings(name)
        if self.chat_date is not None:
            await self._check_date(name)
        await self._check_template(name)
        return ServerFacts(name, max_model_len, await self._needs_salts(name, max_model_len))

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
        body = {"model": name, EMBEDS: encode_embeds(torch.zeros(1, 1)), "max_tokens": 1}
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
        embeds = {EMBEDS: encode_embeds(self.table.embed(_PROBE))}
        embeds_text, embeds_log_prob = await self._probe(name, embeds)
        if text != embeds_text or not abs(log_prob - embeds_log_prob) <= _MAX_DIFFERENCE:
            raise self._unfit(
                f"answers a text and the same text embedded differently: {name} is another model than the plug's, or "
                f"its prompt_embeds are broken. Serve the plug's model."
            )

    async def _probe(self, name: str, prompt: dict[str, str]) -> tuple[str, float]:
        """Return vLLM's answer to a prompt, and its first token's log-probability."""
        body = {"model": name, "max_tokens": _PROBE_TOKENS, "temperature": 0, "logprobs": 1, **prompt}
        with self._parsing("/v1/completions"):
            choice = (await self._answer("/v1/completions", body))["choices"][0]
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

    async def _needs_salts(self, name: str, max_model_len: int | None) -> bool:
        """Check that two users with the same prompt get their own answers from a warm prefix cache.

        Return whether that takes a cache salt for each persona; ConfigError if their answers mix with salts, too.
        """
        filler = self._filler(max_model_len)
        if not await self._mixes(name, filler, with_salts=False):
            return False
        if await self._mixes(name, filler, with_salts=True):
            raise self._unfit(
                "gives a user the answer to another user's soft tokens: its cache of prompts leaves embeds out of its "
                "keys. Start vLLM without external KV connectors (--kv-transfer-config, LMCache); if answers still "
                "mix, with --no-enable-prefix-caching."
            )
        logger.warning(
            "vLLM's cache of prompts leaves soft tokens out of its keys. Each persona gets a cache salt of its own, "
            "so users share no cached prompts. To share them, start vLLM without external KV connectors."
        )
        return True

    async def _mixes(self, name: str, filler: str, *, with_salts: bool) -> bool:
        run = secrets.token_hex(8)  # no earlier check's prompts are in the cache under this salt
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
        """A text of several blocks of the cache, as far as the model reads that many tokens."""
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
            raise EngineFailure(f"What {self.url} says on {path} is not what vLLM says: is it a vLLM server?") from None


def _probe_body(name: str, salt: str) -> dict[str, Any]:
    return {
        "model": name,
        "max_tokens": _PROBE_TOKENS,
        "temperature": 0,
        "ignore_eos": True,  # so that there are tokens to compare
        "cache_salt": salt,
    }


def _is_mixed(rounds: Sequence[Sequence[Signature]]) -> bool:
    """True if two users got one answer, or if a user's own answer changed once the cache was warm."""
    cold, warm = rounds
    return any(one.is_same(other) for one, other in rounds) or any(map(Signature.has_changed, cold, warm))
