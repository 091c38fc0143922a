"""A small HTTP port of a process that serves nothing else: /health, and whatever figures its owner has.

It answers from threads of its own, so that neither a long step nor a busy event loop delays an answer.
"""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from tutelage_client.errors import TutelageError

from services.access import LOOPBACK, OPEN_PATHS, TokenCheck

PLAIN = "text/plain; charset=utf-8"
REQUEST_SECONDS = 10.0  # from the first byte asked to the last one answered, however slow the caller is
MAX_CALLERS = 16  # at once; more are turned away

Page = Callable[[], tuple[str, bytes]]  # content type and body
log = structlog.get_logger(__name__)


class MetricsServer:
    """Serves `pages`, and /health with "ok"; everything but the probes asks for a token where there is one.

    Args:
        port: 0 takes a free one, see `address`.

    Raises:
        TutelageError: UNAVAILABLE, cannot listen there.
    """

    def __init__(
        self,
        pages: Mapping[str, Page],
        *,
        host: str = LOOPBACK,
        port: int = 0,
        tokens: TokenCheck | None = None,
    ) -> None:
        self._pages: dict[str, Page] = {"/health": lambda: (PLAIN, b"ok\n"), **pages}
        self._tokens = tokens or TokenCheck(())
        self._host = host
        try:
            self._server = (_Server6 if ":" in host else _Server)((host, port), self._handler())
        except OSError as error:
            message = f"metrics: cannot listen on {host}:{port}: {error.strerror or error}"
            raise TutelageError("UNAVAILABLE", message) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True
        )

    @property
    def address(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, authorization: str | None) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body of a GET."""
        if path not in OPEN_PATHS and not self._tokens.allows(authorization):
            return HTTPStatus.UNAUTHORIZED, PLAIN, b"authorization: got no accepted bearer token\n"
        page = self._pages.get(path)
        if page is None:
            return HTTPStatus.NOT_FOUND, PLAIN, f"have {', '.join(sorted(self._pages))}\n".encode()
        try:
            return HTTPStatus.OK, *page()
        except Exception:
            log.exception("page_failed", path=path)
            return HTTPStatus.INTERNAL_SERVER_ERROR, PLAIN, b"failed; the log of this process says why\n"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                status, content_type, body = server.answer(path, self.headers.get("Authorization"))
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                if status is HTTPStatus.UNAUTHORIZED:
                    self.send_header("WWW-Authenticate", "Bearer")
                self.end_headers()
                self.wfile.write(body)

            def version_string(self) -> str:
                return "tutelage"

            def log_message(self, format: str, *arguments: object) -> None:
                """Scrapes are not worth a line each."""

        return Handler


def metrics_page(registry: CollectorRegistry) -> Page:
    """The text format that Prometheus scrapes."""
    return lambda: (CONTENT_TYPE_LATEST, generate_latest(registry))


class _Server(ThreadingHTTPServer):
    """At most MAX_CALLERS threads, and no name look-up at the start, which may take seconds.

    A socket's timeout would begin anew with every byte, so a caller that trickles could keep its thread for
    ever: whoever is not done after REQUEST_SECONDS is cut off from outside.
    """

    daemon_threads = True
    request_queue_size = 2 * MAX_CALLERS

    def __init__(self, *arguments: Any) -> None:
        self._room = threading.BoundedSemaphore(MAX_CALLERS)
        self._deadlines: dict[socket.socket, float] = {}
        super().__init__(*arguments)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._deadlines[request] = time.monotonic() + REQUEST_SECONDS
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines.pop(request, None)
            self._room.release()

    def service_actions(self) -> None:
        """Between any two polls: wake the threads of callers that are out of time."""
        now = time.monotonic()
        for request, deadline in list(self._deadlines.items()):
            if now >= deadline:
                with suppress(OSError):  # it has just ended by itself
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away half-way is not worth a traceback."""


class _Server6(_Server):
    address_family = socket.AF_INET6
