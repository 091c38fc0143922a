"""What the queue tells, as Prometheus metrics. Without an answer of the queue there are no figures at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.queue import Overview

Row = tuple[Sequence[str], float]  # label values, value


class QueueCollector(Collector):
    """Asks at every scrape.

    Args:
        look: one look at the queue; None when it gave no answer.
    """

    def __init__(self, look: Callable[[], Overview | None]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        overview = self._look()
        yield _gauge("up", "1 when the queue answered this scrape; at 0 there are no other figures")(
            [((), float(overview is not None))]
        )
        if overview is not None:
            yield from _of_teachers(overview)
            yield from _of_runs(overview)
            yield from _of_server(overview)


def _of_teachers(overview: Overview) -> Iterator[Metric]:
    teachers = overview.teachers
    yield _gauge("waiting_tokens", "Tokens of jobs that no replica holds, also those handed back", "teacher")(
        [((name,), stats.waiting_tokens) for name, stats in teachers.items()]
    )
    yield _gauge("in_flight_tokens", "Tokens of jobs leased to replicas", "teacher")(
        [((name,), stats.in_flight_tokens) for name, stats in teachers.items()]
    )
    yield _gauge(
        "oldest_job_age_seconds", "Since the oldest unfinished job was submitted; 0 without one", "teacher"
    )([((name,), stats.jobs.oldest_age) for name, stats in teachers.items()])
    yield _gauge("jobs", "Unfinished jobs", "teacher", "state")(
        [
            ((name, state), count)
            for name, stats in teachers.items()
            for state, count in (("waiting", stats.jobs.waiting), ("in_flight", stats.jobs.in_flight))
        ]
    )
    for what, text in (
        ("scored", "Jobs whose scores were stored"),
        ("dead", "Jobs given up after their last delivery, or at once when trying again could not help"),
        ("expired", "Jobs whose deadline passed in the queue"),
    ):
        yield _counter(f"{what}_jobs", text, "teacher")(
            [((name,), getattr(stats, what)) for name, stats in teachers.items()]
        )
    yield _gauge("replicas", "Replicas that say that they live", "teacher")(
        [((name,), count) for name, count in overview.replicas.items()]
    )


def _of_runs(overview: Overview) -> Iterator[Metric]:
    runs = overview.runs
    for kind, text in (
        ("orders", "Unfinished orders to sample"),
        ("scored_groups", "Scored groups; in flight: read by the trainer, not yet covered by a checkpoint"),
    ):
        streams = [(run, stats.orders if kind == "orders" else stats.scored) for run, stats in runs.items()]
        yield _gauge(kind, text, "run", "state")(
            [
                ((run, state), count)
                for run, stream in streams
                for state, count in (("waiting", stream.waiting), ("in_flight", stream.in_flight))
            ]
        )
    yield _gauge(
        "oldest_order_age_seconds", "Since the oldest unfinished order was placed; 0 without", "run"
    )([((run,), stats.orders.oldest_age) for run, stats in runs.items()])
    yield _counter("dead_orders", "Orders given up", "run")(
        [((run,), stats.dead_orders) for run, stats in runs.items()]
    )
    yield _gauge("samplers", "Samplers that say that they live", "run")(
        [((run,), count) for run, count in overview.samplers.items()]
    )
    yield _gauge("trainers", "1 while the run's trainer says that it lives", "run")(
        [((run,), count) for run, count in overview.trainers.items()]
    )


def _of_server(overview: Overview) -> Iterator[Metric]:
    server = overview.server
    yield _gauge("memory_bytes", "Memory that the queue's server uses")([((), server.memory_bytes)])
    yield _gauge("memory_limit_bytes", "Memory that it may use; 0: no limit")(
        [((), server.memory_limit_bytes)]
    )
    yield _gauge("clients", "Connections to the queue's server")([((), server.clients)])


def _gauge(name: str, text: str, *labels: str) -> Callable[[Sequence[Row]], Metric]:
    return _filled(GaugeMetricFamily(f"tutelage_queue_{name}", text, labels=labels))


def _counter(name: str, text: str, *labels: str) -> Callable[[Sequence[Row]], Metric]:
    return _filled(CounterMetricFamily(f"tutelage_queue_{name}", text, labels=labels))


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily,
) -> Callable[[Sequence[Row]], Metric]:
    def fill(rows: Sequence[Row]) -> Metric:
        for labels, value in rows:
            family.add_metric(labels, value)
        return family

    return fill
