"""A group's way through a real server, and every way in which it can leave the happy path."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import redis
from support.queue_data import VIEW_TOKENS, make_group, make_request, make_scores
from tutelage.v1.rollout_pb2 import Group, SampleOrder, ViewRequest
from tutelage_client.errors import TutelageError

from services.queue import Failed, JobClaim, JobWorker, LeaseSettings, Queue, Submitted

pytest_plugins = ["support.queue_server"]

RUN, TEACHER = "run", "big"


async def submit(queue: Queue, index: int = 0, **extra: int) -> Group:
    group = make_group(RUN, index)
    assert await queue.submit_group(group, [make_request(TEACHER)], **extra) is Submitted.QUEUED
    return group


async def take(worker: JobWorker) -> JobClaim:
    [claim] = await worker.claim(1, 2000)
    return claim


async def test_group_travels_from_order_to_acknowledgement(queue: Queue) -> None:
    order = SampleOrder(id="run-s0-0", run=RUN, num_groups=1)
    assert await queue.place_order(order)
    assert not await queue.place_order(order)

    async with queue.orders(RUN, "sampler") as sampler:
        [claimed] = await sampler.claim(4, 1000)
        assert claimed.order == order
        group, requests = make_group(RUN, 0), [make_request("big"), make_request("small", "reference")]
        assert await queue.submit_group(group, requests, order=claimed) is Submitted.QUEUED
        assert await queue.submit_group(group, requests, order=claimed) is Submitted.EXISTS
        assert await sampler.finish(claimed)
        assert not await sampler.finish(claimed)
    assert not await queue.place_order(order)

    stats = await queue.teacher_stats("big")
    assert (stats.queued_tokens, stats.jobs.waiting, stats.jobs.in_flight) == (VIEW_TOKENS, 1, 0)

    reader = queue.scored(RUN)
    for teacher, view in (("big", "teacher"), ("small", "reference")):
        assert await reader.read(1, 0) == []
        async with queue.jobs(teacher, "replica") as replica:
            claim = await take(replica)
            assert (claim.view, claim.deliveries, claim.traceparent) == (view, 1, group.traceparent)
            assert await replica.load(claim) == (group, make_request(teacher, view))
            assert await replica.commit(claim, make_scores(teacher))
            assert replica.held == 0

    [scored] = await reader.read(4, 1000)
    assert (scored.group, scored.status) == (group, "scored")
    answers = {view: answer.request_id for view, answer in scored.scores.items()}
    assert answers == {"teacher": "big", "reference": "small"}
    await reader.acknowledge([scored])
    assert await queue.scored(RUN).read(1, 0) == []
    stats = await queue.teacher_stats("big")
    assert (stats.queued_tokens, stats.scored, stats.jobs.in_flight, stats.jobs.consumers) == (0, 1, 0, 0)


async def test_an_autoscaler_sees_lag_before_the_first_replica_and_pending_while_one_works(
    queue_url: str, queue: Queue
) -> None:
    """What KEDA's redis-streams scaler asks for, with the names of its trigger."""
    stream, group = queue.keys.jobs(TEACHER).stream, "replicas"
    with redis.Redis.from_url(queue_url) as client:

        def seen() -> tuple[int | None, int]:
            lags = {info["name"].decode(): info["lag"] for info in client.xinfo_groups(stream)}  # type: ignore[union-attr]
            return lags[group], client.xpending(stream, group)["pending"]  # type: ignore[index]

        for index in range(3):
            await submit(queue, index)
            assert seen() == (index + 1, 0)
        async with queue.jobs(TEACHER, "replica") as worker:
            claims = [await take(worker) for _ in range(3)]
            assert seen() == (0, 3)
            for claim in claims:
                assert await worker.commit(claim, make_scores("big"))
        await queue.trim(teachers=[TEACHER])
        assert seen() == (0, 0)
        await submit(queue, 3)
        assert seen() == (1, 0)


