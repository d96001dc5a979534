"""What a server counts, for Prometheus: requests, time, personas. No user's id and no text is in any of it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Telemetry:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "personaplug_requests", "Requests, by route and status.", ("route", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "personaplug_request_seconds",
            "From a request's arrival to the first of its answer: of a stream, to its first event.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.personas = Counter(
            "personaplug_personas",
            "Answers, by what was applied (user, population, plain) and whether it was kept from before.",
            ("applied", "kept"),
            registry=self._registry,
        )
        self.running = Gauge("personaplug_running_requests", "Requests being answered.", registry=self._registry)
        self.kept_users = Gauge(
            "personaplug_kept_users", "Users whose personas are in memory.", registry=self._registry
        )
        self.kept_bytes = Gauge("personaplug_kept_bytes", "What these take.", registry=self._registry)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
