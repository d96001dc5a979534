"""Routes of a user's stated preferences: sentences that enter every persona of the user, whatever their age."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from personaplug.serving.feedback import MAX_TEXT
from personaplug.serving.json_bodies import JsonRoute
from personaplug.serving.json_stream import json_pages, stream_json
from personaplug.serving.openai_protocol import Text
from personaplug.serving.routes.dependencies import Parts, Plug, Tenant, UserId
from personaplug.serving.service import Service
from personaplug.store.writes import MAX_PREFERENCES

router = APIRouter(prefix="/v1/users/{user}/preferences", route_class=JsonRoute)

_Sentence = Annotated[Text, Field(min_length=1, max_length=MAX_TEXT)]


class PreferencesPut(BaseModel):
    """The complete list of a user's preferences."""

    model_config = ConfigDict(extra="forbid", strict=True)

    preferences: list[_Sentence] = Field(
        max_length=MAX_PREFERENCES,
        description="Sentences in the user's words, such as `Keep it short.`; [] removes all preferences.",
    )


@router.put("", summary="Replace a user's preferences")
async def put(user: UserId, body: PreferencesPut, tenant: Tenant, parts: Parts, plug: Plug) -> dict[str, int | bool]:
    """`used` is true if the plug reads preferences, that is, if its training data had some."""
    result = await parts.service.state_preferences(tenant, user, preferences=body.preferences)
    return {**result._asdict(), "used": "preference" in plug.personas.plug.known_kinds}


@router.get("", summary="List a user's preferences, oldest first")
async def list_preferences(user: UserId, tenant: Tenant, parts: Parts) -> Response:
    return await stream_json(parts.service, tenant, user, pages=_pages(parts.service, tenant, user))


@router.delete("", summary="Delete all preferences of a user")
async def delete(user: UserId, tenant: Tenant, parts: Parts) -> dict[str, int]:
    return (await parts.service.state_preferences(tenant, user, preferences=()))._asdict()


def _pages(service: Service, tenant: str, user: str) -> Iterator[bytes]:
    items = service.store.list_preferences(tenant, user)
    head = {"user": user, "count": len(items)}
    yield from json_pages(head, [service.item_fields(item) for item in items], name="preferences")