async def test_group_without_views_goes_straight_to_the_trainer(queue: Queue) -> None:
    group = make_group(RUN, 0)
    assert await queue.submit_group(group, []) is Submitted.QUEUED
    [scored] = await queue.scored(RUN).read(1, 1000)
    assert (scored.group, scored.scores, scored.status) == (group, {}, "scored")


async def test_submit_is_refused_while_the_queued_tokens_are_over_the_limit(queue: Queue) -> None:
    accepted = 100 // VIEW_TOKENS
    for index in range(accepted):
        await submit(queue, index)
    late = make_group(RUN, accepted)
    assert await queue.submit_group(late, [make_request(TEACHER)]) is Submitted.FULL
    # One teacher that is full refuses the whole group: nothing of it may be stored.
    both = [make_request("idle", "a"), make_request(TEACHER, "b")]
    assert await queue.submit_group(late, both) is Submitted.FULL
    assert (await queue.teacher_stats("idle")).queued_tokens == 0
    async with queue.jobs(TEACHER, "replica") as replica:
        await replica.commit(await take(replica), make_scores("x"))
    assert await queue.submit_group(late, [make_request(TEACHER)]) is Submitted.QUEUED


async def test_group_larger_than_the_limit_enters_an_empty_queue(queue_url: str, queue: Queue) -> None:
    async with Queue(queue_url, queue.keys.namespace, max_queued_tokens=VIEW_TOKENS - 1) as small:
        await submit(small)


async def test_first_commit_wins_and_its_scores_stay(queue: Queue) -> None:
    await submit(queue)
    async with queue.jobs(TEACHER, "a") as first, queue.jobs(TEACHER, "b") as second:
        claim = await take(first)
        assert await second.commit(claim, make_scores("second"))
        assert not await first.commit(claim, make_scores("first"))
        # Asking twice, as after a lost reply, still says who won.
        assert await second.commit(claim, make_scores("second again"))
    [scored] = await queue.scored(RUN).read(4, 1000)
    assert scored.scores["teacher"].request_id == "second"
    stats = await queue.teacher_stats(TEACHER)
    assert (stats.queued_tokens, stats.scored) == (0, 1)


async def test_expired_job_never_reaches_a_worker_and_fails_its_group(queue: Queue) -> None:
    group = await submit(queue, deadline_ms=int(time.time() * 1000) - 1)
    await submit(queue, 1, deadline_ms=int(time.time() * 1000) + 60_000)
    async with queue.jobs(TEACHER, "replica") as replica:
        claims = await replica.claim(4, 500)
        assert [claim.group for claim in claims] == [f"{RUN}-1"]
        [failed] = await queue.scored(RUN).read(4, 1000)
        assert (failed.group, failed.status) == (group, "failed")
        assert failed.errors["teacher"].startswith("DEADLINE_EXCEEDED")
        stats = await queue.teacher_stats(TEACHER)
        assert (stats.expired, stats.dead, stats.queued_tokens) == (1, 0, VIEW_TOKENS)


async def test_job_that_expires_after_a_failed_delivery_is_not_delivered_again(queue: Queue) -> None:
    await submit(queue, deadline_ms=int(time.time() * 1000) + 300)
    async with queue.jobs(TEACHER, "replica") as replica:
        await replica.fail(await take(replica), "INTERNAL: first try")
        await asyncio.sleep(0.4)
        assert await replica.claim(1, 1000) == []
    assert (await queue.teacher_stats(TEACHER)).expired == 1


async def test_job_of_a_vanished_group_is_acknowledged_and_skipped(queue: Queue) -> None:
    both = [make_request(TEACHER), make_request("other", "late")]
    group = make_group(RUN, 0)
    await queue.submit_group(group, both)
    async with queue.jobs("other", "replica") as other:
        assert await other.bury(await take(other), "INVALID_ARGUMENT: no") is Failed.DEAD
    reader = queue.scored(RUN)
    await reader.acknowledge(await reader.read(1, 1000))
    async with queue.jobs(TEACHER, "replica") as replica:
        assert await replica.load(await take(replica)) is None
        assert replica.held == 0
    stats = await queue.teacher_stats(TEACHER)
    assert (stats.queued_tokens, stats.jobs.in_flight, stats.scored) == (0, 0, 0)


