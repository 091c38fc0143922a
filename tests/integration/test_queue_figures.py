"""What the queue tells about itself on a real server: for people, for Prometheus and for autoscalers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from support.queue_data import VIEW_TOKENS, make_group, make_request, make_scores
from tutelage.v1.rollout_pb2 import Group, Rollout, SampleOrder

from services.queue import JobWorker, LeaseSettings, OrderWorker, Queue, Submitted, sampler_role, teacher_role

pytest_plugins = ["support.queue_server"]

RUN, TEACHER = "run", "big"
NOW = LeaseSettings(heartbeat=3600)


@pytest.fixture
async def wide(queue_url: str, queue: Queue) -> Any:
    """A queue with room for everything, whose leases last."""
    async with Queue(queue_url, queue.keys.namespace, max_queued_tokens=10**9, lease=NOW) as handle:
        yield handle


async def submit(queue: Queue, *indices: int) -> None:
    for index in indices:
        answer = await queue.submit_group(sized(index), [make_request(TEACHER)])
        assert answer is Submitted.QUEUED


def sized(index: int) -> Group:
    """A group with one more token for every index."""
    group = make_group(RUN, index)
    group.rollouts.append(Rollout(response_ids=bytes(4 * index)))
    return group


def tokens(*indices: int) -> int:
    return sum(VIEW_TOKENS + index for index in indices)


async def split(queue: Queue) -> tuple[int, int, int, int]:
    """Jobs and tokens: waiting, in flight."""
    stats = await queue.teacher_stats(TEACHER)
    assert stats.waiting_tokens + stats.in_flight_tokens == stats.queued_tokens
    return stats.jobs.waiting, stats.waiting_tokens, stats.jobs.in_flight, stats.in_flight_tokens


async def settle(worker: JobWorker | OrderWorker) -> None:
    """Let its first heartbeat pass: the next one is an hour away, and what is handed back stays so."""
    while worker._heart.in_contact == 0.0:  # noqa: ASYNC110 another thread
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)


# Names.


async def test_teachers_and_runs_are_known_by_whoever_asked_or_joined(queue: Queue) -> None:
    assert (await queue.teachers(), await queue.runs()) == ([], [])
    await queue.submit_group(make_group("direct", 0), [make_request("asked")])
    await queue.place_order(SampleOrder(id="o", run="ordered"))
    async with queue.jobs("joined", "replica"), queue.orders("sampled", "sampler"):
        assert await queue.teachers() == ["asked", "joined"]
        assert await queue.runs() == ["direct", "ordered", "sampled"]
    assert await queue.teachers() == ["asked", "joined"], "a replica that leaves leaves its queue behind"


async def test_a_refused_group_makes_its_names_known(queue: Queue) -> None:
    """Or a queue that an older version filled would stay unknown, and nobody would start a replica for it."""
    client: Any = queue._client
    await submit(queue, 0)
    await client.delete(queue.keys.teachers, queue.keys.runs)
    too_much = make_group(RUN, 1)
    too_much.rollouts.append(Rollout(response_ids=bytes(4 * 1000)))
    both = [make_request(TEACHER, "a"), make_request("other", "b")]
    assert await queue.submit_group(too_much, both) is Submitted.FULL
    assert (await queue.teachers(), await queue.runs()) == ([TEACHER, "other"], [RUN])


# What waits and what is being worked on.


async def test_tokens_move_from_waiting_to_in_flight_and_away(wide: Queue) -> None:
    await submit(wide, 0, 1, 2)
    assert await split(wide) == (3, tokens(0, 1, 2), 0, 0)
    async with wide.jobs(TEACHER, "replica") as replica:
        claims = await replica.claim(2, 1000)
        assert await split(wide) == (1, tokens(2), 2, tokens(0, 1))
        await replica.commit(claims[0], make_scores("x"))
        assert await split(wide) == (1, tokens(2), 1, tokens(1))
        await replica.bury(claims[1], "INVALID_ARGUMENT: no")
        assert await split(wide) == (1, tokens(2), 0, 0)
        await wide.trim(teachers=[TEACHER])
        [last] = await replica.claim(1, 1000)
        assert await split(wide) == (0, 0, 1, tokens(2))
        await replica.commit(last, make_scores("x"))
    stats = await wide.teacher_stats(TEACHER)
    assert await split(wide) == (0, 0, 0, 0)
    assert (stats.scored, stats.dead, stats.jobs.oldest_age) == (2, 1, 0.0)


async def test_what_is_handed_back_waits_again(wide: Queue) -> None:
    await submit(wide, 0, 1, 2, 3)
    async with wide.jobs(TEACHER, "replica") as replica:
        await settle(replica)
        failed, released, kept = await replica.claim(3, 1000)
        await replica.fail(failed, "INTERNAL: once")
        assert await split(wide) == (2, tokens(0, 3), 2, tokens(1, 2))
        await replica.release(released)
        assert await split(wide) == (3, tokens(0, 1, 3), 1, tokens(2))
        assert replica.holds(kept)
    # The replica has left.
    assert await split(wide) == (4, tokens(0, 1, 2, 3), 0, 0)


async def test_jobs_of_a_dead_replica_wait_again_once_their_lease_has_run_out(queue: Queue) -> None:
    await submit(queue, 0, 1)
    async with queue.jobs(TEACHER, "dead") as dead:
        await dead.claim(1, 1000)
        dead._heart.stop()
        assert (await split(queue))[2:] == (1, tokens(0))
        await asyncio.sleep(queue.lease.lease + 0.1)
        assert await split(queue) == (2, tokens(0, 1), 0, 0)


async def test_many_jobs_handed_back_are_counted_and_their_tokens_estimated(wide: Queue) -> None:
    """More than are read one by one; one stays held, so not all of them may be taken for all."""
    total = 1100
    await submit(wide, *range(total))
    async with wide.jobs(TEACHER, "replica") as replica:
        await settle(replica)
        claims = [claim for _ in range(11) for claim in await replica.claim(100, 1000)]
        for claim in claims[1:]:
            await replica.release(claim)
        waiting, waiting_tokens, held, held_tokens = await split(wide)
        assert (waiting, held) == (total - 1, 1)
        assert waiting_tokens == pytest.approx(tokens(*range(1, total)), rel=0.01)
        assert held_tokens >= 0


async def test_an_entry_of_somebody_else_in_front_does_not_hide_what_waits(wide: Queue) -> None:
    client: Any = wide._client
    await submit(wide, 0)
    async with wide.jobs(TEACHER, "replica") as replica:
        await replica.commit((await replica.claim(1, 1000))[0], make_scores("x"))
    await client.xadd(wide.keys.jobs(TEACHER).stream, {"what": "ever"})
    await submit(wide, 1)
    assert await split(wide) == (2, tokens(1), 0, 0)


async def leave_as_an_older_version(queue: Queue, count: int) -> None:
    """Jobs of ten tokens each, without the counts that load.lua goes by."""
    client: Any = queue._client
    jobs = queue.keys.jobs(TEACHER)
    for index in range(count):
        await client.xadd(jobs.stream, {"group": f"{RUN}-{index}", "view": "v", "run": RUN, "tokens": 10})
        await client.hincrby(jobs.load, "queued_tokens", 10)
    await client.xgroup_create(jobs.stream, jobs.group, "0")


async def test_a_backlog_of_an_older_version_waits(wide: Queue) -> None:
    await leave_as_an_older_version(wide, 40)
    assert await split(wide) == (40, 400, 0, 0)
    async with wide.jobs(TEACHER, "replica") as replica:
        assert len(await replica.claim(10, 1000)) == 10
        assert await split(wide) == (30, 300, 10, 100)


async def test_the_last_of_an_older_version_waits_with_what_came_after(wide: Queue) -> None:
    await leave_as_an_older_version(wide, 3)
    await submit(wide, 0)
    async with wide.jobs(TEACHER, "replica") as replica:
        assert len(await replica.claim(1, 1000)) == 1
        assert await split(wide) == (3, 20 + tokens(0), 1, 10)


async def test_figures_survive_an_entry_deleted_by_hand(wide: Queue) -> None:
    """After it the server itself no longer knows the lag."""
    client: Any = wide._client
    stream = wide.keys.jobs(TEACHER).stream
    await submit(wide, 0, 1, 2)
    (first, *_) = await client.xrange(stream, count=2)
    await client.xdel(stream, (await client.xrange(stream))[1][0])
    async with wide.jobs(TEACHER, "replica") as replica:
        [claim] = await replica.claim(1, 1000)
        assert claim.entry == first[0].decode()
        waiting, _, in_flight, _ = await split(wide)
        assert (waiting, in_flight) == (1, 1)


async def test_age_is_that_of_the_oldest_unfinished_job_by_the_servers_clock(wide: Queue) -> None:
    await submit(wide, 0)
    await asyncio.sleep(0.3)
    await submit(wide, 1)
    assert 0.3 <= (await wide.teacher_stats(TEACHER)).jobs.oldest_age < 5
    async with wide.jobs(TEACHER, "replica") as replica:
        [old] = await replica.claim(1, 1000)
        assert (await wide.teacher_stats(TEACHER)).jobs.oldest_age >= 0.3
        await replica.commit(old, make_scores("x"))
        assert (await wide.teacher_stats(TEACHER)).jobs.oldest_age < 0.3


async def test_a_queue_that_nobody_has_asked_is_all_zeros(queue: Queue) -> None:
    stats = await queue.teacher_stats("nobody")
    assert (stats.queued_tokens, stats.waiting_tokens, stats.in_flight_tokens, stats.scored) == (0, 0, 0, 0)
    assert (stats.jobs.length, stats.jobs.waiting, stats.jobs.oldest_age) == (0, 0, 0.0)
    assert (await queue.run_stats("nothing")).orders.waiting == 0


# Runs.


async def test_orders_handed_back_wait_again_and_read_groups_stay_with_the_trainer(wide: Queue) -> None:
    for name in ("a", "b"):
        await wide.place_order(SampleOrder(id=name, run=RUN))
    async with wide.orders(RUN, "sampler") as sampler:
        await settle(sampler)
        [first] = await sampler.claim(1, 1000)
        orders = (await wide.run_stats(RUN)).orders
        assert (orders.waiting, orders.in_flight) == (1, 1)
        await sampler.release(first)
        orders = (await wide.run_stats(RUN)).orders
        assert (orders.waiting, orders.in_flight) == (2, 0)
    await wide.submit_group(make_group(RUN, 0), [])
    await wide.submit_group(make_group(RUN, 1), [])
    await wide.scored(RUN).read(1, 1000)
    async with Queue(wide.url, wide.keys.namespace, lease=LeaseSettings(heartbeat=0.01)) as quick:
        await asyncio.sleep(0.1)
        scored = (await quick.run_stats(RUN)).scored
    # However long ago it was read: nobody else may have it.
    assert (scored.waiting, scored.in_flight) == (1, 1)


# Who is there.


async def test_a_name_that_stopped_is_forgotten_while_others_of_its_role_go_on(
    queue_url: str, queue: Queue
) -> None:
    """Samplers come and go under new names; what is kept of them must not grow."""
    async with Queue(queue_url, queue.keys.namespace, lease=LeaseSettings(heartbeat=0.1)) as quick:
        client: Any = quick._client
        with quick.presence("sampler:run", "stays"):
            with quick.presence("sampler:run", "goes"):
                await asyncio.sleep(0.2)
                assert set(await quick.alive("sampler:run")) == {"stays", "goes"}
            await asyncio.sleep(0.8)
            assert await client.hkeys(quick.keys.present("sampler:run")) == [b"stays"]
        await asyncio.sleep(0.8)
        assert not await client.exists(quick.keys.present("sampler:run"))


# Everything at once.


async def test_overview_tells_the_same_as_each_question_alone(queue: Queue) -> None:
    await submit(queue, 0, 1)
    await queue.submit_group(make_group("other", 0), [make_request("small")])
    await queue.place_order(SampleOrder(id="o", run=RUN))
    with (
        queue.presence(teacher_role(TEACHER), "r-0"),
        queue.presence(teacher_role(TEACHER), "r-1"),
        queue.presence(sampler_role(RUN), "s"),
        queue.presence("trainer", RUN),
    ):
        end = time.monotonic() + 10
        while len(await queue.alive(teacher_role(TEACHER))) < 2 or not await queue.alive("trainer"):
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        while not await queue.alive(sampler_role(RUN)):
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        seen = await queue.overview()
    assert list(seen.teachers) == await queue.teachers() == [TEACHER, "small"]
    assert list(seen.runs) == await queue.runs() == ["other", RUN]
    for name, stats in seen.teachers.items():
        alone = await queue.teacher_stats(name)
        assert (stats.waiting_tokens, stats.jobs.waiting) == (alone.waiting_tokens, alone.jobs.waiting)
        assert stats.waiting_tokens > 0
    assert (seen.runs[RUN].orders.waiting, seen.runs["other"].orders.waiting) == (1, 0)
    assert seen.replicas == {TEACHER: 2, "small": 0}
    assert seen.samplers == {"other": 0, RUN: 1}
    assert seen.trainers == {"other": 0, RUN: 1}
    assert seen.server.memory_bytes > 0
    assert seen.server.clients >= 1


async def test_overview_makes_a_server_that_forgot_the_script_know_it_again(queue: Queue) -> None:
    await submit(queue, 0)
    await queue.overview()
    await queue._client.script_flush()
    assert (await queue.overview()).teachers[TEACHER].waiting_tokens == tokens(0)


async def test_looking_searches_no_keys(queue: Queue) -> None:
    """However many groups are stored: SCAN and KEYS would take longer with every one of them."""
    await submit(queue, 0, 1)
    client: Any = queue._client
    await queue.overview()
    before = await client.info("commandstats")
    await queue.overview()
    await queue.alive(teacher_role(TEACHER))
    after = await client.info("commandstats")
    used = {name for name, stats in after.items() if stats["calls"] > before.get(name, {"calls": 0})["calls"]}
    assert "cmdstat_evalsha" in used
    assert not {"cmdstat_scan", "cmdstat_keys"} & used
