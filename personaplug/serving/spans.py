"""The server's own spans: what the standard instrumentation of OpenTelemetry cannot tell.

They hold no user ids and no user texts. Without a tracer provider they do nothing (see `serving/traces.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from personaplug.serving.engines.base import EngineReply, EventStream
from personaplug.serving.openai_protocol import Kind
from personaplug.serving.persona_cache import Persona
from personaplug.serving.reply_texts import text_of_event

SCOPE = "personaplug"
FIRST_TOKEN = "first token"

_OPERATIONS: dict[Kind, str] = {"chat": "chat", "completion": "text_completion"}  # OpenTelemetry's names


def are_traces_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether OpenTelemetry's standard variables ask for traces: whether they name an exporter or an address."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    addresses = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    is_named = bool(exporter) or any(environment.get(name) for name in addresses)
    return is_named and exporter != "none" and environment.get("OTEL_SDK_DISABLED", "").lower() != "true"


def without_state(context: SpanContext) -> SpanContext:
    """Return a context without `tracestate`, which is a text of the caller."""
    return SpanContext(context.trace_id, context.span_id, context.is_remote, context.trace_flags)


def trace_headers() -> dict[str, str]:
    """Return headers with which another server continues the trace, without the caller's `tracestate` and `baggage`."""
    headers: dict[str, str] = {}
    current = NonRecordingSpan(without_state(trace.get_current_span().get_span_context()))
    TraceContextTextMapPropagator().inject(headers, trace.set_span_in_context(current))
    return headers


@contextmanager
def _marking_errors(span: Span) -> Iterator[None]:
    """Give a span an error status if the block fails, without the error's text, which may quote a user's."""
    try:
        yield
    except Exception:
        span.set_status(StatusCode.ERROR)
        raise


class PersonaSpan:
    """The span in which a request waits for its persona, computed or read from the cache."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[PersonaSpan]:
        tracer = trace.get_tracer(SCOPE)
        with (
            tracer.start_as_current_span("persona", record_exception=False, set_status_on_exception=False) as span,
            _marking_errors(span),
        ):
            yield cls(span)

    def describe(self, persona: Persona) -> None:
        self._span.set_attribute("personaplug.persona", persona.applied)
        self._span.set_attribute("personaplug.cached", persona.cached)
        self._span.set_attribute("personaplug.items", persona.items)


class AnswerSpan:
    """The span of an answer, from its submission to the engine until its last event.

    Args:
        model: a name that `GET /v1/models` lists.
    """

    def __init__(self, kind: Kind, *, model: str) -> None:
        operation = _OPERATIONS[kind]
        attributes = {"gen_ai.operation.name": operation, "gen_ai.request.model": model}
        self._span = trace.get_tracer(SCOPE).start_span(f"{operation} {model}", attributes=attributes)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the span the current one; it ends if the block fails."""
        try:
            with (
                trace.use_span(self._span, record_exception=False, set_status_on_exception=False),
                _marking_errors(self._span),
            ):
                yield
        except BaseException:
            self._span.end()
            raise

    def end_with(self, reply: EngineReply) -> EngineReply:
        """Return the reply; the span ends now or, if the reply is a stream, when the stream ends."""
        if isinstance(reply.body, bytes):
            self._span.end()
            return reply
        return EngineReply(_TracedStream(reply.body, self._span), reply.status, reply.headers)


class _TracedStream(EventStream):
    """Forwards events, notes the first one with a text in a span, and ends the span."""

    def __init__(self, stream: EventStream, span: Span) -> None:
        self._stream, self._span = stream, span
        self._has_text = not span.is_recording()

    async def __anext__(self) -> bytes:
        event = await anext(self._stream)
        if not self._has_text and text_of_event(event):
            self._has_text = True
            self._span.add_event(FIRST_TOKEN)
        return event

    async def aclose(self) -> None:
        self._span.end()
        await self._stream.aclose()
