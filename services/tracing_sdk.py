"""What services/tracing.py does through OpenTelemetry: the only file that imports it."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog
from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from tutelage_client.errors import TutelageError

from services.tracing import Attributes, Kind, ids

_KINDS: dict[Kind, SpanKind] = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}
# What a caller did wrong, or chose, is no error of the server that says so.
_CALLERS = frozenset(
    {
        "INVALID_ARGUMENT",
        "FAILED_PRECONDITION",
        "NOT_FOUND",
        "UNAUTHENTICATED",
        "RESOURCE_EXHAUSTED",
        "CANCELLED",
    }
)
# A step ends for all its groups at once, so OpenTelemetry's 2,048 would not hold the spans of a large one.
_WAITING_SPANS = 8_192
_EXPORTER_LOG = "opentelemetry.exporter.otlp.proto.grpc.exporter"

_log = structlog.get_logger(__name__)


class Tracer:
    """Makes spans and sends them, in batches and from a thread of its own."""

    def __init__(self, service: str, instance: str) -> None:
        self._ids = _Ids()
        self._exporter = _Reporting(OTLPSpanExporter())
        self._provider = TracerProvider(
            id_generator=self._ids, resource=_resource(service, instance), shutdown_on_exit=False
        )
        size = None if os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") else _WAITING_SPANS
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter, max_queue_size=size))
        self._tracer = self._provider.get_tracer("tutelage")

    def stop(self, seconds: float) -> None:
        """Send what is left; what cannot be sent in time is lost."""
        # OpenTelemetry's own shutdown would wait half a minute for a collector that is away.
        sending = threading.Thread(target=self._provider.force_flush, name="last-spans", daemon=True)
        sending.start()
        sending.join(seconds)
        if sending.is_alive():
            _log.warning("traces_cut_short", seconds=seconds)
            self._exporter.shutdown()
        else:
            self._provider.shutdown()

    @contextmanager
    def span(
        self, name: str, parent: str | None, state: str, kind: Kind, attributes: Attributes | None
    ) -> Iterator[_Span]:
        """See services/tracing.py::span."""
        span = self._tracer.start_span(name, _context(parent, state), _KINDS[kind], attributes)
        live = _Span(span, kind)
        token = attach(trace.set_span_in_context(span))
        try:
            yield live
        except TutelageError as error:
            live.fail(error.code, error.message)
            raise
        except asyncio.CancelledError:
            live.fail("CANCELLED")
            raise
        except Exception as error:
            live.fail(type(error).__name__)
            raise
        finally:
            detach(token)
            span.end()

    def record(
        self,
        name: str,
        times_ns: tuple[int, int],
        *,
        parent: str | None,
        itself: str | None,
        kind: Kind,
        attributes: Attributes | None,
        links: Sequence[str],
        error: tuple[str, str] | None,
        event: str | None,
    ) -> None:
        """See services/tracing.py::record."""
        began, ended = times_ns
        linked = [Link(other) for link in links if (other := _span_context(link))]
        with self._ids.given(itself):
            context = Context() if itself else _context(parent)
            span = self._tracer.start_span(name, context, _KINDS[kind], attributes, linked, start_time=began)
        if event is not None:
            span.add_event(event, timestamp=ended)
        if error is not None:
            _Span(span, kind).fail(*error)
        span.end(ended)

    def current(self) -> str:
        """Traceparent of the span around this, "" when there is none."""
        found = trace.get_current_span().get_span_context()
        if not found.is_valid:
            return ""
        return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"

    def samples(self, trace_id: str) -> bool:
        """Whether the root of that trace is recorded."""
        decided = self._provider.sampler.should_sample(None, int(trace_id, 16), "rollout")
        return decided.decision is Decision.RECORD_AND_SAMPLE


class _Span:
    """A span that is recorded, or that was not sampled."""

    def __init__(self, span: trace.Span, kind: Kind) -> None:
        self._span = span
        self._kind = kind

    def name(self, name: str) -> None:
        self._span.update_name(name)

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, attributes)

    def fail(self, code: str, message: str = "") -> None:
        self._span.set_attribute("error.type", code)
        if self._kind != "server" or code not in _CALLERS:
            self._span.set_status(Status(StatusCode.ERROR, f"{code}: {message}" if message else code))


class _Ids(IdGenerator):
    """Random ids, or given ones for a root span whose traceparent was handed out before.

    Never from Python's global generator: tracing must not change what a seeded run draws.
    """

    def __init__(self) -> None:
        self._random = random.Random()
        self._given = threading.local()

    @contextmanager
    def given(self, traceparent: str | None) -> Iterator[None]:
        """The next span of this thread is the one of `traceparent`."""
        found = ids(traceparent) if traceparent else None
        self._given.ids = found and (int(found[0], 16), int(found[1], 16))
        try:
            yield
        finally:
            self._given.ids = None

    def generate_trace_id(self) -> int:
        given: tuple[int, int] | None = getattr(self._given, "ids", None)
        return given[0] if given else self._random.getrandbits(128) or 1

    def generate_span_id(self) -> int:
        given: tuple[int, int] | None = getattr(self._given, "ids", None)
        return given[1] if given else self._random.getrandbits(64) or 1


class _Reporting(SpanExporter):
    """Says once that spans cannot be sent, and once that they can again; the library would go on about it."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._lost = 0
        self._reason = _LastWords()
        logging.getLogger(_EXPORTER_LOG).addFilter(self._reason)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                _log.warning("traces_not_sent", reason=self._reason.text, hint="all other work goes on")
            self._lost += len(spans)
        elif self._lost:
            _log.info("traces_sent_again", lost=self._lost)
            self._lost = 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastWords(logging.Filter):
    """Keeps the newest message of a logger, and prints none."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.text = record.getMessage()
        return False


def _resource(service: str, instance: str) -> Resource:
    """What every span says about its process; what OTEL_* variables say comes first."""
    own: dict[str, str | int] = {
        "service.name": service,
        "service.instance.id": instance,
        "process.pid": os.getpid(),
    }
    pairs = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")
    given = {pair.partition("=")[0].strip() for pair in pairs}
    if os.environ.get("OTEL_SERVICE_NAME"):
        given.add("service.name")
    return Resource.create({name: value for name, value in own.items() if name not in given})


def _context(parent: str | None, state: str = "") -> Context | None:
    """Where a new span belongs; None means the span around it."""
    if parent is None:
        return None
    remote = _span_context(parent, state)
    if remote is None:
        return Context()
    return trace.set_span_in_context(trace.NonRecordingSpan(remote), Context())


def _span_context(traceparent: str, state: str = "") -> SpanContext | None:
    found = ids(traceparent)
    if found is None:
        return None
    trace_id, span_id, flags = (int(digits, 16) for digits in found)
    trace_state = TraceState.from_header([state]) if state else None
    return SpanContext(trace_id, span_id, True, TraceFlags(flags), trace_state)
