"""Large JSON replies, streamed page by page. A thread writes each page after the client has read the last one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from personaplug.serving.openai_protocol import to_json
from personaplug.serving.service import Service

_ITEMS_PER_PAGE = 100
_PIECE_BYTES = 64 * 2**10  # largest chunk that a connection has to buffer


def json_pages(head: Mapping[str, Any], items: Sequence[Mapping[str, Any]], *, name: str = "items") -> Iterator[bytes]:
    """Yield the pages of a JSON object whose last field, `name`, is the list of items."""
    yield to_json(head).removesuffix(b"}") + f',"{name}":['.encode()
    for start in range(0, len(items), _ITEMS_PER_PAGE):
        page = b",".join(map(to_json, items[start : start + _ITEMS_PER_PAGE]))
        yield b"," + page if start else page
    yield b"]}"


async def stream_json(service: Service, tenant: str, user: str, *, pages: Iterator[bytes | str]) -> StreamingResponse:
    """Stream pages of JSON. An error in the first two pages becomes the reply; a later one closes the connection."""
    first = [await service.slow.run(tenant, user, next, pages, b"") for _ in range(2)]

    async def pieces() -> AsyncGenerator[bytes]:
        for page in first:
            async for piece in stream_pieces(page):
                yield piece
        while page := await service.slow.run(tenant, user, next, pages, b""):
            async for piece in stream_pieces(page):
                yield piece

    return StreamingResponse(pieces(), media_type="application/json")


async def stream_pieces(page: bytes | str) -> AsyncGenerator[bytes]:
    """Yield the content of a page in small pieces."""
    content = page if isinstance(page, bytes) else page.encode()
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]
