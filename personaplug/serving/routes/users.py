"""Routes about all users of a tenant: their list, and the map of their personas."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from personaplug.errors import RequestError
from personaplug.serving.openai_protocol import Name
from personaplug.serving.persona_map import PersonaMap
from personaplug.serving.routes.dependencies import KeyUser, Parts, Plug, Tenant
from personaplug.store.user_list import list_users

router = APIRouter(prefix="/v1")

_MAX_LISTED = 10_000
_MAX_ON_MAP = 200
_MAX_TRAILS = 10
_LISTED = ("user", "items", "preferences", "last")


@router.get("/users", summary="List the tenant's users")
async def users(
    tenant: Tenant, parts: Parts, limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 1000
) -> dict[str, Any]:
    """If the tenant has more than `limit` users, `more` is true."""
    service = parts.service
    stored = await service.slow.run(tenant, "", lambda: list_users(service.store, tenant=tenant, limit=limit + 1))
    rows = [{name: user.to_dict()[name] for name in _LISTED} for user in stored[:limit]]
    return {"users": rows, "more": len(stored) > limit}


@router.get("/personas", summary="Show the personas of the tenant's users as points of a plane")
async def personas(
    tenant: Tenant,
    key_user: KeyUser,
    parts: Parts,
    plug: Plug,
    limit: Annotated[int, Query(ge=1, le=_MAX_ON_MAP)] = 200,
    trail: Annotated[
        tuple[Name, ...], Query(max_length=_MAX_TRAILS, description="Users whose personas to follow, item by item.")
    ] = (),
) -> dict[str, Any]:
    if key_user is not None:
        message = "This key belongs to one user. Use a key of the tenant, because the map shows all its users."
        raise RequestError(message, http_status=403, code="user")
    return await PersonaMap(parts.service, plug).describe(tenant, limit=limit, trails_of=trail)
