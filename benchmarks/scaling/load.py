"""The load of a day: how many replicas' worth of tokens arrive per second, and the groups that bring them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

HOUR = 3600.0
BATCH = 8  # a sampler finishes up to this many groups at once

# (hour, replicas that would be busy): nights with a silence in them, two plateaus, an evening.
DAY = (
    (0.0, 4.0), (1.5, 1.0), (2.0, 0.0), (4.2, 0.0), (4.3, 1.0), (6.0, 3.0), (8.0, 9.0), (9.0, 15.0),
    (12.0, 11.0), (13.0, 8.0), (14.0, 16.0), (17.0, 12.0), (20.0, 6.0), (22.0, 4.0), (24.0, 3.0),
)  # fmt: skip
# (hour, hours, replicas on top): several runs start their training within minutes.
BURSTS = (
    (5.0, 0.4, 12.0), (9.5, 0.6, 25.0), (11.2, 0.3, 30.0),
    (15.0, 0.8, 34.0), (18.5, 0.5, 26.0), (21.5, 0.5, 20.0),
)  # fmt: skip
# Forty minutes with one burst, for a test.
SHORT_DAY = ((0.0, 1.0), (0.67, 1.0))
SHORT_BURSTS = ((0.08, 0.25, 9.0),)
# Silence, a little work, silence again.
SPARSE_DAY = ((0.0, 0.0), (0.1, 0.0), (0.101, 2.0), (0.3, 2.0), (0.301, 0.0), (0.6, 0.0))


@dataclass(frozen=True, slots=True)
class Load:
    """Points of a curve between which demand is linear, and bursts on top; hours and replicas."""

    points: tuple[tuple[float, float], ...]
    bursts: tuple[tuple[float, float, float], ...] = ()

    @property
    def seconds(self) -> float:
        return self.points[-1][0] * HOUR

    def demand(self, at: float) -> float:
        """Replicas that the work arriving at simulated second `at` would keep busy."""
        hour = at / HOUR
        hours, levels = zip(*self.points, strict=True)
        base = float(np.interp(hour, hours, levels))
        return base + sum(extra for start, length, extra in self.bursts if start <= hour < start + length)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One group: simulated second, and its tokens in the unit that the simulation counts in."""

    at: float
    tokens: int


def arrivals(load: Load, *, rate: float, mean_tokens: int, seed: int) -> list[Arrival]:
    """Groups of a day: batches come as a Poisson process whose rate follows the demand (by thinning).

    Args:
        rate: units of one busy replica per simulated second.
        mean_tokens: units of a group on average; sizes are log-normal, as response lengths are.
    """
    rng = np.random.default_rng(seed)
    mean_batch = (1 + BATCH) / 2
    peak = max(load.demand(at) for at in np.arange(0.0, load.seconds, 30.0))
    per_replica = rate / (mean_tokens * mean_batch)  # batches per second that keep one replica busy
    gaps = rng.exponential(1 / (peak * per_replica), size=int(load.seconds * peak * per_replica * 1.2) + 100)
    found: list[Arrival] = []
    for at in itertools.takewhile(lambda moment: moment < load.seconds, np.cumsum(gaps)):
        if rng.random() * peak >= load.demand(at):
            continue
        for tokens in _sizes(rng, int(rng.integers(1, BATCH + 1)), mean_tokens):
            found.append(Arrival(float(at), tokens))
    return found


def _sizes(rng: np.random.Generator, count: int, mean: int, spread: float = 0.5) -> list[int]:
    drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, size=count)
    return [int(size) for size in np.clip(np.rint(drawn), 4, 8 * mean)]
