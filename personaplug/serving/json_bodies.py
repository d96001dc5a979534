"""JSON bodies: bounds that are checked before anything is built from them, and parsing outside the event loop."""

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
"""Values, keys and containers of one body. 1,000 items with ten fields have 21,000."""

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BLOCK_BYTES = 64 * 2**10
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def check_size(body: bytes) -> None:
    """Check how many values JSON holds and how deep they are nested, in a time that grows with its length alone."""
    strings = values = depth = 0
    for quotes, structure in _blocks(body):
        brackets = structure.translate(None, _NO_BRACKETS)
        strings += quotes // 2
        values += structure.count(b",") + structure.count(b":") + len(brackets)
        if max(strings, values) > MAX_VALUES:
            message = f"A body holds at most {MAX_VALUES:,} values."
            raise RequestError(message, http_status=413, code="too_many_values")
        depths = list(accumulate(map(_STEPS.__getitem__, brackets), initial=depth))
        depth = depths[-1]
        if max(depths) > MAX_DEPTH:
            raise RequestError(f"The body is nested more than {MAX_DEPTH} levels deep.", code="invalid_value")


def _blocks(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number of quotes and what is outside of strings, in blocks: other threads run between them."""
    is_in_string, escape = False, b""
    for start in range(0, len(body), _BLOCK_BYTES):
        block = escape + body[start : start + _BLOCK_BYTES]
        escape = b"\\" if (len(block) - len(block.rstrip(b"\\"))) % 2 else b""  # its second half is in the next block
        # Without escapes, quotes only stand around strings.
        parts = block.removesuffix(escape).replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield len(parts) - 1, b"".join(parts[is_in_string::2])
        is_in_string ^= len(parts) % 2 == 0


def parse_body(body: bytes, model: TypeAdapter[Any]) -> Any:
    """Parse and validate a body; RequestError or RequestValidationError if it is not as the model says."""
    check_size(body)
    try:
        value = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it holds what JSON or UTF-8 does not allow"
        raise RequestError(f"The body is not valid JSON: {reason}.", http_status=422, code="invalid_json") from None
    try:
        return model.validate_python(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**detail, "loc": ("body", *detail["loc"])} for detail in details]) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; a key that stands twice has two values, of which a proxy may have read the other one."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise RequestError("An object of the body has the same key twice.", http_status=422, code="invalid_json")
    return values


class JsonRoute(APIRoute):
    """A route that parses its body in a thread, in the caller's turn, so that no body holds up the event loop."""

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
    """A request whose body was parsed; the route's own validation passes an instance of the model on."""

    value: Any = None

    async def json(self) -> Any:
        return self.value
