"""Options of a request that the in-process engine supports, and those that it refuses."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from personaplug.errors import RequestError
from personaplug.serving.openai_protocol import first_error

_MAX_STOPS = 4  # as in OpenAI's API

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("prompt_logprobs", "prompt_embeds"), (None,)),
    **dict.fromkeys(("n", "best_of", "repetition_penalty"), (None, 1)),
    **dict.fromkeys(("top_logprobs", "frequency_penalty", "presence_penalty", "min_p", "min_tokens"), (None, 0)),
    **dict.fromkeys(("echo", "continue_final_message"), (None, False)),
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words"), (None, [])),
    **dict.fromkeys(("logit_bias", "structured_outputs"), (None, {})),
    "suffix": (None, ""),
    "logprobs": (None, False, 0),
    "top_k": (None, 0, -1),
    "response_format": (None, {"type": "text"}),
}
"""Fields that would change the answer, with the values that leave it unchanged. Other unknown fields are ignored."""


class Sampling(BaseModel):
    """A view on the undeclared fields of a request."""

    model_config = ConfigDict(extra="ignore", strict=True)

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stream_options: dict[str, Any] | None = None

    @classmethod
    def from_fields(cls, fields: dict[str, Any] | None) -> Sampling:
        """Validate the undeclared fields; RequestError if one of them is invalid or unsupported."""
        fields = fields or {}
        try:
            sampling = cls.model_validate(fields)
        except ValidationError as error:
            raise RequestError(first_error(error.errors()), code="invalid_value") from None
        if len(sampling.stop_texts) > _MAX_STOPS:
            raise RequestError(f"stop: at most {_MAX_STOPS} texts may end an answer.", code="invalid_value")
        for name, neutral_values in UNSUPPORTED.items():
            if name in fields and fields[name] not in neutral_values:
                raise RequestError(f"The embedded engine does not know {name!r}; leave it out.", code="unsupported")
        return sampling

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer and are not part of it."""
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text)
