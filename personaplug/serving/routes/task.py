"""The route that describes the plug's task, and a hint for chat routes that this server does not have."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from personaplug.errors import RequestError
from personaplug.serving.routes.dependencies import Plug, Tenant

router = APIRouter()


@router.get("/v1/task", summary="Describe the plug's task and the wording of its prompts")
async def task(tenant: Tenant, plug: Plug) -> dict[str, Any]:
    """If the plug has several tasks, `tasks` lists them in the order in which a prompt is matched against them."""
    described = [served.describe() for served in plug.tasks]
    return described[0] if len(described) == 1 else {"tasks": described}


@router.post("/v1/responses", include_in_schema=False)
@router.post("/v1/messages", include_in_schema=False)
async def other_protocol() -> None:
    raise RequestError(
        "This server does not have this route. Send messages to POST /v1/chat/completions, or a text to "
        "POST /v1/completions.",
        http_status=404,
        code="unknown_route",
    )
