"""The scaling benchmark in its short form: replicas follow the load, and nothing is lost on the way."""

from __future__ import annotations

from statistics import median

from benchmarks.scaling.figures import HOUR, figures
from benchmarks.scaling.load import SHORT_BURSTS
from benchmarks.scaling.scenarios import quick_setup
from benchmarks.scaling.simulation import Day, Simulation


def ready_between(day: Day, start: float, end: float) -> list[int]:
    """Ready replicas at every look between two hours."""
    return [sample.ready for sample in day.samples if start * HOUR <= sample.at < end * HOUR]


async def test_replicas_follow_a_burst_and_a_killed_host_costs_no_group() -> None:
    day = await Simulation(quick_setup("hpa")).run()
    result = figures(day)
    ((start, length, extra),) = SHORT_BURSTS
    before = median(ready_between(day, 0.0, start))
    during = ready_between(day, start, start + length)
    at_last = ready_between(day, 0.6, 1.0)[-1]
    print(
        f"{result.groups} groups, {result.lost} lost, {result.doubles} twice; {before:.0f} replicas, "
        f"{max(during)} in the burst of {extra:.0f}, {at_last} at last; {result.killed} killed, "
        f"p99 wait {result.p99_wait:.0f} s; {result.real_seconds:.1f} s"
    )
    assert (result.lost, result.doubles, result.failed) == (0, 0, 0)
    assert day.left == {"scored": result.groups, "dead": 0, "expired": 0, "waiting": 0, "in_flight": 0}
    assert result.killed >= 2
    assert before <= 4
    assert max(during) >= extra
    assert at_last <= max(during) - 5


async def test_keda_goes_to_zero_and_comes_back_for_the_first_group() -> None:
    day = await Simulation(quick_setup("keda")).run()
    result = figures(day)
    silence = [sample.living for sample in day.samples if sample.at < 0.1 * HOUR]
    print(f"{result.groups} groups, up to {result.most_ready} replicas; {result.real_seconds:.1f} s")
    assert (result.lost, result.doubles, result.failed) == (0, 0, 0)
    assert set(silence) == {0}
    assert result.most_ready >= 2
    assert day.samples[-1].living == 0
