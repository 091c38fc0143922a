"""Fixtures for traced processes: a collector, and the variables that make a process send its spans there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.tracing.collector import Collector, Span

# Soon: a test waits for spans, and a process that is killed must have sent what it had finished.
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}


def traced(endpoint: str) -> dict[str, str]:
    """Variables of a process that sends its spans to `endpoint`."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **SOON}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that processes started by the test send to."""
    with Collector() as collector:
        for name, value in traced(collector.endpoint).items():
            monkeypatch.setenv(name, value)
        yield collector


def children(parent: Span, spans: list[Span]) -> list[Span]:
    """Spans right below one, in the order in which they began."""
    below = [span for span in spans if span.trace == parent.trace and span.parent == parent.id]
    return sorted(below, key=lambda span: span.began)


def one(spans: list[Span], name: str) -> Span:
    """The only span of a name."""
    (found,) = [span for span in spans if span.name == name]
    return found
