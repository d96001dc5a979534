"""Sampling options of the in-process engine. It refuses other options that would change the answer."""

from __future__ import annotations

import random
import secrets
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from personaplug.errors import RequestError
from personaplug.llm.token_shift import TokenShift
from personaplug.serving.engines.response_format import ResponseFormat
from personaplug.serving.openai_protocol import HARMLESS, Kind, first_error

_MAX_STOPS = 4  # as in OpenAI's API
_MAX_LOGPROBS = 20  # likewise
_MAX_BIASED = 1024  # tokens in logit_bias; each costs time at every token of the answer
_MAX_ANSWERS = 8  # to one request

_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Bias = Annotated[float, Field(ge=-100, le=100)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("best_of", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("min_p", "min_tokens", "priority"), (0,)),
    **dict.fromkeys(("echo", "continue_final_message", "ignore_eos", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("use_beam_search",), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words", "documents"), ([],)),
    **dict.fromkeys(("structured_outputs", "chat_template_kwargs"), ({},)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),  # without tools, both mean the same
    "parallel_tool_calls": (True, False),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "suffix": ("",),
    "top_k": (0, -1),
    "modalities": (["text"],),
}
"""Unsupported fields, with the values that do not affect the answer. Null does not affect it in any field."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # ignored: it pads events and does not affect the answer


class Sampling(BaseModel):
    """The undeclared fields of a request that the engine supports."""

    model_config = ConfigDict(extra="ignore", strict=True)

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | int | None = None  # a boolean in chats, a number in completions
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)
    n: int | None = Field(None, ge=1, le=_MAX_ANSWERS)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, _Bias] | None = Field(None, max_length=_MAX_BIASED)
    response_format: ResponseFormat | None = None

    @classmethod
    def from_fields(cls, fields: dict[str, Any] | None, *, kind: Kind = "chat") -> Sampling:
        """Validate the undeclared fields; RequestError if a field is invalid or unsupported."""
        fields = fields or {}
        try:
            sampling = cls.model_validate(fields)
        except ValidationError as error:
            raise RequestError(first_error(error.errors()), code="invalid_value") from None
        if len(sampling.stop_texts) > _MAX_STOPS:
            raise RequestError(f"stop: at most {_MAX_STOPS} texts are supported.", code="invalid_value")
        for name, value in fields.items():
            is_known = name in cls.model_fields or name in HARMLESS or value is None
            if not is_known and value not in NEUTRAL.get(name, ()):
                raise RequestError(f"This engine does not support {shown_field(name)}. Remove it.", code="unsupported")
        sampling.logprob_count(kind)
        if sampling.has_json and sampling.stop_texts:
            message = "stop and response_format exclude each other, because a stop text would cut the JSON."
            raise RequestError(f"{message} Remove stop.", code="invalid_value")
        return sampling

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer and are not part of it."""
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text)

    @property
    def has_json(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def seeds(self) -> list[int]:
        """The seed of each answer. They are random if the request has none; the first is the request's."""
        first = secrets.randbits(62) if self.seed is None else self.seed
        further = range(1, self.n or 1)
        return [first, *(random.Random(f"{first}/{index}").getrandbits(62) for index in further)]

    def token_bias(self, vocabulary: int) -> dict[int, float]:
        """Return `logit_bias` by token id; RequestError if an id is not below the number of the model's tokens."""
        bias: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            token = int(key) if key.isascii() and key.isdecimal() and len(key) <= 9 else vocabulary
            if token >= vocabulary:
                message = f"logit_bias: each key must be a token id of the model, 0 to {vocabulary - 1}."
                raise RequestError(f"{message} Use the model's own tokenizer.", code="invalid_value")
            bias[token] = value
        return {token: value for token, value in bias.items() if value}

    def token_shift(self, bias: dict[int, float]) -> TokenShift | None:
        """Return a new state of the penalties and the bias for one answer; None if there are none."""
        presence, frequency = self.presence_penalty or 0.0, self.frequency_penalty or 0.0
        return TokenShift(presence=presence, frequency=frequency, bias=bias) if presence or frequency or bias else None

    def check_closed_set(self) -> None:
        """Refuse options that have no effect on labels, which are scored whole."""
        names = [name for name in ("presence_penalty", "frequency_penalty", "logit_bias") if getattr(self, name)]
        names += ["response_format"] if self.has_json else []
        if names:
            message = f"This prompt is answered with one of the task's labels, so {names[0]} has no effect. Remove it"
            free = 'or ask for free text with {"personaplug": {"free": true}}'
            raise RequestError(f"{message}, {free}.", code="unsupported")

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def logprob_count(self, kind: Kind) -> int | None:
        """Return how many tokens or labels to list at each position; None if the request needs no log-probabilities."""
        logprobs, top = self.logprobs, self.top_logprobs
        is_flag = logprobs is None or isinstance(logprobs, bool)
        if kind == "chat" and not is_flag:
            raise RequestError(
                "In a chat, logprobs must be true or false, and top_logprobs a number.", code="invalid_value"
            )
        if kind == "chat" and top and not logprobs:
            raise RequestError("top_logprobs requires logprobs=true.", code="invalid_value")
        if kind == "completion" and (top or logprobs is True or not 0 <= int(logprobs or 0) <= _MAX_LOGPROBS):
            message = f"In a completion, logprobs must be a number from 0 to {_MAX_LOGPROBS}, without top_logprobs."
            raise RequestError(message, code="invalid_value")
        if kind == "completion":
            return None if is_flag else int(logprobs or 0)
        return (top or 0) if logprobs else None


def shown_field(name: str) -> str:
    """Return a field's name for a message, but not a long one, which may be misplaced user text."""
    return repr(name) if len(name) <= 40 else f"the field whose name has {len(name)} characters"
