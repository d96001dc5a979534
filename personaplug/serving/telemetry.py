"""Prometheus metrics of a server: requests, times, personas. Metrics contain no user ids and no user texts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Telemetry:
    """The metrics of one server, in a separate registry."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "personaplug_requests",
            "Requests, by route, status and, if a model answers them, the name of the model.",
            ("route", "status", "model"),
            registry=registry,
        )
        self.seconds = Histogram(
            "personaplug_request_seconds",
            "Seconds from a request's arrival to the first byte of the reply's body.",
            ("route", "model"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.personas = Counter(
            "personaplug_personas",
            "Replies, by the persona applied (user, population, plain), whether it was cached, and the model's name.",
            ("applied", "cached", "model"),
            registry=registry,
        )
        self.running = Gauge("personaplug_running_requests", "Running requests to /v1/.", registry=registry)
        self.closed_connections = Counter(
            "personaplug_closed_connections",
            "Connections closed by the server, by reason.",
            ("reason",),
            registry=registry,
        )
        self.cached_users = Gauge(
            "personaplug_cached_users", "Users in the persona cache of a model.", ("model",), registry=registry
        )
        self.cached_bytes = Gauge(
            "personaplug_cached_bytes", "Bytes in the persona cache of a model.", ("model",), registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
