"""The trainer's small HTTP port, on loopback only: /health, /status (JSON), /metrics (Prometheus)."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST


class StatusServer:
    """Serves the newest figures from a thread, so that a long step does not delay an answer.

    Args:
        port: loopback port; 0 takes a free one, see `address`.
    """

    def __init__(self, port: int) -> None:
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._status: dict[str, Any] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="status", daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def update(self, figures: Mapping[str, Any]) -> None:
        """Replace the values of these names; numbers become gauges tutelage_trainer_NAME."""
        self._status = self._status | dict(figures)
        for name, value in figures.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._gauge(name).set(value)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(
                f"tutelage_trainer_{name}", f"Newest {name} of the trainer.", registry=self._registry
            )
        return self._gauges[name]

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body of a GET."""
        if path == "/health":
            return HTTPStatus.OK, "text/plain; charset=utf-8", b"ok\n"
        if path == "/status":
            return HTTPStatus.OK, "application/json", json.dumps(self._status).encode()
        if path == "/metrics":
            return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        return HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"have /health, /status, /metrics\n"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content_type, body = server.answer(self.path.partition("?")[0])
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Scrapes are not worth a line each."""

        return Handler
