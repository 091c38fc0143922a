"""The autoscalers' arithmetic, as Kubernetes and KEDA document it, over simulated seconds.

kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale (algorithm details, configurable scaling
behavior); keda.sh/docs/concepts/scaling-deployments (activation and scaling phase, cooldownPeriod).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from benchmarks.scaling.rules import Direction, HpaRule, KedaRule, Policy


class HorizontalAutoscaler:
    """One HorizontalPodAutoscaler: how many replicas there should be, asked every sync period."""

    def __init__(self, rule: HpaRule) -> None:
        self.rule = rule
        self._recommended: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()  # time, replicas added (negative: taken away)
        self._memory = max(
            [rule.up.window, rule.down.window, *(p.period for p in rule.up.policies + rule.down.policies)]
        )

    def decide(self, now: float, current: int, values: Mapping[str, float]) -> int:
        """The number of replicas from now on.

        Args:
            now: simulated seconds.
            current: replicas asked for so far; none at all switches the autoscaler off.
            values: every metric's total over the fleet.
        """
        if current == 0:
            return 0
        self._forget(now)
        if not self._recommended:  # the controller remembers what it found as its first recommendation
            self._recommended.append((now, current))
        rule = self.rule
        raw = max(self._proposal(current, values[t.metric], t.average) for t in rule.targets)
        steady = self._stabilised(now, current, raw)
        bounded = min(max(steady, rule.minimum), rule.maximum)
        if bounded > current:
            bounded = min(bounded, self._limit(now, current, rule.up, up=True))
        elif bounded < current:
            bounded = max(bounded, self._limit(now, current, rule.down, up=False))
        if bounded != current:
            self._changes.append((now, bounded - current))
        return bounded

    def _proposal(self, current: int, value: float, average: float) -> int:
        ratio = value / (average * current)
        if abs(ratio - 1.0) <= self.rule.tolerance:
            return current
        return math.ceil(value / average)

    def _stabilised(self, now: float, current: int, raw: int) -> int:
        """Up no further than everything recommended within its window, down no further than its own."""
        highest = lowest = raw
        for at, recommended in self._recommended:
            if at > now - self.rule.up.window:
                lowest = min(lowest, recommended)
            if at > now - self.rule.down.window:
                highest = max(highest, recommended)
        self._recommended.append((now, raw))
        return min(max(current, lowest), highest)

    def _limit(self, now: float, current: int, direction: Direction, *, up: bool) -> int:
        if direction.select == "Disabled":
            return current
        limits = [self._policy_limit(now, current, policy, up=up) for policy in direction.policies]
        return (max if up == (direction.select == "Max") else min)(limits)

    def _policy_limit(self, now: float, current: int, policy: Policy, *, up: bool) -> int:
        """Where the policy ends, counted from the number of replicas at the beginning of its period."""
        start = current - sum(change for at, change in self._changes if at > now - policy.period)
        by = policy.value if policy.kind == "Pods" else start * policy.value / 100
        return math.ceil(start + by) if up else math.floor(start - by)

    def _forget(self, now: float) -> None:
        for remembered in (self._recommended, self._changes):
            while remembered and remembered[0][0] <= now - self._memory:
                remembered.popleft()


class KedaAutoscaler:
    """KEDA: from none to one when a trigger is active, to none a while after the last was; else its HPA."""

    def __init__(self, rule: KedaRule) -> None:
        self.rule = rule
        self._hpa = HorizontalAutoscaler(rule.hpa)
        self._last_active = -math.inf
        self._next_poll = -math.inf
        self._next_sync = -math.inf

    def decide(self, now: float, current: int, values: Mapping[str, float]) -> int:
        """As HorizontalAutoscaler.decide; may be asked more often than either of its clocks ticks."""
        if now >= self._next_poll:
            self._next_poll = now + self.rule.poll
            active = any(values[name] > least for name, least in self.rule.activation.items())
            if active:
                self._last_active = now
                if current == 0:
                    return max(1, self.rule.hpa.minimum)
            elif current and now - self._last_active >= self.rule.cooldown:
                return 0
        if current and now >= self._next_sync:
            self._next_sync = now + self.rule.hpa.period
            return self._hpa.decide(now, current, values)
        return current
