"""Routes about the server itself: models, health, readiness, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from personaplug.serving.middleware.paths import decode_segment
from personaplug.serving.routes.dependencies import Parts, Tenant

router = APIRouter()


@router.get("/v1/models", summary="List the served models")
async def models(tenant: Tenant, parts: Parts) -> dict[str, Any]:
    return {"object": "list", "data": [_model(name) for name in parts.service.models]}


@router.get("/v1/models/{model:path}", summary="Get a model")
async def model(model: str, tenant: Tenant, parts: Parts) -> dict[str, Any]:
    name = decode_segment(model)
    parts.service.find_plug(name)
    return _model(name)


@router.get("/health", summary="Check that the server runs")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/ready", summary="Check that the engine and the store answer")
async def ready(parts: Parts) -> dict[str, str]:
    await parts.readiness.check()
    return {"status": "ready"}


@router.get("/metrics", summary="Get Prometheus metrics", response_class=Response)
async def metrics(parts: Parts) -> Response:
    telemetry, service = parts.telemetry, parts.service
    for plug in service.plugs:
        name, caches = service.name_of(plug), [served.personas for served in plug.tasks]
        telemetry.cached_users.labels(name).set(sum(personas.cached_users for personas in caches))
        telemetry.cached_bytes.labels(name).set(sum(personas.cached_bytes for personas in caches))
    return Response(telemetry.text(), media_type="text/plain; version=0.0.4")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "personaplug"}
