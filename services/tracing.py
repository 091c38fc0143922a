"""Spans around the work of every process: OpenTelemetry when the OTEL_* variables ask for it, else nothing.

Nothing here imports OpenTelemetry; `start` loads services/tracing_sdk.py when tracing is wanted. While it
is off a span is one shared object that does nothing.

A trace is named by W3C traceparents, `00-TRACE-SPAN-FLAGS`, wherever it passes from one process to another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol

from tutelage_client.errors import TutelageError, invalid, shown

if TYPE_CHECKING:
    from services.tracing_sdk import Tracer

Kind = Literal["internal", "server", "producer", "consumer"]
Attributes = Mapping[str, str | bool | int | float]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
STOP_SECONDS = 3.0


class Span(Protocol):
    """What a piece of work may say about itself."""

    def name(self, name: str) -> None:
        """Have another name than at the beginning."""
        ...

    def set(self, attributes: Attributes) -> None: ...

    def event(self, name: str, attributes: Attributes | None = None) -> None: ...

    def fail(self, code: str, message: str = "") -> None:
        """End with an error; an exception that leaves the span's block says so by itself."""
        ...


class _Nothing:
    """The span of a process that does not trace, and its context manager."""

    def name(self, name: str) -> None: ...

    def set(self, attributes: Attributes) -> None: ...

    def event(self, name: str, attributes: Attributes | None = None) -> None: ...

    def fail(self, code: str, message: str = "") -> None: ...

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


NOTHING = _Nothing()
_tracer: Tracer | None = None


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the OTEL_* variables ask for traces.

    Raises:
        TutelageError: INVALID_ARGUMENT, they ask for an exporter or a protocol that there is not.
    """
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    endpoint = any(environment.get(name, "").strip() for name in ENDPOINTS)
    off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if off or exporter == "none" or not (endpoint or exporter == "otlp"):
        return False
    if exporter not in ("", "otlp"):
        raise invalid(f"OTEL_TRACES_EXPORTER: got {shown(exporter)}, allowed are otlp and none")
    name = next((name for name in _PROTOCOLS if environment.get(name)), None)
    if name is not None and environment[name].strip().lower() != "grpc":
        raise invalid(
            f"{name}: got {shown(environment[name])}, allowed is grpc (port 4317 of most collectors)"
        )
    return True


def start(service: str, instance: str) -> None:
    """Trace this process if the OTEL_* variables ask for it.

    Args:
        service: its name in traces, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say another.
        instance: which of the processes of that name it is.

    Raises:
        TutelageError: FAILED_PRECONDITION when the libraries are not installed, INVALID_ARGUMENT when a
            variable has a value that cannot be.
    """
    global _tracer  # noqa: PLW0603 - one tracer per process, like one log
    if _tracer is not None or not wanted():
        return
    try:
        from services.tracing_sdk import Tracer
    except ImportError as error:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"tracing: the OTEL_* variables ask for traces, and {error.name or error} is not installed; "
            "install it with: pip install 'tutelage[tracing]', or set OTEL_SDK_DISABLED=true",
        ) from error
    try:
        _tracer = Tracer(service, instance)
    except ValueError as error:
        raise invalid(f"tracing: an OTEL_* variable cannot be used: {error}") from error


def stop(seconds: float = STOP_SECONDS) -> None:
    """Send what is left, for at most so long; the last call of a process."""
    global _tracer
    tracer, _tracer = _tracer, None
    if tracer is not None:
        tracer.stop(seconds)


def enabled() -> bool:
    """Whether spans go anywhere: for attributes that cost something to find."""
    return _tracer is not None


def span(
    name: str,
    *,
    parent: str | None = None,
    state: str = "",
    kind: Kind = "internal",
    attributes: Attributes | None = None,
) -> AbstractContextManager[Span]:
    """Work that begins and ends with a block.

    Args:
        parent: traceparent of what it belongs to; None: the span around it, ""(or what is no
            traceparent): a trace of its own.
        state: tracestate that came with `parent`.
    """
    if _tracer is None:
        return NOTHING
    return _tracer.span(name, parent, state, kind, attributes)


def record(
    name: str,
    began_ns: int,
    ended_ns: int,
    *,
    parent: str | None = None,
    itself: str | None = None,
    kind: Kind = "internal",
    attributes: Attributes | None = None,
    links: Sequence[str] = (),
    error: tuple[str, str] | None = None,
    event: str | None = None,
) -> None:
    """Work that is over, with its times in unix nanoseconds.

    Args:
        parent: as in `span`.
        itself: traceparent that the span has to have, so that others may hang below it before it is
            recorded, or though another process records it; it is the root of its trace.
        links: traceparents of spans in other traces.
        error: code and message.
        event: something that happened at its end.
    """
    if _tracer is not None:
        _tracer.record(
            name,
            (began_ns, max(began_ns, ended_ns)),
            parent=parent,
            itself=itself,
            kind=kind,
            attributes=attributes,
            links=links,
            error=error,
            event=event,
        )


def current() -> str:
    """Traceparent of the span around this, "" when there is none."""
    return "" if _tracer is None else _tracer.current()


def root(trace_id: str, span_id: str) -> str:
    """The traceparent of a root span to be, sampled as OTEL_TRACES_SAMPLER says (not at all while off).

    Args:
        trace_id, span_id: 32 and 16 hexadecimal digits.
    """
    sampled = _tracer is not None and _tracer.samples(trace_id)
    return f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"


def ids(traceparent: str) -> tuple[str, str, str] | None:
    """Trace id, span id and flags of a traceparent, as hexadecimal digits; None when it is none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    known = version != "ff" and not (version == "00" and more)
    return (trace_id, span_id, flags) if known and int(trace_id, 16) and int(span_id, 16) else None
