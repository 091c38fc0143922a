"""More replicas score more, fewer lose nothing: real replica processes behind the real queue."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from support.queue_data import VIEW_TOKENS
from support.queue_load import QueueLoad
from support.teachers import TeacherProcess

from services.queue import LeaseSettings, Queue
from services.queue.embedded import EmbeddedServer

TEACHER = "fake"
JOBS_PER_SECOND = 40
HEARTBEAT = 1.0


class Replicas:
    """Replicas of one teacher that come and go."""

    def __init__(self, directory: Path, url: str) -> None:
        self._directory, self._url = directory, url
        self._started = 0
        self.running: list[TeacherProcess] = []

    async def scale_out(self, to: int) -> None:
        """Start what is missing and wait until it pulls."""
        fresh = [self._start() for _ in range(to - len(self.running))]
        self.running += fresh
        for replica in fresh:
            await asyncio.to_thread(replica.wait_ready)

    async def drain(self, to: int) -> list[int]:
        """SIGTERM for all but `to`, at once; their exit statuses."""
        leaving, self.running = self.running[to:], self.running[:to]
        for replica in leaving:
            replica.process.terminate()
        return [await asyncio.to_thread(replica.process.wait, 30) for replica in leaving]

    def kill(self, to: int) -> None:
        """kill -9 of all but `to`, at once."""
        leaving, self.running = self.running[to:], self.running[:to]
        for replica in leaving:
            replica.process.kill()
        for replica in leaving:
            replica.kill()

    def _start(self) -> TeacherProcess:
        self._started += 1
        name = f"replica-{self._started}"
        return TeacherProcess(
            self._directory / name, name=TEACHER, consumer=name, queue_url=self._url,
            heartbeat_seconds=HEARTBEAT, fake={"tokens_per_second": JOBS_PER_SECOND * VIEW_TOKENS},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "cycles"),
    [(3.0, 1), pytest.param(20.0, 10, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
async def test_four_replicas_score_four_times_as_much_and_going_back_to_one_loses_nothing(
    tmp_path: Path, seconds: float, cycles: int
) -> None:
    began = time.monotonic()
    with EmbeddedServer(tmp_path / "queue", dies_with_parent=True) as server:
        replicas = Replicas(tmp_path, server.url)
        try:
            async with (
                Queue(server.url, lease=LeaseSettings(heartbeat=HEARTBEAT)) as queue,
                QueueLoad(queue, TEACHER) as load,
            ):
                rates = {}
                for count in (1, 4):
                    await replicas.scale_out(count)
                    await asyncio.sleep(0.5)
                    rates[count] = await load.rate(seconds)
                statuses = []
                for _ in range(cycles):
                    await replicas.scale_out(4)
                    statuses += await replicas.drain(1)
                    await replicas.scale_out(4)
                    replicas.kill(1)
                await replicas.scale_out(2)
                await load.finish(60)
                await load.check_books()
        finally:
            replicas.kill(0)
    ratio = rates[4] / rates[1]
    print(
        f"1 replica {rates[1]:.1f} jobs/s, 4 replicas {rates[4]:.1f} jobs/s: {ratio:.2f} times; "
        f"{3 * cycles} drained, {3 * cycles} killed -9 under load, {load.submitted} jobs, 0 lost, 0 twice; "
        f"{time.monotonic() - began:.0f} s"
    )
    assert ratio >= 3.6
    assert statuses == [0] * 3 * cycles
