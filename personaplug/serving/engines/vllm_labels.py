"""Probabilities of labels from a vLLM server.

A request for each beginning of a label asks for one token and for the log-probabilities of the tokens that continue it
to a label (`logprob_token_ids`). A beginning is sent as embeddings behind the soft tokens. A label's score is the sum
along its tokens, as in the embedded engine, and the answer is the likeliest label.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from personaplug.errors import EngineFailure, RequestError
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines.base import EngineRequest
from personaplug.serving.engines.job import ClosedSet
from personaplug.serving.engines.vllm_requests import EmbeddingTable, add_soft_tokens, has_own_form
from personaplug.serving.openai_protocol import (
    DONE,
    ChatRequest,
    Choice,
    CompletionRequest,
    ReplyFormatter,
    event,
    json_object,
    to_json,
    token_usage,
)

_MAX_TOKENS = 128  # of one request; vLLM's limit of `logprob_token_ids`
_MAX_REQUESTS = 64
_MAX_TOP = 20  # labels in `top_logprobs`, as in OpenAI's API
_PROMPT_FIELDS = ("messages", "documents", "chat_template_kwargs")
_TOKEN_ID = re.compile(r"token_id:(\d+)")


@dataclass(frozen=True)
class LabelQuery:
    """One request to vLLM: the log-probabilities of tokens that may follow a beginning of a label."""

    beginning: Ids
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class LabelTree:
    """The tokens of a closed set of labels; no label begins another."""

    labels: tuple[str, ...]
    ids: tuple[Ids, ...]

    @classmethod
    def of(cls, labels: Sequence[str], table: EmbeddingTable) -> LabelTree:
        """Tokenize labels; RequestError if vLLM cannot score them."""
        tree = cls(tuple(labels), tuple(map(tuple, table.texts.encode_many(labels))))
        if any(first == second[: len(first)] for first, second in pairwise(sorted(tree.ids))):
            reason = "one label begins another"
        elif len(tree.queries) > _MAX_REQUESTS:
            reason = f"they need {len(tree.queries)} requests to vLLM, more than {_MAX_REQUESTS}"
        else:
            return tree
        raise _unsupported(f"Probabilities of these labels are not available from vLLM, because {reason}.")

    @cached_property
    def queries(self) -> list[LabelQuery]:
        branches: dict[Ids, dict[int, None]] = {}
        for ids in self.ids:
            for count, token in enumerate(ids):
                branches.setdefault(ids[:count], {})[token] = None
        return [
            LabelQuery(beginning, tuple(tokens)[start : start + _MAX_TOKENS])
            for beginning, tokens in branches.items()
            for start in range(0, len(tokens), _MAX_TOKENS)
        ]

    def scores(self, log_probs: Mapping[Ids, float]) -> list[float]:
        """Return the log-probability of each label, given that of the last token of each of its beginnings."""
        return [sum(log_probs[ids[:end]] for end in range(1, len(ids) + 1)) for ids in self.ids]


def wants_probabilities(body: ChatRequest | CompletionRequest, *, choices: Sequence[str]) -> bool:
    """True if a request asks for probabilities of labels; `choices` is its closed set, empty for free text."""
    fields = body.to_openai()
    asks_for_logprobs = bool(choices) and bool(fields.get("logprobs") or fields.get("logprob_token_ids"))
    return body.personaplug.probabilities or (asks_for_logprobs and not has_own_form(fields))


def check_label_request(body: ChatRequest | CompletionRequest, *, choices: Sequence[str], placement: str) -> None:
    """Refuse fields that probabilities of labels rule out."""
    fields = body.to_openai()
    if not choices or has_own_form(fields):
        raise _unsupported("Only labels have probabilities, but this prompt is answered with free text.")
    if body.kind != "chat":
        raise _unsupported("vLLM reports probabilities of labels in chats only. Send a chat.")
    if placement != "suffix":
        raise _unsupported("Probabilities of labels need soft tokens right before the answer (placement=suffix).")
    if fields.get("temperature"):
        raise _unsupported("The answer is the likeliest label if its probabilities are requested. Set temperature=0.")
    if (fields.get("n") or 1) > 1 or fields.get("logit_bias") or fields.get("logprob_token_ids"):
        raise _unsupported("n, logit_bias and logprob_token_ids have no effect on probabilities of labels.")
    if fields.get("continue_final_message") or fields.get("add_generation_prompt") is False:
        raise _unsupported("Labels follow the prompt. Remove continue_final_message and add_generation_prompt.")
    top = fields.get("top_logprobs") or 0
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= _MAX_TOP:
        raise RequestError(f"top_logprobs must be a number from 0 to {_MAX_TOP}.", code="invalid_value")


def build_query(request: EngineRequest, query: LabelQuery, *, model: str, table: EmbeddingTable, salt: str) -> bytes:
    """Build one request to vLLM; its reply has one token, which is not used."""
    fields = request.body.to_openai()
    body = {name: fields[name] for name in _PROMPT_FIELDS if fields.get(name) is not None}
    vectors = [table.rows[list(query.beginning)]] if query.beginning else []
    if request.soft is not None:
        vectors.insert(0, request.soft.vectors[0].to(table.rows))
    if vectors:
        body = add_soft_tokens(body, SoftPrompt(torch.cat(vectors)[None], placement="suffix"))
    else:
        options = {"enable_thinking": False} | (body.get("chat_template_kwargs") or {})  # as in training
        body = body | {"chat_template_kwargs": options}
    return to_json(
        body
        | {"model": model, "cache_salt": salt, "max_tokens": 1, "temperature": 1, "logprobs": True}
        | {"logprob_token_ids": list(query.tokens), "return_tokens_as_token_ids": True}
    )


def _read_query(reply: bytes, query: LabelQuery) -> dict[Ids, float]:
    """Return the log-probability of each token of a query, by the label's tokens up to it; EngineFailure if missing."""
    try:
        body: Any = json_object(reply)
        entries = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        by_token = {int(_TOKEN_ID.fullmatch(entry["token"])[1]): float(entry["logprob"]) for entry in entries}  # type: ignore[index]
        if not all(map(math.isfinite, by_token.values())):
            raise ValueError("a log-probability is not finite")
        return {(*query.beginning, token): by_token[token] for token in query.tokens}
    except (IndexError, KeyError, TypeError, ValueError):
        raise EngineFailure(
            "The vLLM server sent no log-probabilities of labels. It must be vLLM 0.30 or later."
        ) from None


