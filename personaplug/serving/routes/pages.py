"""The OpenAPI document as JSON, and as an HTML page without scripts or external resources."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jinja2
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, Response

router = APIRouter(include_in_schema=False)

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    return Response(_openapi(request.app), media_type="application/json")


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    return HTMLResponse(_page(request.app), headers=_HEADERS)


@cache
def _openapi(app: FastAPI) -> bytes:
    return json.dumps(app.openapi()).encode()


@cache
def _page(app: FastAPI) -> str:
    loader = jinja2.PackageLoader("personaplug.serving.routes", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("docs.html").render(describe_routes(app))


def describe_routes(app: FastAPI) -> dict[str, Any]:
    """Return the `info`, `operations` and `schemas` of the OpenAPI document in the form that the template reads."""
    document = app.openapi()
    operations = [
        {"method": method.upper(), "path": path, "body": _body_schema(operation), **operation}
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = {name: _properties(schema) for name, schema in document["components"]["schemas"].items()}
    return {"info": document["info"], "operations": operations, "schemas": schemas}


def _body_schema(operation: dict[str, Any]) -> str:
    """Return the schema name of an operation's body, or an empty string if the operation has no body."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    return _type_name(content["schema"]) if content else ""


def _properties(schema: dict[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", ())
    return [
        {
            "name": name,
            "type": _type_name(value),
            "is_required": name in required,
            "description": value.get("description", ""),
        }
        for name, value in schema.get("properties", {}).items()
    ]


def _type_name(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type_name, schema["anyOf"])))
    kind = str(schema.get("type", "any"))
    return f"list of {_type_name(schema.get('items', {}))}" if kind == "array" else kind
