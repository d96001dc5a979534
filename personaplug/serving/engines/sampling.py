"""Sampling options of the in-process engine. It refuses other options that would change the answer."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from personaplug.errors import RequestError
from personaplug.serving.openai_protocol import HARMLESS, Kind, first_error

_MAX_STOPS = 4  # as in OpenAI's API
_MAX_LOGPROBS = 20  # likewise

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens", "priority"), (0,)),
    **dict.fromkeys(("echo", "continue_final_message", "ignore_eos", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("use_beam_search",), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words", "documents"), ([],)),
    **dict.fromkeys(("logit_bias", "structured_outputs", "chat_template_kwargs"), ({},)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),  # without tools, both mean the same
    "parallel_tool_calls": (True, False),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "suffix": ("",),
    "top_k": (0, -1),
    "response_format": ({"type": "text"},),
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
                raise RequestError(
                    f"The embedded engine does not support {shown_field(name)}. Remove it.", code="unsupported"
                )
        sampling.logprob_count(kind)
        return sampling

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer and are not part of it."""
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def logprob_count(self, kind: Kind) -> int | None:
        """Return how many labels to list with log-probabilities; None if the request asks for no log-probabilities."""
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
