"""Server spans of direct calls: they join the caller's trace when it sends a W3C traceparent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tutelage_client.errors import TutelageError

from services import tracing

_TRACED_PATHS = "/v1/"  # not the probes, and not what scrapes metrics
_FIRST_SERVER_ERROR = 500


@contextmanager
def rpc_span(method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[None]:
    """One gRPC call, named `package.Service/Method`; names and attributes by OpenTelemetry's conventions."""
    if not tracing.enabled():
        yield
        return
    sent = {name: value for name, value in metadata or () if isinstance(value, str)}
    with tracing.span(
        method,
        parent=sent.get("traceparent", ""),
        state=sent.get("tracestate", ""),
        kind="server",
        attributes={"rpc.system.name": "grpc", "rpc.method": method},
    ) as span:
        try:
            yield
        except TutelageError as error:
            span.set({"rpc.response.status_code": error.code})
            raise
        span.set({"rpc.response.status_code": "OK"})


class HttpSpans:
    """ASGI middleware: one span for each call of the contract."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_TRACED_PATHS) or not tracing.enabled():
            await self._app(scope, receive, send)
            return
        sent = {name: value.decode("latin-1") for name, value in scope["headers"]}
        # Only routes are names: a caller who makes up paths must not make up span names.
        with tracing.span(
            scope["method"],
            parent=sent.get(b"traceparent", ""),
            state=sent.get(b"tracestate", ""),
            kind="server",
            attributes={
                "http.request.method": scope["method"],
                "url.scheme": scope["scheme"],
                "url.path": scope["path"],
                "network.protocol.version": scope["http_version"],
            },
        ) as span:
            await self._app(scope, receive, _noting(span, scope, send))


def _noting(span: tracing.Span, scope: Scope, send: Send) -> Send:
    """`send` that tells the span how the request was answered."""

    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.set({"http.response.status_code": message["status"]})
            if (route := getattr(scope.get("route"), "path", None)) is not None:
                span.name(f"{scope['method']} {route}")
                span.set({"http.route": route})
            if message["status"] >= _FIRST_SERVER_ERROR:
                span.fail(str(message["status"]))
        await send(message)

    return noted