class LabelReply:
    """The reply to a request for probabilities of labels.

    Args:
        replies: vLLM's replies to the queries of the tree.
    """

    def __init__(self, request: EngineRequest, tree: LabelTree, replies: Sequence[bytes]) -> None:
        soft, body, log_probs = request.soft, request.body, dict[Ids, float]()
        for query, reply in zip(tree.queries, replies, strict=True):
            log_probs |= _read_query(reply, query)
        scores = tree.scores(log_probs)
        if soft is not None and soft.label_bias is not None:
            scores = (torch.tensor(scores) + soft.label_bias[0].float().cpu()).tolist()
        fields = body.to_openai()
        top = (fields.get("top_logprobs") or 0) if fields.get("logprobs") else None
        closed_set = ClosedSet(tree.labels, top, with_distribution=body.personaplug.probabilities)
        best = max(range(len(scores)), key=scores.__getitem__)
        self.choice = Choice(tree.labels[best], "stop", closed_set.positions(tree.labels[best], scores))
        self.extra = closed_set.extra(scores)
        self.usage = token_usage(prompt=_prompt_tokens(replies[0]), completion=len(tree.ids[best]))
        options = fields.get("stream_options") or {}
        self.includes_usage = bool(isinstance(options, dict) and options.get("include_usage"))

    def whole(self, formatter: ReplyFormatter) -> bytes:
        return to_json(formatter.whole([self.choice], usage=self.usage) | self.extra)

    async def events(self, formatter: ReplyFormatter) -> AsyncGenerator[bytes]:
        """Yield the label as OpenAI's events."""
        yield event(formatter.chunk({"role": "assistant", "content": ""}))
        chunk = formatter.chunk({"content": self.choice.text}, logprobs=self.choice.logprobs)
        yield event(chunk | self.extra)
        yield event(formatter.chunk({}, reason=self.choice.finish_reason))
        if self.includes_usage:
            yield event(formatter.usage_chunk(self.usage))
        yield DONE


def _prompt_tokens(reply: bytes) -> int:
    usage = (json_object(reply) or {}).get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else 0


def _unsupported(message: str) -> RequestError:
    return RequestError(message, code="unsupported")
