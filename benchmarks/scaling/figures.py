"""What a day comes to: waits, utilisation, cost, and the same day on a fleet of a fixed size."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.scaling.rules import HpaRule
from benchmarks.scaling.simulation import Day, Scored

HOUR = 3600.0
LARGEST_FIXED = 256


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds and hours are simulated ones unless the name says real."""

    groups: int
    lost: int
    doubles: int
    failed: int
    p50_wait: float
    p99_wait: float
    worst_wait: float
    utilisation: float
    replica_hours: float  # from its start, model loading included
    mean_replicas: float
    fewest_ready: int
    most_ready: int
    starts: int
    killed: int
    handed_back: int
    second: int
    fixed_replicas: int  # of the fixed fleet with the same p99 wait
    fixed_hours: float
    peak_hours: float  # of a fixed fleet as large as the largest that was ready
    real_seconds: float
    mean_cores: float
    busiest_cores: float  # over five seconds
    mean_load: float  # load average of the whole machine meanwhile
    latest_submission: float


def figures(day: Day) -> Figures:
    setup, hours = day.setup, day.setup.load.seconds / HOUR
    waits = wait_seconds(day.scored, setup.rate)
    p50, p99, worst = (float(x) for x in np.percentile(waits, [50, 99, 100]))
    paid = sum(_span(day, r.started, r.gone) for r in day.replicas)
    ready = sum(_span(day, r.ready, r.gone) for r in day.replicas if r.ready is not None)
    within = [sample for sample in day.samples if sample.at <= setup.load.seconds]
    counts = [sample.ready for sample in within]
    fixed = fixed_fleet(day.scored, setup.rate, p99)
    cores = busiest(day.cpu)
    return Figures(
        groups=day.submitted, lost=day.lost, doubles=day.doubles, failed=day.failed,
        p50_wait=p50, p99_wait=p99, worst_wait=worst,
        utilisation=sum(s.tokens for s in day.scored) / setup.rate / (ready * HOUR),
        replica_hours=paid, mean_replicas=paid / hours, fewest_ready=min(counts), most_ready=max(counts),
        starts=len(day.replicas), killed=sum(count for _, count in day.killed_replicas),
        handed_back=day.outcomes["released"], second=day.outcomes["second"],
        fixed_replicas=fixed, fixed_hours=fixed * hours, peak_hours=max(counts) * hours,
        real_seconds=day.ended - day.began, mean_cores=day.cpu[-1][1] / day.cpu[-1][0] if cores else 0.0,
        busiest_cores=cores, mean_load=float(np.mean(day.busy)), latest_submission=day.late,
    )  # fmt: skip


def wait_seconds(scored: Sequence[Scored], rate: float) -> npt.NDArray[np.float64]:
    """From submission until its scores were read, less the seconds its own tokens take a replica."""
    return np.array([max(0.0, s.read - s.submitted - s.tokens / rate) for s in scored])


def fixed_fleet(scored: Sequence[Scored], rate: float, p99: float) -> int:
    """Fewest replicas, always there, that give this p99 wait first come first served; computed, not run."""
    ordered = sorted(scored, key=lambda s: s.submitted)
    low, high = 1, LARGEST_FIXED
    while low < high:
        middle = (low + high) // 2
        if float(np.percentile(fixed_waits(ordered, rate, middle), 99)) <= p99:
            high = middle
        else:
            low = middle + 1
    return low


def fixed_waits(ordered: Sequence[Scored], rate: float, replicas: int) -> list[float]:
    """Waits of groups in order of submission on a fleet of a fixed size."""
    free, waits = [0.0] * replicas, []
    for group in ordered:
        begins = max(group.submitted, heapq.heappop(free))
        heapq.heappush(free, begins + group.tokens / rate)
        waits.append(begins - group.submitted)
    return waits


def busiest(cpu: Sequence[tuple[float, float]], window: float = 5.0) -> float:
    """Most processor seconds per second over `window` real seconds; 0 when the day was shorter."""
    best = 0.0
    for index, (at, used) in enumerate(cpu):
        earlier = next(((t, u) for t, u in reversed(cpu[:index]) if at - t >= window), None)
        if earlier is not None:
            best = max(best, (used - earlier[1]) / (at - earlier[0]))
    return best


def rule_name(day: Day) -> str:
    return "hpa" if isinstance(day.setup.rule, HpaRule) else "keda"


def _span(day: Day, start: float, end: float | None) -> float:
    """Simulated hours between two real moments; a life that has not ended ends with the day."""
    return ((day.ended if end is None else end) - start) * day.setup.factor / HOUR
