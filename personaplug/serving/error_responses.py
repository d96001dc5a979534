"""Error responses in OpenAI's form, and handlers for the errors that FastAPI would otherwise answer itself."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from personaplug.serving.openai_protocol import error_reply, first_error


def error_response(status: int, message: str, *, code: str) -> Response:
    headers = retry_after(status)
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    headers |= {"Connection": "close"} if status in (401, 403, 408, 413) else {}  # the body may not have been read
    return JSONResponse(error_reply(message, code=code, status=status), status, headers)


def retry_after(status: int) -> dict[str, str]:
    """The Retry-After header, if the status calls for one."""
    return {"Retry-After": "1"} if status in (429, 503) else {}


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(422, first_error(error.errors()), code="invalid_value")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = error_reply(str(error.detail), code="http", status=error.status_code)
    return JSONResponse(body, error.status_code, error.headers)