async def test_third_failure_makes_a_dead_letter_and_fails_the_group_once(queue: Queue) -> None:
    group = make_group(RUN, 0)
    await queue.submit_group(group, [make_request(TEACHER), make_request("other", "late")])
    async with queue.jobs(TEACHER, "replica") as replica:
        for attempt, outcome in ((1, Failed.RETRY), (2, Failed.RETRY), (3, Failed.DEAD)):
            claim = await take(replica)
            assert claim.deliveries == attempt
            assert await replica.fail(claim, f"INTERNAL: try {attempt}") is outcome
        assert await replica.fail(claim, "INTERNAL: again") is Failed.LOST
        assert not await replica.commit(claim, make_scores("too late"))
    [letter] = await queue.dead_letters(TEACHER)
    assert (letter.group, letter.view, letter.deliveries) == (group.id, "teacher", 3)
    assert letter.error == "INTERNAL: try 3"
    reader = queue.scored(RUN)
    [failed] = await reader.read(4, 1000)
    assert failed.errors == {"teacher": "INTERNAL: try 3"}
    async with queue.jobs("other", "replica") as other:
        assert await other.load(await take(other)) is None
    assert await reader.read(4, 0) == []
    assert (await queue.teacher_stats(TEACHER)).dead == 1


async def test_group_whose_every_view_is_buried_fails_once(queue: Queue) -> None:
    await queue.submit_group(make_group(RUN, 0), [make_request("a", "first"), make_request("b", "second")])
    for teacher in ("a", "b"):
        async with queue.jobs(teacher, "replica") as replica:
            await replica.bury(await take(replica), f"INVALID_ARGUMENT: {teacher}")
    reader = queue.scored(RUN)
    [failed] = [*await reader.read(4, 500), *await reader.read(4, 200)]
    assert failed.errors == {"first": "INVALID_ARGUMENT: a"}
    assert len(await queue.dead_letters("b")) == 1


async def test_released_job_comes_back_at_once_with_the_same_delivery_count(queue: Queue) -> None:
    await submit(queue)
    async with queue.jobs(TEACHER, "a") as first, queue.jobs(TEACHER, "b") as second:
        for _ in range(4):
            claim = await take(first)
            await first.release(claim)
        again = await take(second)
        assert (again.entry, again.deliveries) == (claim.entry, 1)


async def test_worker_that_leaves_hands_back_what_it_holds(queue: Queue) -> None:
    await submit(queue)
    async with queue.jobs(TEACHER, "a") as first:
        claim = await take(first)
    async with queue.jobs(TEACHER, "b") as second:
        again = await take(second)
        assert (again.entry, again.deliveries) == (claim.entry, 1)


async def test_silent_consumer_without_work_is_forgotten(queue: Queue) -> None:
    await submit(queue)
    async with queue.jobs(TEACHER, "busy") as busy, queue.jobs(TEACHER, "gone") as gone:
        await take(busy)
        await submit(queue, 1)  # a server may create a consumer only when it first gets something
        assert await gone.commit(await take(gone), make_scores("gone"))
        gone._heart.stop()
        assert (await queue.teacher_stats(TEACHER)).jobs.consumers == 2
        end = time.monotonic() + 10
        while (await queue.teacher_stats(TEACHER)).jobs.consumers > 1 and time.monotonic() < end:
            await busy.claim(1, 100)
        stats = await queue.teacher_stats(TEACHER)
        assert (stats.jobs.consumers, stats.jobs.in_flight) == (1, 1)


