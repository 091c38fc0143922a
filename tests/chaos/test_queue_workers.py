"""Workers die, poison comes, the loop hangs: nothing is lost, nothing is applied twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from support.queue_data import make_group, make_request
from support.queue_worker import WorkerOptions, read_log, start_worker, work

from services.queue import LeaseSettings, Queue, ScoredGroup, Submitted

pytest_plugins = ["support.queue_server"]

RUN, TEACHER = "run", "teacher"


async def submit_all(queue: Queue, count: int) -> None:
    for index in range(count):
        outcome = await queue.submit_group(make_group(RUN, index), [make_request(TEACHER)])
        assert outcome is Submitted.QUEUED


async def collect(queue: Queue, count: int, seconds: float) -> list[ScoredGroup]:
    """Read groups until there are `count`, and a little longer, so that one too many would show."""
    reader, groups = queue.scored(RUN), []
    end = time.monotonic() + seconds
    while len(groups) < count and time.monotonic() < end:
        groups += await reader.read(64, 100)
    return [*groups, *await reader.read(64, 200)]


class Fleet:
    """Worker processes that are killed and replaced."""

    def __init__(self, options: WorkerOptions, size: int) -> None:
        self._options = options
        self._random = random.Random(0)
        self.workers = [start_worker(options) for _ in range(size)]
        self.killed: dict[int, float] = {}

    def kill_one(self) -> None:
        """Kill a worker that has begun to work, if another one remains to take over."""
        busy = {line["pid"] for line in read_log(self._options.log)}
        victims = [worker for worker in self.workers if worker.pid in busy]
        if len(victims) > 1:
            victim = self._random.choice(victims)
            victim.kill()
            self.killed[victim.pid] = time.time()
            victim.wait()
            self.workers[self.workers.index(victim)] = start_worker(self._options)

    def stop(self) -> list[int]:
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        return [wait_or_kill(worker) for worker in self.workers]


def wait_or_kill(worker: subprocess.Popen[bytes]) -> int:
    try:
        return worker.wait(10)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def seconds_to_reclaim(log: list[dict[str, float]], killed: dict[int, float]) -> list[float]:
    """For each job that died with its worker: time from the kill to its next delivery."""
    result = []
    for before in log:
        after = [
            line
            for line in log
            if (line["index"], line["deliveries"]) == (before["index"], before["deliveries"] + 1)
        ]
        if before["pid"] in killed and after:
            result.append(after[0]["time"] - killed[int(before["pid"])])
    return result


@pytest.mark.parametrize(
    ("jobs", "seconds"),
    [(1000, 120), pytest.param(10_000, 600, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
async def test_killing_random_workers_loses_nothing_and_applies_nothing_twice(
    queue_url: str, queue: Queue, tmp_path: Path, jobs: int, seconds: float
) -> None:
    heartbeat = 2.0
    options = WorkerOptions(
        queue_url, queue.keys.namespace, TEACHER, str(tmp_path / "log"),
        heartbeat=heartbeat, work_seconds=0.05, max_deliveries=20,
    )  # fmt: skip
    async with Queue(queue_url, queue.keys.namespace) as wide:
        await submit_all(wide, jobs)
        fleet = Fleet(options, 3)
        try:
            collecting = asyncio.create_task(collect(wide, jobs, seconds))
            while not collecting.done():
                await asyncio.wait([collecting], timeout=0.7)
                if (await wide.teacher_stats(TEACHER)).jobs.waiting > 50:
                    await asyncio.to_thread(fleet.kill_one)
            groups = collecting.result()
        finally:
            fleet.stop()
        stats = await wide.teacher_stats(TEACHER)
    times = seconds_to_reclaim(read_log(options.log), fleet.killed)
    print(f"{jobs} jobs, {len(fleet.killed)} kills, {len(times)} reclaimed, slowest {max(times):.2f} s")
    assert Counter(scored.group.index for scored in groups) == Counter(range(jobs))
    assert all(scored.scores["teacher"].request_id == scored.group.id for scored in groups)
    assert (stats.scored, stats.queued_tokens, stats.dead, stats.jobs.in_flight) == (jobs, 0, 0, 0)
    assert len(fleet.killed) >= 2
    assert max(times) <= 2 * heartbeat


async def test_job_that_kills_its_workers_is_buried_after_three_deliveries(
    queue_url: str, queue: Queue, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    options = WorkerOptions(
        queue_url, queue.keys.namespace, TEACHER, str(log), heartbeat=0.4, concurrency=1, crash_every=1
    )
    await submit_all(queue, 1)
    workers = [start_worker(options) for _ in range(3)]
    try:
        for worker in workers:
            assert await asyncio.to_thread(worker.wait, 20) == 1
    finally:
        for worker in workers:
            worker.kill()
    assert [line["deliveries"] for line in read_log(log)] == [1, 2, 3]
    async with queue.jobs(TEACHER, "survivor") as survivor:
        collecting = asyncio.create_task(collect(queue, 1, 10))
        while not collecting.done():
            assert await survivor.claim(1, 100) == []
        [failed] = collecting.result()
    assert failed.status == "failed"
    assert "3 deliveries" in failed.errors["teacher"]


async def healthy_per_second(queue: Queue, jobs: int, fail_every: int, log: Path) -> float:
    await submit_all(queue, jobs)
    options = WorkerOptions(
        "", "", TEACHER, str(log), work_seconds=0.03, concurrency=8, fail_every=fail_every
    )
    stopping = asyncio.Event()
    async with queue.jobs(TEACHER, "worker") as worker:
        started = time.monotonic()
        working = asyncio.create_task(work(worker, options, stopping))
        groups = await collect(queue, jobs, 60)
        seconds = time.monotonic() - started - 0.2  # the last look for one too many
        stopping.set()
        await working
    healthy = [scored for scored in groups if scored.status == "scored"]
    assert len(groups) == jobs
    await queue.scored(RUN).acknowledge(groups)
    return len(healthy) / seconds


async def test_poison_is_buried_after_three_deliveries_and_slows_nobody(
    queue_url: str, queue: Queue, tmp_path: Path
) -> None:
    jobs, every = 300, 100
    ratios = []
    for attempt in range(5):
        # A noisy machine may disturb one pair of runs; it does not disturb five.
        rates = []
        for fail_every in (0, every):
            name = f"{queue.keys.namespace}:{attempt}:{fail_every}"
            log = tmp_path / f"{attempt}-{fail_every}"
            async with Queue(queue_url, name) as mine:
                rates.append(await healthy_per_second(mine, jobs, fail_every, log))
                if fail_every:
                    letters = await mine.dead_letters(TEACHER)
                    assert {letter.group for letter in letters} == {
                        f"{RUN}-{i}" for i in range(0, jobs, every)
                    }
                    assert {letter.deliveries for letter in letters} == {3}
                    deliveries = Counter(line["index"] for line in read_log(log))
                    assert {deliveries[i] for i in range(jobs) if i % every} == {1}
                    assert {deliveries[i] for i in range(0, jobs, every)} == {3}
        ratios.append(rates[1] / rates[0])
        if ratios[-1] >= 0.95:
            break
    print(f"healthy throughput with 1% poison: {max(ratios):.3f} of a run without")
    assert max(ratios) >= 0.95


async def test_live_job_twenty_times_its_lease_is_never_redelivered(
    queue_url: str, queue: Queue, tmp_path: Path
) -> None:
    lease = LeaseSettings(heartbeat=0.3)
    rival_options = WorkerOptions(
        queue_url, queue.keys.namespace, TEACHER, str(tmp_path / "log"), heartbeat=lease.heartbeat
    )
    async with (
        Queue(queue_url, queue.keys.namespace, lease=lease) as mine,
        mine.jobs(TEACHER, "slow") as slow,
    ):
        await submit_all(mine, 1)
        [claim] = await slow.claim(1, 1000)
        rival = start_worker(rival_options)
        try:
            # The event loop hangs, as in a long call into an engine; only the thread is left.
            time.sleep(20 * lease.lease)  # noqa: ASYNC251
            assert rival.poll() is None
            assert slow.holds(claim)
            assert read_log(rival_options.log) == []
            assert await slow.commit(claim, b"")
        finally:
            rival.send_signal(signal.SIGTERM)
            wait_or_kill(rival)
        [scored] = await collect(mine, 1, 5)
        assert scored.status == "scored"


async def test_worker_that_lost_its_lease_knows_it_and_cannot_take_it_back(
    queue_url: str, queue: Queue, tmp_path: Path
) -> None:
    """A stopped process wakes up late: its heartbeat must not steal the job from its new owner."""
    options = WorkerOptions(
        queue_url, queue.keys.namespace, TEACHER, str(tmp_path / "log"), heartbeat=0.3, work_seconds=30
    )
    async with Queue(queue_url, queue.keys.namespace, lease=LeaseSettings(heartbeat=0.3)) as mine:
        await submit_all(mine, 1)
        sleeper = start_worker(options)
        try:
            while not read_log(options.log):  # noqa: ASYNC110 another process writes it
                await asyncio.sleep(0.05)
            os.kill(sleeper.pid, signal.SIGSTOP)
            async with mine.jobs(TEACHER, "rival") as rival:
                [claim] = await rival.claim(1, 5000)
                assert claim.deliveries == 2
                os.kill(sleeper.pid, signal.SIGCONT)
                await asyncio.sleep(0.6)
                assert rival.holds(claim)
                stream = mine.keys.jobs(TEACHER)
                [row] = await mine._client.xpending_range(stream.stream, stream.group, "-", "+", 10)
                assert row["consumer"].decode() == rival.consumer
                assert await rival.commit(claim, b"")
        finally:
            sleeper.kill()
            sleeper.wait()
