"""Traces of the server: one trace for each request, its own spans, and no user id and no user text in any span."""

from __future__ import annotations

import http.server
import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI
from live_server import open_service, running, served
from postgres_server import PostgresServer
from stores import ENCODER, SECRET, item
from vllm_stand_in import StandIn

from personaplug.errors import ConfigError, PersonaPlugError
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.app import _trace, create_app, server_config
from personaplug.serving.engines.base import EngineReply, EngineRequest
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_requests import EmbeddingTable
from personaplug.serving.persona_cache import Persona
from personaplug.serving.service import Service
from personaplug.serving.spans import are_traces_wanted
from personaplug.store.database import execute
from personaplug.store.history_store import HistoryStore

pytest.importorskip("opentelemetry.instrumentation.sqlalchemy", reason="needs the extra `traces`")

from opentelemetry import trace
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once

from personaplug.serving.traces import PrivateExporter, instrument, provider_for, start_traces

USER = "zoë/of-a-secret-name"
TEXT = "a-marker-of-a-users-own-words"
PROMPT = f"How would the user rate this? review: {TEXT}"
WRITTEN = [USER, quote(USER, safe=""), quote(USER), "of-a-secret-name", TEXT]


@dataclass
class Traced:
    """A traced server; `exported` has the spans that leave it, `raw` those of the standard instrumentation."""

    url: str
    service: Service
    exported: InMemorySpanExporter
    raw: InMemorySpanExporter

    def spans(self) -> list[ReadableSpan]:
        return list(self.exported.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans() if span.name == name]
        return span

    def ask(self, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": PROMPT}], "user": USER, "max_tokens": 4} | fields
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)


def _texts(exporter: InMemorySpanExporter) -> str:
    """Return all that the spans hold."""
    spans = exporter.get_finished_spans()
    others = [f"{span.context} {span.parent} {span.links}" for span in spans]
    decoded = [json.dumps(json.loads(span.to_json()), ensure_ascii=False) for span in spans]
    return "\n".join([*others, *decoded])


@pytest.fixture
def no_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore OpenTelemetry's global state after the test."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    yield
    with suppress(Exception):
        SQLAlchemyInstrumentor().uninstrument()


@contextmanager
def _traced(service: Service) -> Iterator[Traced]:
    """Serve with traces. All spans have ended after the block, but perhaps not when the client has the reply."""
    exported, raw = InMemorySpanExporter(), InMemorySpanExporter()
    provider = provider_for(SimpleSpanProcessor(PrivateExporter(exported)), SimpleSpanProcessor(raw))
    trace.set_tracer_provider(provider)
    app = create_app(service)
    instrument(app, service.store, provider=provider)
    with running(server_config(app, timeout_graceful_shutdown=10)) as url:
        exported.clear()
        yield Traced(url, service, exported, raw)


@pytest.fixture
def service(toy: CausalLM, tmp_path: Path, no_provider: None) -> Service:
    return open_service(toy, tmp_path)


def test_a_request_is_one_trace_with_its_persona_answer_and_statements(service: Service) -> None:
    with _traced(service) as traced:
        caller = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
        body = {"messages": [{"role": "user", "content": PROMPT}], "user": USER, "personaplug": {"free": True}}
        httpx.post(
            f"{traced.url}/v1/chat/completions", json=body | {"max_tokens": 4}, headers=caller
        ).raise_for_status()
    request, persona, answer = map(traced.named, ("POST /v1/chat/completions", "persona", "chat toy"))
    assert request.context.trace_id == int("ab" * 16, 16)
    assert {span.context.trace_id for span in traced.spans()} == {request.context.trace_id}
    for span in (persona, answer):
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
    assert dict(persona.attributes or {}) == {
        "personaplug.persona": "population",
        "personaplug.cached": False,
        "personaplug.items": 0,
    }
    assert dict(answer.attributes or {}) == {"gen_ai.operation.name": "chat", "gen_ai.request.model": "toy"}
    assert dict(request.attributes or {})["http.route"] == "/v1/chat/completions"
    statements = [str((span.attributes or {}).get("db.statement", "")) for span in traced.spans()]
    assert any(statement.startswith("SELECT") and "user_id" in statement for statement in statements)