async def test_lost_order_stores_nothing_and_is_done_by_the_next_sampler(queue: Queue) -> None:
    await queue.place_order(SampleOrder(id="o", run=RUN))
    async with queue.orders(RUN, "a") as first, queue.orders(RUN, "b") as second:
        [old] = await first.claim(1, 1000)
        assert await queue.submit_group(make_group(RUN, 0), [], order=old) is Submitted.QUEUED
        await first.release(old)
        [new] = await second.claim(1, 2000)
        assert await queue.submit_group(make_group(RUN, 1), [], order=old) is Submitted.LOST
        assert await queue.submit_group(make_group(RUN, 1), [], order=new) is Submitted.QUEUED


async def test_redelivered_order_does_not_store_a_group_that_was_trained_and_deleted(queue: Queue) -> None:
    await queue.place_order(SampleOrder(id="o", run=RUN))
    async with queue.orders(RUN, "a") as sampler:
        [claim] = await sampler.claim(1, 1000)
        await queue.submit_group(make_group(RUN, 0), [], order=claim)
        reader = queue.scored(RUN)
        await reader.acknowledge(await reader.read(1, 1000))
        await sampler.release(claim)
        [again] = await sampler.claim(1, 2000)
        assert await queue.submit_group(make_group(RUN, 0), [], order=again) is Submitted.EXISTS
        assert await reader.read(1, 0) == []


async def test_buried_order_is_reported_and_can_be_placed_again(queue: Queue) -> None:
    order = SampleOrder(id="o", run=RUN)
    await queue.place_order(order)
    async with queue.orders(RUN, "a") as sampler:
        [claim] = await sampler.claim(1, 1000)
        assert not await queue.place_order(order, again=True)
        await sampler.bury(claim, "INTERNAL: no such policy")
        [letter] = await queue.dead_orders(RUN)
        assert (letter.order, letter.error) == ("o", "INTERNAL: no such policy")
        assert (await queue.run_stats(RUN)).dead_orders == 1
        assert not await queue.place_order(order)
        assert await queue.place_order(order, again=True)


async def test_buried_order_leaves_no_memory_of_what_it_submitted(queue: Queue) -> None:
    order = SampleOrder(id="o", run=RUN)
    await queue.place_order(order)
    async with queue.orders(RUN, "a") as sampler:
        [claim] = await sampler.claim(1, 1000)
        await queue.submit_group(make_group(RUN, 0), [], order=claim)
        await sampler.bury(claim, "INTERNAL: no such policy")
        assert not await queue._client.exists(queue.keys.submitted(RUN, "o"))
        assert await queue.submit_group(make_group(RUN, 1), [], order=claim) is Submitted.LOST
        await queue.place_order(order, again=True)
        [again] = await sampler.claim(1, 1000)
        assert await queue.submit_group(make_group(RUN, 0), [], order=again) is Submitted.EXISTS


async def test_new_reader_gets_unacknowledged_groups_first(queue: Queue) -> None:
    for index in range(3):
        await queue.submit_group(make_group(RUN, index), [])
    reader = queue.scored(RUN)
    first = await reader.read(2, 1000)
    assert [scored.group.index for scored in first] == [0, 1]
    await reader.acknowledge(first[:1])
    restarted = queue.scored(RUN)
    seen = [*await restarted.read(5, 1000), *await restarted.read(5, 1000)]
    assert [scored.group.index for scored in seen] == [1, 2]
    await restarted.acknowledge(seen)
    await restarted.acknowledge(seen)
    assert await queue.scored(RUN).read(5, 0) == []


async def test_groups_beside_a_leftover_survive_a_lost_connection(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3):
        await queue.submit_group(make_group(RUN, index), [])
    reader = queue.scored(RUN)
    client: Any = reader._client
    await client.delete(queue.keys.group(make_group(RUN, 2).id))
    acknowledge, lost = client.xack, iter([True])

    async def lose_once(*arguments: Any) -> Any:
        if next(lost, False):
            raise redis.ConnectionError("reset")
        return await acknowledge(*arguments)

    monkeypatch.setattr(client, "xack", lose_once)
    found = [*await reader.read(5, 1000), *await reader.read(5, 100)]
    assert [scored.group.index for scored in found] == [0, 1]


