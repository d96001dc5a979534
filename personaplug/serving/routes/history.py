"""Routes under /v1/users/{user}: history, export, erasure and explanations."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from personaplug.config import MAX_PERSONA_SCALE
from personaplug.data.pictures import format_of
from personaplug.data.records import Chat, Prompt
from personaplug.errors import RequestError
from personaplug.serving.explanations import Explainer
from personaplug.serving.feedback import MAX_TEXT, Feedback, feedback_ids
from personaplug.serving.json_bodies import JsonRoute
from personaplug.serving.json_stream import json_pages, stream_json, stream_pieces
from personaplug.serving.openai_protocol import Messages, Name, Text
from personaplug.serving.routes.dependencies import ItemId, Parts, Plug, RequestId, Tenant, UserId
from personaplug.serving.service import Service

router = APIRouter(prefix="/v1/users/{user}", route_class=JsonRoute)

_MAX_LISTED = 10_000  # items in one reply

_PICTURE_HEADERS = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}

_Answer = Text | int | float | None
_SYSTEM_ROLES = {"developer": "system"}


class HistoryPost(BaseModel):
    """Items to add to a history: a list of items, one item, or feedback on an earlier reply."""

    model_config = ConfigDict(extra="allow", strict=True)

    items: list[dict[str, Any]] | None = Field(
        None,
        description="Items with the task's fields and, optionally, `id` and `date`. An item may have `rejected` "
        "instead of the answer, or only `preference`. A picture is a data URL, a vector a list of numbers.",
    )
    request_id: Name | None = Field(None, description="The X-Request-Id of an earlier reply to this user.")
    answer: _Answer = Field(None, description="The text that the user accepted for that request.")
    rejected: _Answer = Field(None, description="The text that the user rejected, with or without `answer`.")
    rating: _Answer = Field(None, description="`up` if the user accepted the reply unchanged, `down` if not.")

    @model_validator(mode="after")
    def _check_form(self) -> HistoryPost:
        forms = [self.items is not None, self.request_id is not None, bool(self.model_extra)]
        if sum(forms) != 1 or ((self.request_id is None) == bool(self._declared) and not self.model_extra):
            raise ValueError(
                "send one of: `items`; the fields of one item; `request_id` with `answer`, `rejected` or `rating`"
            )
        texts = (text for text in self._declared.values() if isinstance(text, str))
        if max(map(len, texts), default=0) > MAX_TEXT:
            raise ValueError(f"a field of an item may have at most {MAX_TEXT:,} characters")
        return self

    @model_validator(mode="after")
    def _check_rating(self) -> HistoryPost:
        is_given = self.request_id is not None and self.rating is not None
        if is_given and (self.rating not in ("up", "down") or len(self._declared) > 1):
            raise ValueError("`rating` must be `up` or `down`, and the only field besides `request_id`")
        return self

    @property
    def records(self) -> list[dict[str, Any]]:
        """The items to add. A single item has the undeclared fields, and `answer`, `rejected` and `rating` if set."""
        return self.items if self.items is not None else [(self.model_extra or {}) | self._declared]

    @property
    def feedback(self) -> Feedback:
        return Feedback(**self._declared)

    @property
    def _declared(self) -> dict[str, Any]:
        fields = {"answer": self.answer, "rejected": self.rejected, "rating": self.rating}
        return {name: value for name, value in fields.items() if value is not None}


class ExplainPost(BaseModel):
    """A prompt and, optionally, an answer to explain."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text | None = Field(None, min_length=1, description="The prompt, if it is a single message.")
    messages: Messages | None = Field(None, description="The conversation up to the user's last message.")
    answer: Text | None = Field(None, min_length=1, description="The answer whose log-likelihood to explain.")
    persona_scale: float | None = Field(
        None, gt=0, le=MAX_PERSONA_SCALE, description="Strength of the persona to explain; the server's by default."
    )
    most: int = Field(20, ge=1, le=512, description="Maximum number of items to list.")

    @model_validator(mode="after")
    def _check_prompt(self) -> ExplainPost:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either `prompt` or `messages`")
        if any(message.picture_urls for message in self.messages or ()):
            raise ValueError("an explanation takes no pictures; leave them out of `messages`")
        return self

    @property
    def asked(self) -> Prompt:
        """The prompt, or the conversation with the role names used in training."""
        turns = [(_SYSTEM_ROLES.get(turn.role, turn.role), turn.text) for turn in self.messages or ()]
        return self.prompt if self.prompt is not None else Chat(tuple(turns))


