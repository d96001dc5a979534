"""The field `response_format` of a request: free text, any JSON object, or JSON for a schema."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from personaplug.errors import RequestError
from personaplug.llm.json_grammar import InvalidSchema, JsonGrammar, JsonGrammars

_MAX_SCHEMA_BYTES = 32_768
_MAX_SCHEMA_DEPTH = 32
_MAX_REASON = 300  # characters of the library's reason


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Format):
    type: Literal["text"]


class _AnyObject(_Format):
    type: Literal["json_object"]


class _NamedSchema(_Format):
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # no effect: every answer follows the schema


class _Schema(_Format):
    type: Literal["json_schema"]
    json_schema: _NamedSchema


ResponseFormat = Annotated[_Text | _AnyObject | _Schema, Field(discriminator="type")]


def requested_schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    """Return the JSON schema of the answers; None = free text. RequestError if the schema is too large."""
    if form is None or isinstance(form, _Text):
        return None
    if isinstance(form, _AnyObject):
        return {"type": "object"}
    schema = form.json_schema.schema_
    size, depth = len(json.dumps(schema)), _depth(schema)
    if size > _MAX_SCHEMA_BYTES or depth > _MAX_SCHEMA_DEPTH:
        raise _refused(
            f"A schema may have at most {_MAX_SCHEMA_BYTES} bytes and {_MAX_SCHEMA_DEPTH} levels; this one has {size} "
            f"bytes and {depth} levels. Use a smaller schema."
        )
    return schema


def build_grammar(grammars: JsonGrammars, schema: dict[str, Any]) -> JsonGrammar:
    """Return the grammar of a schema; RequestError if the schema is invalid or has a part without support."""
    try:
        return grammars.grammar(schema)
    except InvalidSchema as error:
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise _refused(f"The schema cannot be used: {reason}. Change the schema.") from None


def too_complex() -> RequestError:
    """Return the error of a schema that proves too complex while an answer is written."""
    return _refused(
        "The schema proved too complex while the answer was written. Use a simpler one, above all in pattern."
    )


def _depth(value: object) -> int:
    """Return how deep lists and objects are nested; a request has a limited depth."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def _refused(message: str) -> RequestError:
    return RequestError(f"response_format: {message}", code="response_format")
