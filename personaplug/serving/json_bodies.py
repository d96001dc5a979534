"""JSON bodies: check their limits before parsing, and parse them outside the event loop."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from personaplug.errors import RequestError
from personaplug.serving.openai_protocol import MAX_DEPTH

MAX_VALUES = 50_000
"""Maximum values, keys and containers of one body. 1,000 items with ten fields have 21,000."""

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BLOCK_BYTES = 64 * 2**10
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def check_size(body: bytes) -> None:
    """Check the number of values and the nesting depth of JSON, in time linear in its length."""
    strings = values = depth = 0
    for quotes, structure in _blocks(body):
        brackets = structure.translate(None, _NO_BRACKETS)
        strings += quotes // 2
        values += structure.count(b",") + structure.count(b":") + len(brackets)
        if max(strings, values) > MAX_VALUES:
            message = f"A body may have at most {MAX_VALUES:,} values. Send a smaller one."
            raise RequestError(message, http_status=413, code="too_many_values")
        depths = list(accumulate(map(_STEPS.__getitem__, brackets), initial=depth))
        depth = depths[-1]
        if max(depths) > MAX_DEPTH:
            raise RequestError(f"The body is nested more than {MAX_DEPTH} levels deep.", code="invalid_value")


def _blocks(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number of quotes and the text outside of strings, block by block, so that other threads can run."""
    is_in_string, escape = False, b""
    for start in range(0, len(body), _BLOCK_BYTES):
        block = escape + body[start : start + _BLOCK_BYTES]
        # The character behind a final backslash is in the next block.
        escape = b"\\" if (len(block) - len(block.rstrip(b"\\"))) % 2 else b""
        # Once escapes are removed, every quote begins or ends a string.
        parts = block.removesuffix(escape).replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield len(parts) - 1, b"".join(parts[is_in_string::2])
        is_in_string ^= len(parts) % 2 == 0


def parse_body(body: bytes, model: TypeAdapter[Any]) -> Any:
    """Parse and validate a body; RequestError if it is not JSON, RequestValidationError if the model refuses it."""
    check_size(body)
    try:
        value = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8, or a number is too long"
        raise RequestError(f"The body is not valid JSON: {reason}.", http_status=422, code="invalid_json") from None
    try:
        return model.validate_python(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**detail, "loc": ("body", *detail["loc"])} for detail in details]) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; refuse a duplicate key, because a proxy may have read its other value."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise RequestError(
            "An object of the body has a duplicate key. Send each key once.", http_status=422, code="invalid_json"
        )
    return values


class JsonRoute(APIRoute):
    """A route that parses its body in threads that tenants share fairly, so that no body blocks the event loop."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model: TypeAdapter[Any] = TypeAdapter(self.body_field.field_info.annotation or dict)

        async def parse_and_handle(request: Request) -> Response:
            parsed = _ParsedRequest(request.scope, request.receive)
            body, parts = await parsed.body(), request.app.state.parts
            parse = partial(parse_body, body, model)
            parsed.value = await parts.parsers.run_weighted(request.state.tenant, "", parse, cost=1 + len(body))
            return await handle(parsed)

        return parse_and_handle


class _ParsedRequest(Request):
    """A request with a parsed body. FastAPI's validation accepts the model instance unchanged."""

    value: Any = None

    async def json(self) -> Any:
        return self.value
