"""The server dies, stays away, or loses its replies: what was acknowledged is there, and only once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.queue_data import make_group, make_request, make_scores
from support.queue_proxy import LossyProxy
from support.queue_run import RUN, TEACHER, SmallRun
from support.queue_worker import WorkerOptions, start_worker
from tutelage.v1.rollout_pb2 import SampleOrder

from services.queue import Failed, LeaseSettings, Queue, Submitted, scripts
from services.queue.embedded import EmbeddedServer

pytest_plugins = ["support.queue_server"]

LEASE = LeaseSettings(heartbeat=0.4, max_deliveries=20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "server") as server:
        yield server


def kill(server: EmbeddedServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    while server.running:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("groups", "cycles"),
    [(600, 4), pytest.param(6000, 40, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
async def test_killing_the_server_under_load_loses_nothing_acknowledged(
    server: EmbeddedServer, groups: int, cycles: int
) -> None:
    kills = 0
    async with Queue(server.url, "run", lease=LEASE) as queue:
        run = SmallRun(server.url, "run", groups, queue)

        async def restart() -> None:
            nonlocal kills
            while kills < cycles and not run.done():
                before = len(run.applied)
                await asyncio.sleep(0.3)
                await run.reaches(before + 1)
                await asyncio.to_thread(kill, server)
                kills += 1
                await asyncio.to_thread(server.start)

        async with asyncio.timeout(60 + cycles * 5):
            await asyncio.gather(run.train(), run.sample(0.002), run.score(), run.score(), restart())
        assert await queue.scored(RUN).read(1, 200) == []
        stats = await queue.teacher_stats(TEACHER)
    print(f"{groups} groups, {kills} kills of the server")
    assert kills == cycles
    assert run.applied == Counter(range(groups))
    assert run.promised == set(range(groups))
    assert (stats.queued_tokens, stats.jobs.in_flight, stats.scored) == (0, 0, groups)


@pytest.mark.parametrize("away", [3.0, pytest.param(30.0, marks=pytest.mark.long)])
async def test_work_resumes_within_five_seconds_after_the_server_was_away(
    server: EmbeddedServer, tmp_path: Path, away: float
) -> None:
    options = WorkerOptions(
        server.url, "run", TEACHER, str(tmp_path / "log"),
        heartbeat=LEASE.heartbeat, max_deliveries=LEASE.max_deliveries, work_seconds=0.01,
    )  # fmt: skip
    groups = 300
    async with Queue(server.url, "run", lease=LEASE) as queue:
        run = SmallRun(server.url, "run", groups, queue)
        workers = [start_worker(options) for _ in range(2)]
        returned = 0.0

        async def interrupt() -> None:
            nonlocal returned
            await run.reaches(20)
            await asyncio.to_thread(kill, server)
            await asyncio.sleep(away)
            await asyncio.to_thread(server.start)
            returned = time.monotonic()

        try:
            with queue.presence("trainer", "t"):
                async with asyncio.timeout(60 + away):
                    await asyncio.gather(run.train(), run.sample(0.01), interrupt())
                assert await queue.alive("trainer") != {}
            assert [worker.poll() for worker in workers] == [None, None]
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
            assert [await asyncio.to_thread(worker.wait, 10) for worker in workers] == [0, 0]
        finally:
            for worker in workers:
                worker.kill()
    resumed = min(at for at in run.applied_at if at > returned) - returned
    print(f"server away {away:.0f} s, work resumed after {resumed:.2f} s")
    assert resumed <= 5
    assert run.applied == Counter(range(groups))


async def test_lost_replies_at_random_train_no_group_twice(queue_url: str, queue: Queue) -> None:
    async with LossyProxy(queue_url.removeprefix("unix://"), loss=0.05) as proxy:
        async with Queue(proxy.url, queue.keys.namespace, lease=LEASE) as lossy:
            run = SmallRun(proxy.url, queue.keys.namespace, 200, lossy)
            async with asyncio.timeout(60):
                await asyncio.gather(run.train(), run.sample(0), run.score(), run.score())
        assert proxy.lost > 20
    assert await queue.scored(RUN).read(1, 200) == []
    assert run.applied == Counter(range(200))
    stats = await queue.teacher_stats(TEACHER)
    assert (stats.queued_tokens, stats.jobs.in_flight, stats.scored, stats.dead) == (0, 0, 200, 0)


async def test_each_write_survives_the_loss_of_its_reply(queue_url: str, queue: Queue) -> None:
    """The server has done it, the connection breaks, the client asks again: still done once."""
    order, group = SampleOrder(id="o", run=RUN, num_groups=1), make_group(RUN, 0)
    async with (
        LossyProxy(queue_url.removeprefix("unix://")) as proxy,
        Queue(proxy.url, queue.keys.namespace, lease=LEASE) as lossy,
        lossy.orders(RUN, "sampler") as sampler,
        lossy.jobs(TEACHER, "replica") as replica,
    ):
        lose = lambda name: proxy.lose_next(script_hash(name))  # noqa: E731

        lose("place")
        await lossy.place_order(order)
        assert (await queue.run_stats(RUN)).orders.length == 1

        proxy.lose_next(b"XREADGROUP")
        [claimed] = await sampler.claim(4, 3000)
        assert (claimed.order.id, claimed.deliveries) == ("o", 1)

        lose("submit")
        outcome = await lossy.submit_group(group, [make_request(TEACHER)], order=claimed)
        assert outcome is Submitted.EXISTS
        assert (await queue.teacher_stats(TEACHER)).jobs.length == 1

        lose("finish")
        await sampler.finish(claimed)
        assert (await queue.run_stats(RUN)).orders.in_flight == 0

        [claim] = await replica.claim(1, 1000)
        lose("fail")
        assert await replica.fail(claim, "INTERNAL: once") is Failed.RETRY
        lose("reclaim")
        [claim] = await replica.claim(1, 3000)
        assert claim.deliveries == 2

        lose("commit")
        assert await replica.commit(claim, make_scores("x"))
        stats = await queue.teacher_stats(TEACHER)
        assert (stats.queued_tokens, stats.scored, stats.jobs.in_flight) == (0, 1, 0)

        reader = lossy.scored(RUN)
        proxy.lose_next(b"XREADGROUP")
        [scored] = await reader.read(4, 3000)
        lose("acknowledge")
        await reader.acknowledge([scored])
        assert proxy.lost == 9
    assert await queue.scored(RUN).read(4, 200) == []


async def test_job_found_before_a_reply_was_lost_is_found_again(queue_url: str, queue: Queue) -> None:
    """A claim that took over a job and then broke has told nobody: the job must not stay leased."""
    await queue.submit_group(make_group(RUN, 0), [make_request(TEACHER)])
    async with (
        LossyProxy(queue_url.removeprefix("unix://")) as proxy,
        Queue(proxy.url, queue.keys.namespace, lease=LEASE) as lossy,
        lossy.jobs(TEACHER, "replica") as replica,
    ):
        [claim] = await replica.claim(4, 1000)
        await replica.fail(claim, "INTERNAL: once")
        proxy.lose_next(b"XREADGROUP")
        [again] = await replica.claim(4, 3000)
        assert proxy.lost == 1
        assert (again.entry, again.deliveries) == (claim.entry, 2)


def script_hash(name: str) -> bytes:
    return hashlib.sha1(scripts.source(name).encode()).hexdigest().encode()
