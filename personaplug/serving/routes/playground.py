"""The playground: a page that shows the answers, histories and personas of a server's users.

The page has no build step. It loads nothing from other hosts, which its content security policy enforces.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

from personaplug.errors import RequestError

router = APIRouter(include_in_schema=False)

_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    return _file("index.html")


@router.get("/playground/{name}")
async def asset(name: str) -> Response:
    if name not in _contents():
        raise RequestError("The playground has no such file. Open `/`.", http_status=404, code="not_found")
    return _file(name)


def _file(name: str) -> Response:
    kind = _MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(_contents()[name], media_type=kind, headers=_HEADERS)


@cache
def _contents() -> dict[str, bytes]:
    folder = files("personaplug.serving") / "playground"
    names = [file.name for file in folder.iterdir() if file.name.rpartition(".")[2] in _MEDIA_TYPES]
    return {name: (folder / name).read_bytes() for name in names}
