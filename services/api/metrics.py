"""What a scoring service counts, as Prometheus metrics on a registry of its own, and what its engine counts.

An engine that is a library puts its figures into prometheus_client's default registry: vLLM's are
named `vllm:…`. They are shown beside ours, by their own names.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ENGINE_PREFIX = "vllm:"
CACHE_OUTCOMES, CACHE_FAILURES = ("hit", "miss", "shared"), ("corrupt", "store")


class _EngineMetrics:
    """The engine's share of the default registry, which also describes the process."""

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in REGISTRY.collect() if metric.name.startswith(ENGINE_PREFIX))


class Metrics:
    """One instance per process; units are in the names."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tutelage_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"tutelage_{name}", text, registry=self.registry)

        self.requests = counter("requests", "Requests answered, by status", "transport", "code")
        self.seconds = Histogram(
            "tutelage_request_duration_seconds",
            "From arrival to answer",
            ("transport",),
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.engine_requests = counter("engine_requests", "Requests handed to the engine")
        self.engine_seconds = counter("engine_compute_seconds", "Compute time the engine reported")
        self.positions = counter("scored_positions", "Response positions answered")
        self.tokens_computed = counter("computed_tokens", "Tokens the engine computed")
        self.tokens_reused = counter("reused_tokens", "Tokens the engine took from a cache")
        self.sequence_errors = counter("sequence_errors", "Sequences without an answer, alone", "code")
        self.invalid_positions = counter("invalid_positions", "Positions without a finite score")
        self.queued_tokens = gauge("queued_tokens", "Tokens accepted and not yet scored")
        self.throughput = gauge("throughput_tokens_per_second", "Measured while busy")
        self.ready = gauge("ready", "1 while requests are accepted")
        self.teacher_info = Gauge(
            "tutelage_teacher_info",
            "Always 1: who scores here, by which the figures of a replica are told apart",
            ("teacher", "model", "engine", "engine_version", "dtype"),
            registry=self.registry,
        )
        self.queue_jobs = counter("queue_jobs", "Jobs taken from the queue, by outcome", "outcome")
        self.cache_sequences = counter("cache_sequences", "Sequences at the cache, by outcome", "outcome")
        self.cache_failures = counter("cache_failures", "What the cache did without, by reason", "reason")
        for outcome in CACHE_OUTCOMES:
            self.cache_sequences.labels(outcome)
        for reason in CACHE_FAILURES:
            self.cache_failures.labels(reason)
        self.cache_bytes = gauge("cache_bytes", "Bytes that the cache holds, as last counted")
        self.registry.register(_EngineMetrics())

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)
