"""Pacing: the orders that keep samplers at most `max_staleness` versions behind the trainer.

Group i of the first steps × prompts_per_step groups belongs to step i // prompts_per_step. A group
that was dropped is replaced by one from a range of its own, so every step finds enough groups.
Order ids follow from what they ask for, so placing one again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from tutelage.v1.rollout_pb2 import SampleOrder

from services.queue import Queue
from student_trainer.config import RunConfig
from student_trainer.ledger import Ledger

REPLACEMENTS_FROM = 2**40  # group indices of replacements; no run gets there step by step


class Pacer:
    """Places the orders of one run."""

    def __init__(self, queue: Queue, config: RunConfig, ledger: Ledger) -> None:
        self._queue = queue
        self._run = config.run.name
        self._exact = config.run.deterministic
        self._staleness = config.training.max_staleness
        self._steps = config.training.steps
        self._per_step = config.training.prompts_per_step
        self._per_order = config.sampling.groups_per_order
        self._ledger = ledger
        self._next_step = ledger.step

    async def place_ahead(self, version: int) -> None:
        """Order the groups of every step that may be sampled once `version` is published."""
        while self._next_step < min(self._steps, version + self._staleness + 1):
            for order in self._orders_of(self._next_step):
                await self._queue.place_order(order)
            self._next_step += 1

    async def replace(self, count: int, version: int) -> None:
        """Order `count` groups more, in place of dropped ones."""
        for first in range(0, count, self._per_order):
            size = min(self._per_order, count - first)
            start = self._ledger.replacements
            await self._queue.place_order(self._replacement(start, size, version))
            self._ledger.replacements = start + size

    async def place_missing(self, version: int) -> None:
        """Order again whatever was ordered and has not been consumed.

        For a queue that lost what it had acknowledged (a power failure). Orders that are still open
        stay as they are, and groups that exist are not stored twice.
        """
        for step in range(self._ledger.step, self._next_step):
            for order in self._orders_of(step):
                if any(not self._ledger.knows(order.first_group + i) for i in range(order.num_groups)):
                    await self._queue.place_order(order, again=True)
        await self.place_missing_replacements(version)

    async def place_missing_replacements(self, version: int) -> None:
        """Order again the replacements that have not been consumed."""
        for number in range(self._ledger.replacements):
            if not self._ledger.knows(REPLACEMENTS_FROM + number):
                await self._queue.place_order(self._replacement(number, 1, version), again=True)

    def _orders_of(self, step: int) -> Iterator[SampleOrder]:
        for part, first in enumerate(range(0, self._per_step, self._per_order)):
            yield SampleOrder(
                id=f"{self._run}-s{step}-{part}",
                run=self._run,
                first_group=step * self._per_step + first,
                num_groups=min(self._per_order, self._per_step - first),
                policy_version=max(0, step - self._staleness),
                exact=self._exact,
            )

    def _replacement(self, number: int, count: int, version: int) -> SampleOrder:
        return SampleOrder(
            id=f"{self._run}-r{number}-{count}",
            run=self._run,
            first_group=REPLACEMENTS_FROM + number,
            num_groups=count,
            policy_version=version,
        )
