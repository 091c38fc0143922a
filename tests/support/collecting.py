"""Fixture: a collector of traces that processes started by the test send to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.tracing.collector import Collector
from support.traces import traced


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        for name, value in traced(collector.endpoint).items():
            monkeypatch.setenv(name, value)
        yield collector
