"""Requests as vLLM gets them: OpenAI's, with soft tokens beside the text, and without what vLLM does not survive.

In a chat only the soft tokens are sent, and vLLM renders its template around them: with the placement `suffix` as the
beginning of the answer, with `prefix` in front of the user's last text. What stands in front of the former is the same
for all users, so vLLM's prefix cache serves them all. A completion has no place for them: the whole prompt is sent
embedded.

vLLM 0.30 can be brought down from outside by what it does not check, so this is checked here: soft tokens that are no
numbers spoil other requests' answers, so callers cannot send any of their own; and its placeholder's name, wherever it
gets into a prompt, or `echo` beside embeds, end its process.
"""

from __future__ import annotations

import base64
import io
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personaplug.errors import EngineFailure, RequestError
from personaplug.llm.label_bias import LabelBias
from personaplug.llm.prompt_tokenizer import frame_of
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines.base import CHARACTERS, EngineRequest
from personaplug.serving.openai_protocol import as_json

PLACEHOLDER = "<prompt_embeds>"
_EMBEDS = "prompt_embeds"  # a field of a completion, and a type of content in a chat
_MOST = 100.0  # that a bias may be
_ESCAPED = re.compile(rb"\\u00([2-7][0-9a-fA-F])")


class EmbeddingTable:
    """The served model's own embeddings and tokenizer, for prompts that have to be sent embedded.

    Args:
        rows: (V, D).
        tokenizer: of transformers.
    Raises:
        ConfigError: if the tokenizer does not leave a text in one piece.
    """

    def __init__(self, rows: Tensor, tokenizer: Any) -> None:
        self.rows, self.tokenizer = rows, tokenizer
        self._one_at_a_time = threading.Lock()  # a tokenizer of transformers may change itself when it is called
        self._before = len(frame_of(tokenizer)[0])

    @classmethod
    def of_folder(cls, folder: Path) -> EmbeddingTable:
        """Read them from a model's folder; of its weights, the embeddings alone."""
        from transformers import AutoTokenizer

        from personaplug.infra.model_hub import read_embeddings

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

    def logit_bias(self, choices: Sequence[str], label_bias: Tensor) -> dict[str, float]:
        """What a persona says of the labels, at the first tokens that tell them apart; vLLM cannot be told a place.

        Args:
            label_bias: (1, C) in the order of the choices.
        """
        with self._one_at_a_time:
            ids = self.tokenizer(list(choices), add_special_tokens=False)["input_ids"]
        tokens, bias = LabelBias(ids, label_bias).first_branch_bias()
        both = zip(tokens, bias[0].clamp(-_MOST, _MOST).tolist(), strict=True)
        return {str(token): value for token, value in both if value != 0}

    def _rows_of(self, ids: Sequence[int]) -> Tensor:
        return self.rows[torch.tensor(ids, dtype=torch.int64)]

    def _ids(self, text: str) -> list[int]:
        with self._one_at_a_time:
            return list(self.tokenizer(text)["input_ids"])


def written(question: EngineRequest, *, model: str, table: EmbeddingTable, most: int | None) -> bytes:
    """A question as a body for vLLM.

    Args:
        model: by what name vLLM knows it.
        table: that model's embeddings.
        most: tokens that it can read, if known.
    Raises:
        RequestError: if it holds what vLLM must not be sent, or is too long.
    """
    body = {**question.body, "model": model}
    _check_fields(body)
    if question.choices and not _constrained(body):
        body = {"temperature": 0} | body | {"structured_outputs": {"choice": list(question.choices)}}
        if question.soft is not None and question.soft.label_bias is not None and not body.get("logit_bias"):
            body |= {"logit_bias": table.logit_bias(question.choices, question.soft.label_bias)}
    as_they_came = as_json(body)
    _check_text(body, as_they_came)
    if question.soft is None:
        return as_they_came
    if question.kind == "chat":
        return as_json(with_soft_tokens(body, question.soft))
    embeds = table.embedded_with(body.pop("prompt"), question.soft, most=most)
    return as_json({**body, _EMBEDS: encoded(embeds)})


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


def _check_text(body: dict[str, Any], text: bytes) -> None:
    """Refuse the placeholder, wherever a template might write it into a prompt."""
    # Arguments of tools are JSON within a string, which vLLM reads again before its template writes them.
    plain = _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), text).replace(b"\\", b"")
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
