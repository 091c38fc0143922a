"""Work for replicas through the queue, without end until told: every group is counted out and counted in."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import TracebackType
from typing import Self

from tutelage.v1.rollout_pb2 import ViewRequest

from services.queue import Queue, Submitted
from support.queue_data import make_group, make_request


class QueueLoad:
    """Keeps `ahead` jobs waiting for `teacher` and reads what comes back, as sampler and trainer would."""

    def __init__(self, queue: Queue, teacher: str, *, run: str = "load", ahead: int = 100) -> None:
        self.submitted = 0
        self.received: Counter[int] = Counter()
        self.failed: list[str] = []
        self._queue = queue
        self._teacher = teacher
        self._run = run
        self._ahead = ahead
        self._enough = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._submit()), asyncio.create_task(self._collect())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def rate(self, seconds: float) -> float:
        """Jobs scored per second over the next while."""
        clock = asyncio.get_running_loop().time
        before, began = await self._scored(), clock()
        await asyncio.sleep(seconds)
        return (await self._scored() - before) / (clock() - began)

    async def finish(self, seconds: float) -> None:
        """Submit no more, wait for the rest and a moment longer; TimeoutError when some never come.

        Raises AssertionError when a group came twice or without its scores.
        """
        self._enough.set()
        submitting, collecting = self._tasks
        await submitting
        async with asyncio.timeout(seconds):
            while len(self.received) < self.submitted and not collecting.done():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        if collecting.done():
            collecting.result()
        assert not self.failed, self.failed[:3]
        assert self.received == Counter(range(self.submitted))

    async def check_books(self) -> None:
        """After `finish`, and when nobody else asks this teacher: the queue has counted the same."""
        stats = await self._queue.teacher_stats(self._teacher)
        left = (stats.jobs.waiting, stats.jobs.in_flight, stats.queued_tokens, stats.dead, stats.expired)
        assert (stats.scored, *left) == (self.submitted, 0, 0, 0, 0, 0)

    async def _scored(self) -> int:
        return (await self._queue.teacher_stats(self._teacher)).scored

    async def _submit(self) -> None:
        view: ViewRequest = make_request(self._teacher)
        view.signal.sampled = True
        while not self._enough.is_set():
            while self.submitted - len(self.received) < self._ahead:
                outcome = await self._queue.submit_group(make_group(self._run, self.submitted), [view])
                if outcome is Submitted.FULL:
                    break
                assert outcome is Submitted.QUEUED, outcome
                self.submitted += 1
            await asyncio.sleep(0.01)

    async def _collect(self) -> None:
        reader = self._queue.scored(self._run)
        while True:
            groups = await reader.read(64, 200)
            for scored in groups:
                self.received[scored.group.index] += 1
                answers = scored.scores["teacher"].sequences if scored.status == "scored" else ()
                if not answers or not all(answer.sampled for answer in answers):
                    self.failed.append(f"{scored.group.id}: {scored.status} {scored.errors}")
            await reader.acknowledge(groups)
