"""Figures of a served linker for Prometheus, and the middleware that counts requests."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GONE = 499
"""The status that is counted where nobody was there any more to be answered."""
_OTHER = "other"  # a path that no route has: its own label for each would let strangers fill the memory


class Figures:
    """What `/metrics` says."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        new: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("dsmip_requests", "Answered requests", ["path", "status"], **new)
        self.seconds = Histogram("dsmip_request_seconds", "Seconds to an answer", ["path"], buckets=_SECONDS, **new)
        self.batches = Histogram("dsmip_batch_mentions", "Mentions linked at a time", buckets=_BATCHES, **new)
        self.reloads = Counter("dsmip_reloads", "Times that the linker was opened again", **new)
        self.in_progress = Gauge("dsmip_requests_in_progress", "Requests that are being answered", **new)
        self.waiting = Gauge("dsmip_waiting_mentions", "Mentions that wait", **new)
        self.entities = Gauge("dsmip_entities", "Entities in the knowledge base", **new)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware: status and seconds of each answer, by the route that gave it."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self._app, self._figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._figures.in_progress.inc()
        started, status = time.perf_counter(), GONE

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counting)
        finally:
            self._figures.in_progress.dec()
            path = getattr(scope.get("route"), "path", _OTHER)
            self._figures.requests.labels(path, str(status)).inc()
            self._figures.seconds.labels(path).observe(time.perf_counter() - started)
