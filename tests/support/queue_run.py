"""A whole run in one process: trainer, sampler and teacher tasks over the queue, and the ledger they fill."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from tutelage.v1.rollout_pb2 import SampleOrder

from services.queue import Queue, Submitted
from support.queue_data import make_group, make_request, make_scores

RUN, TEACHER = "run", "teacher"
GROUPS_PER_ORDER = 5


@dataclass
class SmallRun:
    """Orders out, groups through one teacher, applied groups counted; ends when all are applied.

    `promised` holds every group the queue has acknowledged, `applied` what the trainer got.
    """

    url: str
    namespace: str
    groups: int
    queue: Queue
    promised: set[int] = field(default_factory=set)
    applied: Counter[int] = field(default_factory=Counter)
    applied_at: list[float] = field(default_factory=list)

    def done(self) -> bool:
        return len(self.applied) >= self.groups

    async def reaches(self, applied: int) -> None:
        """Return once that many groups are applied, or all."""
        while len(self.applied) < min(applied, self.groups):  # noqa: ASYNC110 several tasks count
            await asyncio.sleep(0.02)

    async def train(self) -> None:
        """Place every order, then apply and acknowledge groups as they come."""
        for first in range(0, self.groups, GROUPS_PER_ORDER):
            order = SampleOrder(id=f"{RUN}-{first}", run=RUN, first_group=first, num_groups=GROUPS_PER_ORDER)
            await self.queue.place_order(order)
        reader = self.queue.scored(RUN)
        while not self.done():
            groups = await reader.read(16, 200)
            self.applied.update(scored.group.index for scored in groups)
            self.applied_at += [time.monotonic()] * len(groups)
            await reader.acknowledge(groups)

    async def sample(self, pace: float) -> None:
        async with self.queue.orders(RUN, "sampler") as worker:
            while not self.done():
                for claim in await worker.claim(1, 200):
                    first = claim.order.first_group
                    for index in range(first, first + claim.order.num_groups):
                        await asyncio.sleep(pace)
                        outcome = await self.queue.submit_group(
                            make_group(RUN, index), [make_request(TEACHER)], order=claim
                        )
                        if outcome is Submitted.LOST:
                            break
                        self.promised.add(index)
                    else:
                        await worker.finish(claim)

    async def score(self) -> None:
        async with self.queue.jobs(TEACHER, "replica") as worker:
            while not self.done():
                for claim in await worker.claim(4, 200):
                    if await worker.load(claim) is not None:
                        await worker.commit(claim, make_scores(claim.group))
