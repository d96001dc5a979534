"""OpenTelemetry traces of a server, set up by the standard environment variables `OTEL_…`.

The instrumentation of FastAPI and SQLAlchemy records paths with user ids, and texts of errors that quote rows. So spans
pass an exporter that keeps only attributes without such values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import entry_points

from fastapi import FastAPI

from personaplug.errors import ConfigError, MissingExtra
from personaplug.serving.spans import SCOPE, without_state
from personaplug.store.history_store import HistoryStore

try:
    from opentelemetry import trace
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.trace import SpanKind, Status
except ImportError as error:
    raise MissingExtra("a trace", extra="traces") from error

_UNTRACED = r"^https?://[^/]*/(health|ready|metrics)(\?|$)"
_EXPORTERS = "opentelemetry_traces_exporter"  # a group of entry points
_SQL_SCOPE = "opentelemetry.instrumentation.sqlalchemy"
_METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))

# The attributes to keep, in the old and the new names of OpenTelemetry. SQL statements have placeholders for values.
_OF_REQUESTS = frozenset((
    "http.request.method", "http.method", "http.route", "http.response.status_code", "http.status_code", "url.scheme",
    "http.scheme",
))  # fmt: skip
_OF_SQL = frozenset((
    "db.system", "db.system.name", "db.statement", "db.query.text", "db.name", "db.namespace", "server.address",
    "server.port", "net.peer.name", "net.peer.port",
))  # fmt: skip
_OWN = frozenset((
    "gen_ai.operation.name", "gen_ai.request.model", "personaplug.persona", "personaplug.cached", "personaplug.items",
))  # fmt: skip


class PrivateExporter(SpanExporter):
    """Passes spans on without anything that callers chose, such as paths and headers, and without texts of errors.

    Statements outside of requests, such as those of the maintenance, are not passed on.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([_private(span) for span in spans if span.parent or _scope_of(span) != _SQL_SCOPE])

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _private(span: ReadableSpan) -> ReadableSpan:
    attributes, name, events = span.attributes or {}, span.name, list[Event]()
    if span.kind is SpanKind.SERVER:
        kept = _OF_REQUESTS
        method = attributes.get("http.request.method", attributes.get("http.method"))
        parts = (method if method in _METHODS else "HTTP", attributes.get("http.route"))
        name = " ".join(str(part) for part in parts if part)
    elif _scope_of(span) == _SQL_SCOPE:
        kept, name = _OF_SQL, span.name.partition(" ")[0]  # without the name of the database
    else:
        kept, events = _OWN, [Event(event.name, timestamp=event.timestamp) for event in span.events]
    return ReadableSpan(
        name,
        context=without_state(span.context),
        parent=span.parent and without_state(span.parent),
        resource=span.resource,
        attributes={key: value for key, value in attributes.items() if key in kept},
        events=events,
        kind=span.kind,
        instrumentation_scope=span.instrumentation_scope,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
    )


def _scope_of(span: ReadableSpan) -> str:
    return "" if span.instrumentation_scope is None else span.instrumentation_scope.name


def start_traces(app: FastAPI, store: HistoryStore) -> TracerProvider:
    """Trace an application and its store with the exporters that the environment names; return the provider."""
    provider = provider_for(*[BatchSpanProcessor(PrivateExporter(_open_exporter(name))) for name in _exporter_names()])
    trace.set_tracer_provider(provider)
    instrument(app, store, provider=provider)
    return provider


def provider_for(*processors: SpanProcessor) -> TracerProvider:
    """Return a provider whose service has the name in the environment or, by default, the package's name."""
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: SCOPE}))
    provider = TracerProvider(resource=resource)
    for processor in processors:
        provider.add_span_processor(processor)
    return provider


def instrument(app: FastAPI, store: HistoryStore, *, provider: TracerProvider) -> None:
    """Make spans of an application's requests, except checks and metrics, and of the statements of a store."""
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=provider, excluded_urls=_UNTRACED, exclude_spans=["receive", "send"]
    )
    # The instrumentation excludes SQLAlchemy 2.1 without need: its events are those of 2.0.
    SQLAlchemyInstrumentor().instrument(engine=store.database.engine(), tracer_provider=provider, skip_dep_check=True)


def _exporter_names() -> list[str]:
    """Return the names of entry points for the exporters in the environment."""
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    otlp = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    names = (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")
    return [otlp if name.strip() == "otlp" else name.strip() for name in names]


def _open_exporter(name: str) -> SpanExporter:
    found = entry_points(group=_EXPORTERS, name=name)
    if not found:
        known = ", ".join(sorted(each.name for each in entry_points(group=_EXPORTERS)))
        raise ConfigError(
            f"There is no exporter {name!r} for traces; installed are {known}. Change OTEL_TRACES_EXPORTER or "
            f"OTEL_EXPORTER_OTLP_PROTOCOL, or install the package opentelemetry-exporter-{name.replace('_', '-')}."
        )
    exporter: SpanExporter = next(iter(found)).load()()
    return exporter