@router.post("/history", summary="Add items or feedback to a history")
async def add(user: UserId, post: HistoryPost, tenant: Tenant, parts: Parts, plug: Plug) -> dict[str, int]:
    service, limit = parts.service, parts.limits.items
    if post.request_id is not None:
        feedback = post.feedback
        return (await service.add_feedback(tenant, user, request_id=post.request_id, feedback=feedback))._asdict()
    if len(post.records) > limit:
        message = f"A request may add at most {limit} items; found {len(post.records)}. Send several requests."
        raise RequestError(message, code="too_many")
    return (await service.add_records(tenant, user, records=post.records, plug=plug))._asdict()


@router.get("/history", summary="List a user's items, oldest first")
async def list_history(
    user: UserId, tenant: Tenant, parts: Parts, latest: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 1000
) -> Response:
    pages = _history_pages(parts.service, tenant, user, latest=latest)
    return await stream_json(parts.service, tenant, user, pages=pages)


@router.get(
    "/history/{item}/picture",
    summary="Return the picture of an item",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}}},
)
async def picture(user: UserId, item: ItemId, tenant: Tenant, parts: Parts) -> Response:
    """The reply is 404 if the store keeps no pictures."""
    service = parts.service
    found = await service.store_threads.run(tenant, user, service.store.load_picture, tenant, user, item)
    content = found.read()
    kind = format_of(content)
    media_type = f"image/{kind}" if kind else "application/octet-stream"
    return StreamingResponse(stream_pieces(content), headers=_PICTURE_HEADERS, media_type=media_type)


@router.delete("/history/{item}", summary="Delete an item")
async def delete_item(user: UserId, item: ItemId, tenant: Tenant, parts: Parts) -> dict[str, bool]:
    await parts.service.store_threads.run(tenant, user, parts.service.store.delete_item, tenant, user, item)
    return {"deleted": True}


@router.delete("/feedback/{request}", summary="Delete the feedback on a request")
async def delete_feedback(user: UserId, request: RequestId, tenant: Tenant, parts: Parts) -> dict[str, bool]:
    store = parts.service.store
    await parts.service.store_threads.run(tenant, user, store.delete_item, tenant, user, *feedback_ids(request))
    return {"deleted": True}


@router.get("/export", summary="Export all stored data of a user")
async def export(user: UserId, tenant: Tenant, parts: Parts) -> Response:
    pages = await parts.service.store_threads.run(tenant, user, parts.service.store.export, tenant, user)
    return await stream_json(parts.service, tenant, user, pages=pages)


@router.delete("", summary="Erase a user and return a receipt")
async def erase(user: UserId, tenant: Tenant, parts: Parts) -> dict[str, Any]:
    return (await parts.service.erase_user(tenant, user)).to_dict()


@router.post("/explain", summary="List item weights and effects on an answer")
async def explain(user: UserId, post: ExplainPost, tenant: Tenant, parts: Parts, plug: Plug) -> Response:
    explanation = await Explainer(parts.service).explain(
        tenant,
        user,
        prompt=post.asked,
        answer=post.answer,
        most=post.most,
        persona_scale=post.persona_scale,
        plug=plug,
    )
    pages = json_pages(explanation, explanation.pop("items"))
    return await stream_json(parts.service, tenant, user, pages=pages)


@router.get("/drift", summary="Measure how far a persona moved between two dates")
async def drift(user: UserId, since: date, until: date, tenant: Tenant, parts: Parts, plug: Plug) -> dict[str, Any]:
    return await Explainer(parts.service, plug.tasks[0]).drift(tenant, user, since=since, until=until)


def _history_pages(service: Service, tenant: str, user: str, *, latest: int) -> Iterator[bytes]:
    head = {"user": user, "count": service.store.count(tenant, user)}
    items = service.store.list_items(tenant, user, latest=latest)
    yield from json_pages(head, [service.item_fields(item) for item in items])
