"""Error responses in OpenAI's format, and handlers that replace FastAPI's own error responses."""

from __future__ import annotations

import json

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from personaplug.serving.openai_protocol import error_reply, first_error

_MAX_MESSAGE = 1000  # characters; a message may contain a field name that the caller chose


def error_response(status: int, message: str, *, code: str, closes: bool = False) -> Response:
    """Build an error response. `closes` closes the connection afterwards, because the body was not read."""
    headers = retry_after(status)
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    headers |= {"Connection": "close"} if closes else {}
    body = json.dumps(error_reply(message[:_MAX_MESSAGE], code=code, status=status))  # escapes lone surrogates
    return Response(body, status, headers, media_type="application/json")


def retry_after(status: int) -> dict[str, str]:
    """Return the Retry-After header for the statuses 429 and 503."""
    return {"Retry-After": "1"} if status in (429, 503) else {}


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(422, first_error(error.errors()), code="invalid_value")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail), code="http")
