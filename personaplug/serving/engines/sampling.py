"""Options of a request that the in-process engine acts on; it refuses all others that would change the answer."""

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
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),  # there are no tools, so none is called
    "parallel_tool_calls": (True, False),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "suffix": ("",),
    "top_k": (0, -1),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that the engine does not know, with the values that leave an answer as it is. Null does so in every field."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # ignored: it pads events and changes no answer


class Sampling(BaseModel):
    """A view on the undeclared fields of a request."""

    model_config = ConfigDict(extra="ignore", strict=True)

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | int | None = None  # a truth value in chats, a number in completions
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)

    @classmethod
    def from_fields(cls, fields: dict[str, Any] | None, *, kind: Kind = "chat") -> Sampling:
        """Validate the undeclared fields; RequestError if one of them is invalid or unsupported."""
        fields = fields or {}
        try:
            sampling = cls.model_validate(fields)
        except ValidationError as error:
            raise RequestError(first_error(error.errors()), code="invalid_value") from None
        if len(sampling.stop_texts) > _MAX_STOPS:
            raise RequestError(f"stop: at most {_MAX_STOPS} texts may end an answer.", code="invalid_value")
        for name, value in fields.items():
            is_known = name in cls.model_fields or name in HARMLESS or value is None
            if not is_known and value not in NEUTRAL.get(name, ()):
                raise RequestError(
                    f"The embedded engine does not know {shown_field(name)}; leave it out.", code="unsupported"
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
        """How many labels to list with their log-probabilities; None = the request asks for no log-probabilities."""
        logprobs, top = self.logprobs, self.top_logprobs
        is_flag = logprobs is None or isinstance(logprobs, bool)
        if kind == "chat" and not is_flag:
            raise RequestError("logprobs of a chat is true or false; top_logprobs is a number.", code="invalid_value")
        if kind == "chat" and top and not logprobs:
            raise RequestError("top_logprobs needs logprobs=true.", code="invalid_value")
        if kind == "completion" and (top or logprobs is True or not 0 <= int(logprobs or 0) <= _MAX_LOGPROBS):
            message = f"A completion says logprobs=N, of 0 to {_MAX_LOGPROBS}, without top_logprobs."
            raise RequestError(message, code="invalid_value")
        if kind == "completion":
            return None if is_flag else int(logprobs or 0)
        return (top or 0) if logprobs else None


def shown_field(name: str) -> str:
    """A field's name for a message; a longer one may be a text in the wrong place."""
    return repr(name) if len(name) <= 40 else f"a field whose name has {len(name)} characters"
