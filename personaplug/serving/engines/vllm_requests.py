"""Build requests to vLLM from OpenAI requests and soft tokens, and refuse fields that would crash vLLM.

In a chat, only the soft tokens are sent as embeddings, and vLLM renders its template around them. With the placement
`suffix` they begin the answer; with `prefix` they precede the user's last text. The prompt before a suffix is the
same for all users, so vLLM's prefix cache serves all users. A completion has no field for soft tokens, so the whole
prompt is sent as embeddings.

Fields that are not in `_PASSED` are refused, because vLLM silently ignores unknown names.

vLLM 0.30 lacks these checks. Soft tokens that are not finite corrupt the answers of other requests, so callers cannot
send their own. The placeholder in a prompt, or `echo` with embeds, ends vLLM's process.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import sys
import threading
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personaplug.errors import EngineFailure, RequestError
from personaplug.infra.model_hub import read_embeddings
from personaplug.llm.label_bias import LabelBias
from personaplug.llm.prompt_tokenizer import PromptTokenizer, frame_of
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.text_tokenizer import TextTokenizer, load_tokenizer, special_ids
from personaplug.serving.engines.base import EngineRequest, longest_token, too_long
from personaplug.serving.engines.sampling import NEUTRAL, shown_field
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest, json_leaves, to_json

PLACEHOLDER = "<prompt_embeds>"
EMBEDS = "prompt_embeds"  # a field of a completion, and a type of content in a chat
_MAX_BIAS = 100.0
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
_OF_FREE_TEXT = frozenset((
    "max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "bad_words",
    "include_stop_str_in_output", "allowed_token_ids", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "length_penalty", "thinking_token_budget",
))  # fmt: skip
"""Fields that would truncate or change a label. They are ignored if the answer is from a closed set."""

_PASSED = _OF_FREE_TEXT | {
    "model", "messages", "prompt", "stream", "stream_options", "n", "seed", "temperature", "top_p", "top_k", "min_p",
    "logit_bias", "logprobs", "top_logprobs", "logprob_token_ids", "return_tokens_as_token_ids", "skip_special_tokens",
    "spaces_between_special_tokens", "response_format", "structured_outputs", "tools", "tool_choice",
    "parallel_tool_calls", "reasoning_effort", "include_reasoning", "documents", "chat_template_kwargs",
    "add_generation_prompt", "add_special_tokens", "continue_final_message",
}  # fmt: skip
_MESSAGE_FIELDS = frozenset((
    "role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "annotations", "reasoning",
    "reasoning_content",
))  # fmt: skip


class EmbeddingTable:
    """The served model's embeddings, (V, D), and tokenizer, for prompts that are sent as embeddings."""

    def __init__(self, rows: Tensor, tokenizer: Any) -> None:
        self.rows, self.tokenizer, self.texts = rows, tokenizer, TextTokenizer.of(tokenizer)
        self._lock = threading.Lock()  # tokenizers of transformers are not thread-safe
        self._head, self._tail = frame_of(tokenizer)
        self._special = special_ids(tokenizer)
        self.longest_token = longest_token(tokenizer)

    @classmethod
    def of_folder(cls, folder: Path) -> EmbeddingTable:
        """Load only the embeddings and the tokenizer from a model's folder."""
        return cls(read_embeddings(folder), load_tokenizer(folder, name=str(folder)))

    def embed(self, text: str) -> Tensor:
        """Return the embeddings, (n, D), of a text with the tokenizer's special tokens."""
        return self._rows_of(self.ids(text))

    def embed_with(self, text: str, soft: SoftPrompt, *, max_tokens: int | None) -> Tensor:
        """Return the embeddings, (n, D), of a text with soft tokens after it, or between the BOS token and the text.

        RequestError if the prompt has more than `max_tokens`, before it takes memory.
        """
        vectors = soft.vectors[0].to(self.rows)
        ids = self.ids(text)
        if max_tokens is not None and len(ids) + len(vectors) > max_tokens:
            raise too_long(max_tokens)
        position = len(ids) if soft.placement == "suffix" else len(self._head)
        return torch.cat([self._rows_of(ids[:position]), vectors, self._rows_of(ids[position:])])

    def logit_bias(self, choices: Sequence[str], label_bias: Tensor) -> dict[str, float]:
        """Convert a persona's label bias, (1, C), to a bias of the first tokens that distinguish the labels."""
        tokens, bias = LabelBias(self.texts.encode_many(choices), label_bias).first_branch_bias()
        values = bias[0].clamp(-_MAX_BIAS, _MAX_BIAS).tolist()
        return {str(token): value for token, value in zip(tokens, values, strict=True) if value}

    def _rows_of(self, ids: Sequence[int]) -> Tensor:
        return self.rows[torch.tensor(ids, dtype=torch.int64)]

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text with the tokenizer's special tokens around it."""
        return [*self._head, *self.texts.encode(text), *self._tail]

    def chat_ids(self, text: str, *, day: str | None) -> list[int] | None:
        """Return the token ids of a one-message chat as in training on that day; None without a chat template."""
        # `end_id` has no effect, because no answer is tokenized.
        prompts = PromptTokenizer(
            self.tokenizer, max_tokens=sys.maxsize, is_encoder_decoder=False, end_id=0, chat_date=day
        )
        return list(prompts.encode_prompt(text).ids) if prompts.has_chat_template else None

    def find_control(self, text: str, *, special_only: bool = False) -> str | None:
        """Return a control token that vLLM would parse in a text; None if there is none."""
        with self._lock:
            ids = set(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        control_ids = (ids & self.texts.control.keys()) - self.texts.harmless_ids
        control_ids = control_ids & self._special if special_only else control_ids
        return self.texts.control[min(control_ids)] if control_ids else None


def check_body(request: ChatRequest | CompletionRequest, *, table: EmbeddingTable, max_tokens: int | None) -> None:
    """Refuse fields that vLLM must not get or would ignore, and prompts that are too long, before tokenizing them."""
    body = request.to_openai()
    _check_fields(body)
    _check_placeholder(body)
    _check_length(body, table.longest_token, max_tokens=max_tokens)
    if request.kind == "chat":
        _check_control_tokens(body, table)


def build_body(
    request: EngineRequest, *, model: str, table: EmbeddingTable, max_tokens: int | None, salt: str
) -> bytes:
    """Build vLLM's request from a checked request; RequestError if it has more than `max_tokens`."""
    fields = request.body.to_openai().items()
    passed = {name: value for name, value in fields if name in _PASSED and value is not None}
    body, soft = passed | {"model": model, "cache_salt": salt}, request.soft
    if request.body.kind == "completion" and soft is None and table.find_control(body["prompt"]):
        body["prompt"] = table.ids(body["prompt"])  # vLLM would parse control tokens in the text
    if request.choices and not has_own_form(body):
        body = {name: value for name, value in body.items() if name not in _OF_FREE_TEXT}
        body = {"temperature": 0} | body | {"structured_outputs": {"choice": list(request.choices)}}
        if soft is not None and soft.label_bias is not None and not body.get("logit_bias"):
            body["logit_bias"] = table.logit_bias(request.choices, soft.label_bias)
    if soft is not None and request.body.kind == "chat":
        body = add_soft_tokens(body, soft)
    elif soft is not None:
        body[EMBEDS] = encode_embeds(table.embed_with(body.pop("prompt"), soft, max_tokens=max_tokens))
    return to_json(body)


def cache_salt(request: EngineRequest, *, of_persona: bool) -> str:
    """Return the salt that separates tenants in vLLM's caches and, if `of_persona`, also personas."""
    digest = hashlib.blake2b(request.tenant.encode(), digest_size=16)
    if of_persona and request.soft is not None:
        digest.update(request.soft.vectors.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode_embeds(vectors: Tensor) -> str:
    """Encode (n, D) vectors for vLLM; EngineFailure if one is not finite, which would corrupt others' answers."""
    if not bool(torch.isfinite(vectors).all()):
        raise EngineFailure("The persona has values that are not finite, so it was not sent.")
    buffer = io.BytesIO()
    torch.save(vectors.detach().cpu().clone(), buffer)  # cloned, because saving a view would save its whole storage
    return base64.b64encode(buffer.getvalue()).decode()


def add_soft_tokens(body: dict[str, Any], soft: SoftPrompt) -> dict[str, Any]:
    """Add soft tokens to a chat: at the beginning of the answer, or right before the user's last text."""
    part = {"type": EMBEDS, "data": encode_embeds(soft.vectors[0].to(torch.bfloat16))}
    messages = list(body["messages"])
    options = {"enable_thinking": False} | (body.get("chat_template_kwargs") or {})  # as in training
    body = {**body, "chat_template_kwargs": options}
    if soft.placement == "suffix":
        if body.get("continue_final_message"):
            message = "continue_final_message leaves no place for the persona. Remove it."
            raise RequestError(message, code="messages")
        messages.append({"role": "assistant", "content": [part]})
        return {**body, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    index = users[-1] if users else len(messages) - 1
    content = messages[index].get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    messages[index] = {**messages[index], "content": [part, *parts]}
    return {**body, "messages": messages}


def has_own_form(body: dict[str, Any]) -> bool:
    """True if a request sets its own output format, which replaces the task's closed set."""
    return any(body.get(name) for name in ("structured_outputs", "response_format", "tools"))


def _check_fields(body: dict[str, Any]) -> None:
    """Refuse the fields that corrupt vLLM's answers, end its process or have no effect."""
    # vLLM treats a part as embeds because of its type or, if it has a `uuid`, because of a field's name.
    if EMBEDS in body or any(part.get("type") == EMBEDS or EMBEDS in part for part in _parts(body)):
        raise RequestError(f"{EMBEDS} is reserved for this server. Remove it.", code="reserved")
    if body.get("echo") or body.get("prompt_logprobs") is not None:
        raise RequestError("echo and prompt_logprobs are not supported. Remove them.", code="unsupported")
    for name, value in body.items():
        if name not in _PASSED and value is not None and value not in NEUTRAL.get(name, ()):
            raise RequestError(f"The vLLM engine does not support {shown_field(name)}. Remove it.", code="unsupported")
    for turn in _messages(body):
        unknown = [name for name, value in turn.items() if value and name not in _MESSAGE_FIELDS]
        if unknown:
            message = f"A message may not have {shown_field(unknown[0])}. Remove it."
            raise RequestError(message, code="unsupported")


def _check_placeholder(body: dict[str, Any]) -> None:
    """Refuse vLLM's placeholder in any text that a template might write into a prompt."""
    text = "\0".join(leaf for leaf in json_leaves(body) if isinstance(leaf, str))
    plain = _unescaped(text).replace("\\", "")
    # Some templates concatenate the parts of a message without a separator.
    texts = [text for part in _parts(body) for name, text in part.items() if name != "type" and isinstance(text, str)]
    if PLACEHOLDER in plain or PLACEHOLDER in "".join("".join(texts).split()):
        raise RequestError(
            f"A request may not contain {PLACEHOLDER}, which is reserved. Remove it.", code="reserved_text"
        )


def _check_length(body: dict[str, Any], longest_token: int, *, max_tokens: int | None) -> None:
    """Refuse texts that exceed the maximum for any tokenization, before tokenizing them."""
    count = sum(len(text) for message in _rendered(body) for text in _rendered_texts(message))
    if max_tokens is not None and count > max_tokens * longest_token:
        raise too_long(max_tokens)


def _check_control_tokens(body: dict[str, Any], table: EmbeddingTable) -> None:
    """Refuse control tokens in texts that vLLM's template writes into the prompt.

    vLLM would parse them there: with `<|im_end|>` a user could end the turn and write the next one. A message of the
    assistant may have tokens that answers contain, such as `</think>`.
    """
    for message in _rendered(body):
        is_answer = message.get("role") == "assistant"
        for text in _rendered_texts(message):
            control = table.find_control(_unescaped(text).replace("\\/", "/"), special_only=is_answer)
            if control is not None:
                raise RequestError(
                    f"A message may not contain {control}, which is a control token of the model.", code="reserved_text"
                )


def _unescaped(text: str) -> str:
    """Decode the JSON escapes in a text, because vLLM parses the JSON in tool arguments before rendering them."""
    plain = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # joins surrogate pairs


def _rendered_texts(message: dict[str, Any]) -> list[str]:
    """Return the texts of a message that a template may write: without images, with its text parts joined."""
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [part.get("text") for part in parts]
    others = {name: value for name, value in message.items() if name != "role" and not (name == "content" and parts)}
    leaves = [leaf for leaf in json_leaves(others) if isinstance(leaf, str)]
    return [*leaves, "".join(text for text in texts if isinstance(text, str))]


def _rendered(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages and other fields that a template may write into a chat's prompt."""
    return [*_messages(body), {name: body.get(name) for name in ("tools", "documents", "chat_template_kwargs")}]


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    return [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []


def _parts(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of messages whose content is a list. In a completion, `messages` may have any form."""
    contents = [turn["content"] for turn in _messages(body) if isinstance(turn.get("content"), list)]
    return [part for part in chain.from_iterable(contents) if isinstance(part, dict)]
