"""A collector of OpenTelemetry traces that keeps spans in memory: OTLP over gRPC, and nothing else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

_KINDS = {value: name.removeprefix("SPAN_KIND_").lower() for name, value in trace_pb2.Span.SpanKind.items()}


@dataclass(frozen=True, slots=True)
class Span:
    """One span as it arrived; ids are hexadecimal digits, times unix nanoseconds."""

    trace: str
    id: str
    parent: str  # "" for the root of a trace
    name: str
    kind: str
    service: str
    instance: str
    began: int
    ended: int
    attributes: Mapping[str, Any]
    events: tuple[str, ...]
    links: tuple[str, ...]  # traces
    error: str  # "" when there was none
    state: str = ""  # tracestate


class Collector(TraceServiceServicer):  # type: ignore[misc]
    """Listens on a port of loopback while its context is open."""

    def __init__(self, port: int = 0) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4))
        add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"

    def Export(
        self, request: service.ExportTraceServiceRequest, context: object
    ) -> service.ExportTraceServiceResponse:
        """One batch of one process."""
        arrived = [
            _span(span, _values(resource.resource.attributes))
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += arrived
        return service.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        """Everything that has arrived."""
        with self._lock:
            return list(self._spans)

    def named(self, name: str, where: Callable[[Span], bool] = lambda _span: True) -> list[Span]:
        """Spans of a name, in the order in which they began."""
        return sorted((s for s in self.spans if s.name == name and where(s)), key=lambda span: span.began)

    def traces(self) -> dict[str, list[Span]]:
        """Spans by trace, each in the order in which they began."""
        found: dict[str, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: span.began):
            found.setdefault(span.trace, []).append(span)
        return found

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()


def _span(span: trace_pb2.Span, resource: Mapping[str, Any]) -> Span:
    failed = span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    return Span(
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        name=span.name,
        kind=_KINDS[span.kind],
        service=resource.get("service.name", ""),
        instance=resource.get("service.instance.id", ""),
        began=span.start_time_unix_nano,
        ended=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        events=tuple(event.name for event in span.events),
        links=tuple(link.trace_id.hex() for link in span.links),
        error=(span.status.message or "error") if failed else "",
        state=span.trace_state,
    )


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair) for pair in pairs}


def _value(pair: KeyValue) -> Any:
    kind = pair.value.WhichOneof("value")
    return getattr(pair.value, kind) if kind else None


if __name__ == "__main__":
    with Collector() as listening:
        print(listening.endpoint, flush=True)
        sys.stdin.read()