def test_a_stream_has_its_first_token_and_a_cached_persona_says_so(service: Service) -> None:
    with _traced(service) as traced:
        item = {"id": "1", "text": TEXT, "score": "4"}
        httpx.post(f"{traced.url}/v1/users/{quote(USER, safe='')}/history", json={"items": [item]}).raise_for_status()
        options = {"stream": True, "personaplug": {"free": True}}
        assert traced.ask(**options).status_code == traced.ask(**options).status_code == 200
    personas = [span for span in traced.spans() if span.name == "persona"]
    assert [dict(span.attributes or {})["personaplug.cached"] for span in personas] == [False, True]
    answers = [span for span in traced.spans() if span.name == "chat toy"]
    for answer in answers:
        (event,) = answer.events
        assert event.name == "first token"
        assert answer.start_time is not None
        assert answer.end_time is not None
        assert answer.start_time < event.timestamp < answer.end_time
    assert len(answers) == 2


def test_checks_and_metrics_are_not_traced(service: Service) -> None:
    with _traced(service) as traced:
        for path in ("health", "ready", "metrics", "metrics?of=all"):
            httpx.get(f"{traced.url}/{path}").raise_for_status()
        traced.service.store.maintain()  # its statements belong to no request
    assert traced.spans() == []
    assert traced.raw.get_finished_spans() != ()


