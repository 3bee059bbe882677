"""What the service counts, in the text form of Prometheus: its own registry, and labels of a closed set.

    >>> metrics = Metrics(clock=lambda: 7.0)
    >>> metrics.answered("/etc/passwd", "usage", 0.002)
    >>> print(*(line for line in metrics.text().splitlines() if line.startswith("isolate_request_seconds_sum")))
    isolate_request_seconds_sum{route="unknown"} 0.002

No label holds what a peer chose: no job, asset, digest, address or name. Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from isolate.service.routes import ROUTES

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FILES = ("health", "metrics", "openapi", "tiles")  # what is read with GET
UNKNOWN = "unknown"
LIMITS = ("rate", "connections", "busy", "size", "time")
MAX_CODES = 192  # label values; docs/errors.md lists fewer

_CODE = re.compile(r"[a-z0-9_]{1,64}")
# Seconds. A commit with full sync takes 1 to 50 ms, and a client gives up after 30 s.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The figures of one service. ``clock``: monotonic seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._codes: set[str] = set()
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self._requests = Counter(
            "isolate_requests", "Requests that were answered", ["route", "code"], registry=registry
        )
        self._seconds = Histogram(
            "isolate_request_seconds",
            "From the end of a request's head to its answer",
            ["route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._limited = Counter(
            "isolate_limited", "Requests and connections that met a limit", ["limit"], registry=registry
        )
        for limit in LIMITS:
            self._limited.labels(limit)
        self.connections = Gauge("isolate_connections", "Open connections", registry=registry)
        self.begun = Gauge("isolate_requests_begun", "Requests in a worker, or waiting for one", registry=registry)
        self.log_entries = Gauge("isolate_log_entries", "Entries of the transparency log", registry=registry)
        self.time = Gauge("isolate_time_seconds", "What the service takes for the unix time", registry=registry)
        self.skew = Gauge(
            "isolate_clock_skew_seconds", "How far the machine's clock went from the service's", registry=registry
        )
        self.certificate_end = Gauge(
            "isolate_certificate_end_seconds",
            "Unix time at which the service's certificate ends",
            registry=registry,
        )
        self._uptime = Gauge("isolate_uptime_seconds", "Since the start", registry=registry)

    def answered(self, route: str, code: str, seconds: float) -> None:
        """One request. Routes that the table does not have, and codes that are none, count as ``unknown``."""
        route = route if route in ROUTES or route in FILES else UNKNOWN
        if code not in self._codes:
            if len(self._codes) < MAX_CODES and _CODE.fullmatch(code):
                self._codes.add(code)
            else:
                code = UNKNOWN
        self._requests.labels(route, code).inc()
        self._seconds.labels(route).observe(seconds)

    def limited(self, limit: str) -> None:
        self._limited.labels(limit if limit in LIMITS else UNKNOWN).inc()

    def text(self) -> str:
        """What Prometheus reads."""
        self._uptime.set(self._clock() - self._began)
        return generate_latest(self._registry).decode("utf-8")
