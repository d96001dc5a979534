"""Replies that may be large: a page at a time, written in a thread, read by the caller before the next one is made."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from personaplug.serving.openai_protocol import to_json
from personaplug.serving.service import Service

_ITEMS_PER_PAGE = 100
_PIECE_BYTES = 64 * 2**10  # what a connection may hold that was not read


def json_pages(head: Mapping[str, Any], items: Sequence[Mapping[str, Any]], *, name: str = "items") -> Iterator[bytes]:
    """Yield the pages of a JSON object whose last value is the list of items, under this name."""
    yield to_json(head).removesuffix(b"}") + f',"{name}":['.encode()
    for start in range(0, len(items), _ITEMS_PER_PAGE):
        page = b",".join(map(to_json, items[start : start + _ITEMS_PER_PAGE]))
        yield b"," + page if start else page
    yield b"]}"


async def stream_json(service: Service, tenant: str, user: str, *, pages: Iterator[bytes | str]) -> StreamingResponse:
    """Send pages of JSON. An error of the first two becomes the reply; a later one ends the connection."""
    first = [await service.slow.run(tenant, user, next, pages, b"") for _ in range(2)]

    async def pieces() -> AsyncGenerator[bytes]:
        for page in first:
            for piece in _pieces(page):
                yield piece
        while page := await service.slow.run(tenant, user, next, pages, b""):
            for piece in _pieces(page):
                yield piece

    return StreamingResponse(pieces(), media_type="application/json")


def _pieces(page: bytes | str) -> Iterator[bytes]:
    content = page if isinstance(page, bytes) else page.encode()
    return (content[start : start + _PIECE_BYTES] for start in range(0, len(content), _PIECE_BYTES))