def test_no_span_holds_a_user_or_a_text(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with _traced(service) as traced:
        _write_everywhere(traced, monkeypatch)
    names = {span.name for span in traced.spans()}
    assert {"GET /v1/users/{user}/history", "DELETE /v1/users/{user}", "POST /v1/chat/completions"} <= names
    raw, exported = _texts(traced.raw), _texts(traced.exported)
    for written in WRITTEN:
        assert written not in exported
    assert quote(USER) in raw or USER in raw, "the standard instrumentation records ids, so the test can fail"
    assert TEXT in raw
    assert "of-a-secret-name" in raw


def _write_everywhere(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the user and the text in each place of a request."""
    url, user = traced.url, f"{traced.url}/v1/users/{quote(USER, safe='')}"
    item = {"id": USER, "text": TEXT, "score": "4", "date": "2026-01-01"}
    named = {"X-Personaplug-User": quote(USER, safe=""), "User-Agent": "of-a-secret-name", "baggage": f"user={TEXT}"}
    named |= {"tracestate": "app=of-a-secret-name", "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", f"{user}/history", {"json": {"items": [item]}}),
        ("POST", f"{user}/history", {"json": {"items": [item | {"score": TEXT}]}}),  # refused
        ("POST", f"{user}/history", {"content": f'{{"{TEXT}', "headers": {"Content-Type": "application/json"}}),
        ("GET", f"{user}/history?latest={TEXT}", {}),  # refused
        ("GET", f"{user}/history", {}),
        ("GET", f"{user}/export", {}),
        ("GET", f"{user}/drift?since=2026-01-01&until=2026-02-01&note={TEXT}", {}),
        ("POST", f"{user}/explain", {"json": {"prompt": PROMPT, "answer": "4"}}),
        ("PUT", f"{user}/preferences", {"json": {"preferences": [TEXT]}}),
        ("GET", f"{url}/v1/personas?trail={quote(USER)}", {}),
        ("GET", f"{url}/v1/users/{quote(USER)}/{TEXT}", {}),  # no such route
        ("PATCH", f"{user}/history", {}),  # no such method
        ("GET", f"{url}/v1/models/{TEXT}", {}),
        ("DELETE", f"{user}/history/{quote(USER, safe='')}", {}),
        ("DELETE", user, {}),
    ]
    for method, address, options in requests:
        headers = named | options.pop("headers", {})
        httpx.request(method, address, headers=headers, timeout=60, **options)
    for stream in (False, True):
        traced.ask(stream=stream, messages=[{"role": "user", "content": TEXT}])
        traced.ask(stream=stream, model=USER)
    _fail(traced.service, monkeypatch)
    assert traced.ask().status_code == 500
    httpx.get(f"{user}/history", headers={"Host": f"{TEXT}.example.org"})


def _fail(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def respond(request: EngineRequest) -> EngineReply:
        raise ValueError(f"{TEXT} {USER}")

    monkeypatch.setattr(service.engine, "respond", respond)


def _fail_persona(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def persona(*arguments: object, **settings: object) -> Persona:
        raise ValueError(f"{TEXT} {USER}")

    monkeypatch.setattr(service.personas, "persona", persona)


def test_a_failed_statement_tells_no_values(postgres: PostgresServer, no_provider: None) -> None:
    exported, raw = InMemorySpanExporter(), InMemorySpanExporter()
    provider = provider_for(SimpleSpanProcessor(PrivateExporter(exported)), SimpleSpanProcessor(raw))
    store = HistoryStore.open(postgres.cleaned_database(), ENCODER, secret=SECRET)
    instrument(FastAPI(), store, provider=provider)
    with provider.get_tracer("test").start_as_current_span("request"):
        store.add(store.admit("shop", USER), [item("1", TEXT)])
        with pytest.raises(PersonaPlugError), store.database.write_transaction() as connection:
            execute(connection, "INSERT INTO users_0000 (tenant, user_id) VALUES ('shop', :user)", {"user": USER})
    store.close()
    assert "Failing row contains" in _texts(raw)
    assert USER in _texts(raw)
    assert not any(written in _texts(exported) for written in WRITTEN)
    assert any(not span.status.is_ok for span in exported.get_finished_spans())


def test_provider_of_another_program_gets_no_span_with_a_user(
    toy: CausalLM, tmp_path: Path, no_provider: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    service = open_service(toy, tmp_path)
    with served(service) as url:
        httpx.get(f"{url}/v1/users/{quote(USER, safe='')}/history?latest=5").raise_for_status()
        body = {"messages": [{"role": "user", "content": PROMPT}], "user": USER}
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
        _fail(service, monkeypatch)
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 500
        _fail_persona(service, monkeypatch)
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 500
    failed = [span.name for span in exporter.get_finished_spans() if not span.status.is_ok]
    assert failed == ["chat toy", "persona"]
    assert {span.name for span in exporter.get_finished_spans()} == {"persona", "chat toy"}  # none by FastAPI itself
    assert not any(written in _texts(exporter) for written in WRITTEN)


def test_vllm_continues_the_trace_of_the_answer(
    stand_in: StandIn, address: str, toy: CausalLM, tmp_path: Path, no_provider: None
) -> None:
    table = EmbeddingTable(toy.embed.weight.detach(), toy.prompt_tokenizer.tokenizer)
    width = toy.identity.width
    engine = VLLMEngine(address, table=table, width=width, placement="suffix")
    with _traced(open_service(toy, tmp_path, engine=engine)) as traced:
        turns = [{"role": "user", "content": "review: x"}]
        body = {"messages": turns, "personaplug": {"free": True}}
        caller = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": f"app={TEXT}", "baggage": f"app={TEXT}"}
        httpx.post(f"{traced.url}/v1/chat/completions", json=body, headers=caller, timeout=60).raise_for_status()
    (answer,) = [span for span in traced.spans() if span.name.startswith("chat ")]
    sent = {name.lower(): value for name, value in stand_in.headers[-1].items()}
    assert sent.keys().isdisjoint(("tracestate", "baggage"))
    assert sent["traceparent"].split("-")[1:3] == [f"{answer.context.trace_id:032x}", f"{answer.context.span_id:016x}"]


class _Collector(http.server.BaseHTTPRequestHandler):
    """Receives spans by OTLP, as a collector does."""

    received: list[bytes]

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_standard_variables_send_spans_to_a_collector(
    toy: CausalLM, tmp_path: Path, no_provider: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[bytes] = []
    handler = type("Handler", (_Collector,), {"received": received})
    collector = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    service = open_service(toy, tmp_path)
    app = create_app(service)
    provider = start_traces(app, service.store)
    with running(server_config(app, timeout_graceful_shutdown=10)) as url:
        httpx.get(f"{url}/v1/users/{quote(USER, safe='')}/history").raise_for_status()
    provider.shutdown()
    collector.shutdown()
    collector.server_close()
    resources = [each for body in received for each in ExportTraceServiceRequest.FromString(body).resource_spans]
    names = {span.name for resource in resources for scope in resource.scope_spans for span in scope.spans}
    assert {"GET /v1/users/{user}/history", "connect", "SELECT"} <= names
    attributes = [each for resource in resources for each in resource.resource.attributes]
    assert {each.value.string_value for each in attributes if each.key == "service.name"} == {"personaplug"}
    assert not any(written.encode() in body for written in WRITTEN for body in received)


def test_unknown_exporter_is_refused(
    toy: CausalLM, tmp_path: Path, no_provider: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    service = open_service(toy, tmp_path)
    with pytest.raises(ConfigError, match=r"no exporter 'zipkin' for traces; installed are .*console"):
        start_traces(create_app(service), service.store)


def test_server_without_the_extra_warns_and_serves(
    toy: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.delitem(sys.modules, "personaplug.serving.traces")
    service = open_service(toy, tmp_path)
    with caplog.at_level(logging.WARNING):
        _trace(create_app(service), service)
    assert "no traces: a trace needs the extra 'traces'" in caplog.text


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_traces_start_only_when_the_variables_name_a_place(variables: dict[str, str], expected: bool) -> None:
    assert are_traces_wanted(variables) is expected
