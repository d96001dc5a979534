"""Error responses in OpenAI's form, and the handlers that turn exceptions into them."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from personaplug.errors import PersonaPlugError
from personaplug.serving.openai_protocol import error_reply, first_error

logger = logging.getLogger(__name__)

_SERVER_MESSAGES = {
    500: "The server is not set up for this request.",
    503: "The store of histories cannot be used now; try again.",
}
"""Replace the error's own message for these statuses, because that message may name paths or settings."""


def error_response(status: int, message: str, *, code: str) -> Response:
    """A response that refuses a request."""
    headers = retry_after(status)
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    headers |= {"Connection": "close"} if status in (401, 403, 408, 413) else {}  # the body may not have been read
    return JSONResponse(error_reply(message, code=code, status=status), status, headers)


def retry_after(status: int) -> dict[str, str]:
    """The Retry-After header, if the status calls for one."""
    return {"Retry-After": "1"} if status in (429, 503) else {}


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's form."""
    app.add_exception_handler(PersonaPlugError, _on_package_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)


async def _on_package_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PersonaPlugError)
    status, code = error.http_status, error.code
    if status >= 500:
        logger.error("%s: %s", type(error).__name__, code)
    return error_response(status, _SERVER_MESSAGES.get(status, str(error)), code=code)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(422, first_error(error.errors()), code="invalid_value")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = error_reply(str(error.detail), code="http", status=error.status_code)
    return JSONResponse(body, error.status_code, error.headers)
