"""Traced processes in tests: their variables, and questions to ask of the spans that they sent."""

from __future__ import annotations

from benchmarks.tracing.collector import Span

# Soon: a test waits for spans, and a process that is killed must have sent what it had finished.
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}


def traced(endpoint: str) -> dict[str, str]:
    """Variables of a process that sends its spans to `endpoint`."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **SOON}


def children(parent: Span, spans: list[Span]) -> list[Span]:
    """Spans right below one, in the order in which they began."""
    below = [span for span in spans if span.trace == parent.trace and span.parent == parent.id]
    return sorted(below, key=lambda span: span.began)


def one(spans: list[Span], name: str) -> Span:
    """The only span of a name."""
    (found,) = [span for span in spans if span.name == name]
    return found