async def test_process_is_alive_until_it_stops_saying_so(queue_url: str, queue: Queue) -> None:
    async with Queue(queue_url, queue.keys.namespace, lease=LeaseSettings(heartbeat=0.2)) as quick:
        with quick.presence("replica", "r-1"), quick.presence("replica", "r-2"):
            await asyncio.sleep(0.3)
            ages = await quick.alive("replica")
            assert set(ages) == {"r-1", "r-2"}
            assert max(ages.values()) < 0.4
            assert await quick.alive("rep") == {}
        await asyncio.sleep(0.8)
        assert await quick.alive("replica") == {}


async def test_progress_merges_fields(queue: Queue) -> None:
    await queue.publish_progress(RUN, {"step": 3, "eval:0": {"greedy": 0.5}})
    await queue.publish_progress(RUN, {"step": 4, "loss": float("nan")})
    assert await queue.read_progress(RUN) == {"step": 4, "eval:0": {"greedy": 0.5}, "loss": None}


@pytest.mark.parametrize(
    ("group", "requests", "field"),
    [
        (Group(run=RUN), [], "id"),
        (Group(id="g"), [], "run"),
        (make_group(RUN, 0), [make_request("a"), make_request("b")], "view"),
        (make_group(RUN, 0), [ViewRequest(view="v")], "teacher"),
    ],
)
async def test_incomplete_group_is_refused(
    queue: Queue, group: Group, requests: list[ViewRequest], field: str
) -> None:
    with pytest.raises(TutelageError, match=field) as refusal:
        await queue.submit_group(group, requests)
    assert refusal.value.code == "INVALID_ARGUMENT"


async def test_everything_stays_bounded_after_much_work(queue_url: str, queue: Queue) -> None:
    total = 1500
    async with Queue(queue_url, queue.keys.namespace, lease=LeaseSettings(heartbeat=0.2)) as wide:

        async def produce() -> None:
            for index in range(total):
                await submit(wide, index)

        async def score() -> None:
            done = 0
            while done < total:
                # A new consumer name for every few claims, as when replicas come and go.
                async with wide.jobs(TEACHER, "replica") as replica:
                    for claim in [c for _ in range(10) for c in await replica.claim(25, 200)]:
                        done += await replica.commit(claim, make_scores("x"))

        async def train() -> None:
            reader, seen = wide.scored(RUN), 0
            while seen < total:
                groups = await reader.read(64, 500)
                seen += len(groups)
                await reader.acknowledge(groups)

        await asyncio.wait_for(asyncio.gather(produce(), score(), train()), 60)
        await wide.trim(teachers=[TEACHER], runs=[RUN])
        stats = await wide.teacher_stats(TEACHER)
        # The last delivered entry stays; nothing else does.
        assert (stats.jobs.length, stats.jobs.waiting, stats.jobs.in_flight, stats.jobs.consumers) == (
            1,
            0,
            0,
            0,
        )
        assert (stats.queued_tokens, stats.scored) == (0, total)
        scored = (await wide.run_stats(RUN)).scored
        assert (scored.length, scored.waiting, scored.in_flight, scored.consumers) == (1, 0, 0, 1)
        keys = [
            key async for key in wide._client.scan_iter(match=f"{wide.keys.namespace}:group:*", count=5000)
        ]
        assert keys == []


async def test_malformed_entry_is_buried_and_does_not_stop_the_work_behind_it(queue: Queue) -> None:
    await queue._client.xadd(queue.keys.jobs(TEACHER).stream, {"tokens": "many"})
    await submit(queue)
    async with queue.jobs(TEACHER, "replica") as replica:
        claims = [claim for _ in range(2) for claim in await replica.claim(4, 200)]
        assert [claim.group for claim in claims] == [f"{RUN}-0"]
    [letter] = await queue.dead_letters(TEACHER)
    assert letter.error.startswith("INVALID_ARGUMENT: malformed entry")
