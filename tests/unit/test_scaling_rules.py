"""The scaling benchmark's arithmetic: the deployed rules as read, and what an autoscaler makes of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scaling.autoscaler import HorizontalAutoscaler, KedaAutoscaler
from benchmarks.scaling.figures import fixed_fleet, fixed_waits
from benchmarks.scaling.load import BURSTS, DAY, Load, arrivals
from benchmarks.scaling.rules import Direction, HpaRule, Policy, Target, quantity, read_hpa, read_keda
from benchmarks.scaling.simulation import Scored

FREE = Direction(0.0, (Policy("Pods", 1000, 15),))


def rule(**changes: object) -> HpaRule:
    plain = HpaRule(1, 100, (Target("tokens", 100.0),), up=FREE, down=FREE)
    return replace(plain, **changes)  # type: ignore[arg-type]


def decided(a_rule: HpaRule, steps: list[tuple[float, float]], current: int) -> list[int]:
    """What comes of (time, tokens), one after the other."""
    autoscaler, found = HorizontalAutoscaler(a_rule), []
    for now, tokens in steps:
        current = autoscaler.decide(now, current, {"tokens": tokens, "other": 0.0})
        found.append(current)
    return found


def test_the_deployed_rules_are_read_whole() -> None:
    hpa, keda = read_hpa(), read_keda()
    assert [target.metric for target in hpa.targets] == [
        "tutelage_queue_waiting_tokens",
        "tutelage_queue_in_flight_tokens",
    ]
    assert hpa.minimum >= 1
    assert hpa.targets[0].average >= 1000
    assert {policy.kind for policy in hpa.up.policies} == {"Percent", "Pods"}
    assert hpa.down.window > hpa.up.window
    assert set(keda.activation) == {target.metric for target in keda.hpa.targets} == {"lag", "pending"}
    assert (keda.poll, keda.cooldown) != (0, 0)


@pytest.mark.parametrize(("text", "value"), [("200k", 200_000), ("1500m", 1.5), ("8", 8), ("2Gi", 2**31)])
def test_a_quantity_is_read_as_kubernetes_reads_it(text: str, value: float) -> None:
    assert quantity(text) == value


def test_a_quantity_with_an_unknown_suffix_is_refused() -> None:
    with pytest.raises(ValueError, match="got '5q'"):
        quantity("5q")


def test_replicas_are_the_total_over_the_average_rounded_up() -> None:
    assert decided(rule(), [(0, 250.0)], current=1) == [3]
    assert decided(rule(), [(0, 201.0)], current=1) == [3]


@pytest.mark.parametrize(("tokens", "replicas"), [(1099.0, 10), (1101.0, 12), (901.0, 10), (899.0, 9)])
def test_within_a_tenth_of_the_target_nothing_changes(tokens: float, replicas: int) -> None:
    assert decided(rule(), [(0, tokens), (15, tokens)], current=10)[-1] == replicas


def test_of_several_metrics_the_largest_answer_counts() -> None:
    two = rule(targets=(Target("tokens", 100.0), Target("other", 1.0)))
    autoscaler = HorizontalAutoscaler(two)
    assert autoscaler.decide(0, 2, {"tokens": 100.0, "other": 7.0}) == 7


def test_bounds_hold_and_none_stays_none() -> None:
    assert decided(rule(maximum=5), [(0, 9999.0)], current=1) == [5]
    assert decided(rule(minimum=2), [(0, 0.0), (15, 0.0)], current=4)[-1] == 2
    assert decided(rule(), [(0, 9999.0)], current=0) == [0]


def test_down_waits_until_nothing_within_the_window_says_otherwise() -> None:
    patient = rule(down=Direction(300.0, (Policy("Pods", 1000, 15),)))
    steps = [(0.0, 1000.0)] + [(t, 100.0) for t in range(15, 331, 15)]
    found = decided(patient, steps, current=10)
    at = dict(zip([step[0] for step in steps], found, strict=True))
    assert at[285] == 10
    assert at[300] == 1


def test_up_is_held_back_by_the_largest_policy_and_down_by_pods_per_period() -> None:
    up = Direction(0.0, (Policy("Percent", 100, 30), Policy("Pods", 2, 30)))
    assert decided(rule(up=up), [(0, 9999.0), (15, 9999.0), (30, 9999.0), (60, 9999.0)], current=1) == [
        3,
        3,
        6,
        12,
    ]
    slow = rule(down=Direction(0.0, (Policy("Pods", 1, 60),)))
    steps = [(t, 100.0) for t in range(0, 121, 15)]
    assert decided(slow, [(0, 1000.0), *[(t + 1.0, v) for t, v in steps]], current=10)[1:] == [
        9, 9, 9, 9, 8, 8, 8, 8, 7,
    ]  # fmt: skip


def test_keda_wakes_the_first_replica_and_lets_the_last_go_after_the_cooldown() -> None:
    keda = read_keda()
    autoscaler, current, seen = KedaAutoscaler(keda), 0, []
    for second in range(0, 1200, 5):
        busy = 100 <= second < 200
        values = {"lag": 1.0 if busy else 0.0, "pending": 0.0}
        current = autoscaler.decide(float(second), current, values)
        seen.append((second, current))
    woken = min(second for second, count in seen if count)
    asleep = min(second for second, count in seen if second > 200 and not count)
    assert woken == 100
    assert 195 + keda.cooldown <= asleep <= 200 + keda.cooldown
    assert max(count for _, count in seen) == 1


def test_a_day_of_arrivals_brings_as_much_as_its_demand_says() -> None:
    load = Load(DAY, BURSTS)
    found = arrivals(load, rate=10.0, mean_tokens=150, seed=1)
    busy = sum(arrival.tokens for arrival in found) / 10.0
    wanted = np.mean([load.demand(at) for at in np.arange(0, load.seconds, 60.0)]) * load.seconds
    assert busy == pytest.approx(wanted, rel=0.03)
    assert not [arrival for arrival in found if 2.0 * 3600 < arrival.at < 4.2 * 3600]
    assert all(one.at <= other.at for one, other in itertools.pairwise(found))


def test_a_fixed_fleet_serves_first_come_first_served() -> None:
    groups = [Scored(submitted=float(at), read=0.0, tokens=100.0) for at in (0, 0, 0, 30)]
    assert fixed_waits(groups, rate=10.0, replicas=1) == [0.0, 10.0, 20.0, 0.0]
    assert fixed_waits(groups, rate=10.0, replicas=2) == [0.0, 0.0, 10.0, 0.0]
    assert fixed_fleet(groups, rate=10.0, p99=0.0) == 3
    assert fixed_fleet(groups, rate=10.0, p99=1000.0) == 1
