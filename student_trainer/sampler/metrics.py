"""What a sampler has done: counted once, published in the run's progress, and shown on its /metrics port."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.metrics_server import MetricsServer, metrics_page
from services.queue import Submitted
from student_trainer.sections import MetricsSettings

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Counters:
    """What this process has done; published in the run's progress after every order.

    `tokens` and `groups` are those that it brought into the queue; times are seconds of the clock.
    """

    orders: int = 0
    groups: int = 0
    groups_known: int = 0  # stored before: by the one who had the order earlier
    groups_lost: int = 0  # the order had gone to another sampler
    tokens: int = 0
    evaluations: int = 0
    sample_seconds: float = 0.0
    order_wait_seconds: float = 0.0
    policy_wait_seconds: float = 0.0
    full_wait_seconds: float = 0.0
    policy_version: int = 0

    def count(self, answer: Submitted, tokens: int) -> None:
        """A group was submitted."""
        if answer is Submitted.QUEUED:
            self.groups += 1
            self.tokens += tokens
        elif answer is Submitted.EXISTS:
            self.groups_known += 1
        elif answer is Submitted.LOST:
            self.groups_lost += 1


class FullQueue:
    """Counts the time during which at least one of the groups being submitted waits for room."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._waiting = 0
        self._since = 0.0

    def __enter__(self) -> None:
        if self._waiting == 0:
            self._since = time.perf_counter()
        self._waiting += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            self._counters.full_wait_seconds += time.perf_counter() - self._since


class SamplerCollector(Collector):
    """The counters as Prometheus metrics."""

    def __init__(self, counters: Counters, run: str) -> None:
        self._counters = counters
        self._run = run

    def collect(self) -> Iterator[Metric]:
        counters = self._counters
        info = GaugeMetricFamily("tutelage_sampler_info", "Always 1: whose figures these are", labels=["run"])
        info.add_metric([self._run], 1)
        yield info
        yield CounterMetricFamily(
            "tutelage_sampler_tokens", "Response tokens brought into the queue", value=counters.tokens
        )
        groups = CounterMetricFamily(
            "tutelage_sampler_groups",
            "Groups sampled, by what became of them: queued, exists (stored before), lost (with its order)",
            labels=["outcome"],
        )
        groups.add_metric([Submitted.QUEUED.value], counters.groups)
        groups.add_metric([Submitted.EXISTS.value], counters.groups_known)
        groups.add_metric([Submitted.LOST.value], counters.groups_lost)
        yield groups
        yield CounterMetricFamily(
            "tutelage_sampler_sampling_seconds", "Time spent sampling groups", value=counters.sample_seconds
        )
        waiting = CounterMetricFamily(
            "tutelage_sampler_waiting_seconds",
            "Time spent waiting: for orders, for room in front of the teachers, for a policy version",
            labels=["reason"],
        )
        waiting.add_metric(["orders"], counters.order_wait_seconds)
        waiting.add_metric(["queue_full"], counters.full_wait_seconds)
        waiting.add_metric(["policy"], counters.policy_wait_seconds)
        yield waiting
        yield GaugeMetricFamily(
            "tutelage_sampler_policy_version",
            "Version of the weights it samples with",
            counters.policy_version,
        )


def metrics_port(settings: MetricsSettings, counters: Counters, run: str) -> AbstractContextManager[object]:
    """The sampler's port as a context manager; nothing where the run file wants none.

    Raises:
        TutelageError: the port cannot be had, or the token file not be used.
    """
    if settings.sampler_port is None:
        return nullcontext()
    registry = CollectorRegistry()
    registry.register(SamplerCollector(counters, run))
    server = MetricsServer(
        {"/metrics": metrics_page(registry)},
        host=settings.host,
        port=settings.sampler_port,
        tokens=settings.tokens(),
    )
    log.info("metrics port", address=server.address)
    return server
