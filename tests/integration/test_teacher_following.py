"""A teacher that follows a channel: which weights answer, and that the answer says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.queue_data import make_group, make_request
from support.teachers import TeacherProcess
from tutelage.v1.rollout_pb2 import ViewRequest
from tutelage_client import RetryPolicy, TeacherClient, TutelageError, codec
from tutelage_client.types import Pins, Score, ScoreRequest

from services.api.core import ScoringCore
from services.models.channel import Channel
from services.queue import Queue, ScoredGroup
from services.teacher import following
from services.teacher.engine import Engine
from services.teacher.engines.fake import FakeEngine, FakeSettings
from services.teacher.following import FollowingEngine
from services.teacher.jobs import job_request
from services.teacher.puller import Puller
from services.teacher.settings import TeacherSettings
from student_trainer.policy_store import PolicyStore

pytest_plugins = ["support.queue_server"]

REQUEST = codec.build_request([[1, 2, 3]], [[4, 5, 6, 7]])


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    return PolicyStore(tmp_path / "ema")


def publish(store: PolicyStore, version: int) -> str:
    """Its stamp."""
    return store.publish(version, lambda path: (path / "weights").write_text(str(version))).stamp


def fake(directory: Path, **settings: Any) -> Engine:
    return FakeEngine(FakeSettings(vocab_size=100, **settings))


@asynccontextmanager
async def started(
    store: PolicyStore, build: Callable[[Path], Engine] = fake
) -> AsyncIterator[FollowingEngine]:
    engine = FollowingEngine(Channel(store.directory), build, fake(Path()).limits)
    try:
        await asyncio.wait_for(engine.start(), 10)
        yield engine
    finally:
        await engine.close()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def named(score: Score) -> tuple[int, str]:
    return score.identity.weights_version, score.identity.weights_id


async def assert_by_those_it_names(score: Score, request: ScoreRequest = REQUEST) -> None:
    """The fake engine's numbers depend on version and id of its weights."""
    reference = FakeEngine(FakeSettings(vocab_size=100))
    await reference.load_weights(Path(), *named(score))
    expected = await reference.score(request)
    for one, other in zip(score.sequences, expected.sequences, strict=True):
        np.testing.assert_array_equal(one.sampled, other.sampled)


async def test_nothing_is_said_before_the_first_publication_and_the_newest_after(store: PolicyStore) -> None:
    engine = FollowingEngine(Channel(store.directory), fake, fake(Path()).limits)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.3)
    assert not starting.done()
    with pytest.raises(TutelageError, match="UNAVAILABLE: teacher: no version of"):
        _ = engine.identity
    publish(store, 3)
    stamp = publish(store, 4)
    await asyncio.wait_for(starting, 10)
    score = await engine.score(REQUEST)
    assert named(score) == (4, stamp)
    assert score.identity.model == str(store.directory)
    await assert_by_those_it_names(score)
    await engine.close()


async def test_every_new_publication_is_loaded_also_one_of_the_same_number(store: PolicyStore) -> None:
    publish(store, 0)
    async with started(store) as engine:
        for version in (1, 2, 2, 1):
            store.discard_above(version)
            stamp = publish(store, version)
            await eventually(lambda named=(version, stamp): current(engine) == named)
            await assert_by_those_it_names(await engine.score(REQUEST))


async def test_a_damaged_publication_is_told_and_the_next_one_is_loaded(store: PolicyStore) -> None:
    """Nobody who waits for weights may wait for ever, whatever lies in the channel meanwhile."""
    publish(store, 0)
    async with started(store) as engine:
        damaged = store.path(1)
        publish(store, 1)
        (damaged / "policy.json").write_text("")
        with pytest.raises(TutelageError, match=r"policy\.json is damaged"):
            await asyncio.wait_for(engine.published(Pins()), 10)
        await asyncio.sleep(3 * following.POLL_SECONDS)
        store.discard_above(0)
        waiting = asyncio.create_task(engine.published(Pins(min_weights_version=2)))
        await asyncio.sleep(3 * following.POLL_SECONDS)
        stamp = publish(store, 2)
        await asyncio.wait_for(waiting, 10)
        await eventually(lambda: current(engine) == (2, stamp))


async def test_an_engine_that_no_longer_looks_for_weights_has_ended(
    store: PolicyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 0)
    async with started(store) as engine:
        ended = asyncio.create_task(engine.ended())
        await asyncio.sleep(0.05)
        assert not ended.done()

        def broken(self: Channel) -> None:
            raise RuntimeError("no such thing was foreseen")

        monkeypatch.setattr(Channel, "latest", broken)
        await asyncio.wait_for(ended, 10)


def current(engine: FollowingEngine) -> tuple[int, str]:
    return engine.identity.weights_version, engine.identity.weights_id


async def test_weights_wait_until_the_answer_under_way_is_out(store: PolicyStore) -> None:
    old = publish(store, 0)
    async with started(store, partial(fake, latency_seconds=0.5)) as engine:
        running = asyncio.create_task(engine.score(REQUEST))
        await asyncio.sleep(0.05)
        new = publish(store, 1)
        await asyncio.sleep(0.3)
        late = asyncio.create_task(engine.score(REQUEST))  # comes while the new weights wait
        first, second = await running, await late
    assert (named(first), named(second)) == ((0, old), (1, new))
    await assert_by_those_it_names(first)
    await assert_by_those_it_names(second)


async def test_a_publication_that_was_replaced_while_it_was_read_never_answers(store: PolicyStore) -> None:
    """Its files may have been of both; what is loaded then has no name."""

    class Slow(FakeEngine):
        async def load_weights(self, path: Path, weights_version: int, weights_id: str = "") -> None:
            if weights_id == stamps.get("wrong"):
                store.discard_above(0)
                stamps["right"] = publish(store, 1)
            await super().load_weights(path, weights_version, weights_id)

    stamps: dict[str, str] = {}
    publish(store, 0)
    async with started(store, lambda _: Slow(FakeSettings(vocab_size=100))) as engine:
        stamps["wrong"] = publish(store, 1)
        seen = set()
        async with asyncio.timeout(10):
            while (1, stamps.get("right")) not in seen:
                try:
                    seen.add(named(await engine.score(REQUEST)))
                except TutelageError as error:
                    assert error.code == "UNAVAILABLE"  # noqa: PT017
                await asyncio.sleep(0.01)
    assert (1, stamps["wrong"]) not in seen


async def test_exact_versions_are_loaded_while_they_are_published(store: PolicyStore) -> None:
    stamps = [publish(store, version) for version in range(3)]
    async with started(store) as engine:
        for version in (0, 2, 1):
            async with engine.holding(Pins(weights_version=version)) as held:
                score = await engine.score(REQUEST)
            assert held
            assert named(score) == (version, stamps[version])
            await assert_by_those_it_names(score)
        store.prune(2)
        async with engine.holding(Pins(weights_version=1)) as held:
            assert held, "it is loaded, though deleted"
        with pytest.raises(TutelageError, match=r"NOT_FOUND: pins.weights_version: 0 has been deleted"):
            async with engine.holding(Pins(weights_version=0)):
                pass


async def test_held_weights_stay_whatever_is_published(store: PolicyStore) -> None:
    old = publish(store, 0)
    async with started(store) as engine:
        async with engine.holding(Pins(min_weights_version=0)):
            new = publish(store, 1)
            other = asyncio.create_task(engine.holding(Pins(weights_version=1)).__aenter__())
            await asyncio.sleep(0.3)
            assert not other.done()
            assert named(await engine.score(REQUEST)) == (0, old)
        assert await asyncio.wait_for(other, 5)
        assert named(await engine.score(REQUEST)) == (1, new)


async def test_a_least_version_that_was_withdrawn_is_not_waited_for_without_end(
    store: PolicyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "WITHDRAWN_SECONDS", 0.3)
    publish(store, 5)
    async with started(store) as engine:
        with pytest.raises(TutelageError, match=r"NOT_FOUND: pins.min_weights_version: got 8"):
            await engine.published(Pins(min_weights_version=8))
        waiting = asyncio.create_task(engine.published(Pins(weights_version=8)))
        await asyncio.sleep(0.5)
        assert not waiting.done(), "an exact version comes again"
        publish(store, 8)
        await asyncio.wait_for(waiting, 5)


async def test_direct_calls_with_another_pin_are_refused(store: PolicyStore) -> None:
    publish(store, 2)
    async with started(store) as engine:
        core = ScoringCore(engine, max_queued_tokens=1000, max_message_bytes=10**6)
        core.open()
        for field, value in (("weights_version", 1), ("min_weights_version", 3)):
            pinned = codec.build_request([[1]], [[2]], pins=Pins(**{field: value}))
            with pytest.raises(TutelageError, match=f"FAILED_PRECONDITION: pins.{field}: got {value}"):
                await core.score(pinned, transport="grpc")


def pinned(**pins: int) -> ViewRequest:
    view = make_request("fake")
    view.signal.sampled = True
    for name, value in pins.items():
        setattr(view.pins, name, value)
    return view


@asynccontextmanager
async def pulling(queue: Queue, engine: FollowingEngine, concurrency: int) -> AsyncIterator[Puller]:
    core = ScoringCore(engine, max_queued_tokens=10**6, max_message_bytes=10**7)
    core.open()
    puller = Puller(core, queue, teacher="fake", consumer="c", concurrency=concurrency, following=engine)
    running = asyncio.create_task(puller.run())
    try:
        yield puller
    finally:
        puller.stop()
        await asyncio.wait_for(running, 10)


async def scored(queue: Queue, count: int) -> dict[int, ScoredGroup]:
    reader, found = queue.scored("r"), {}
    async with asyncio.timeout(10):
        while len(found) < count:
            found |= {one.group.index: one for one in await reader.read(16, 100)}
    return found


async def test_jobs_get_the_weights_they_pin_and_those_to_come_keep_nobody_waiting(
    queue: Queue, store: PolicyStore
) -> None:
    """Eight jobs of concurrency one: the first wait for a version to come, for longer than a lease."""
    queue._max_queued_tokens = 10_000
    stamps = {version: publish(store, version) for version in range(2)}
    wanted = [2, 2, 2, 0, 1, 0, 1, 1]
    views = [pinned(weights_version=version) for version in wanted]
    async with started(store) as engine, pulling(queue, engine, concurrency=1):
        for index, view in enumerate(views):
            await queue.submit_group(make_group("r", index), [view])
        found = await scored(queue, 5)
        assert sorted(found) == [3, 4, 5, 6, 7]
        await asyncio.sleep(1.2)  # two leases
        assert (await queue.teacher_stats("fake")).jobs.in_flight == 3
        stamps[2] = publish(store, 2)
        found = await scored(queue, 8)
    for index, version in enumerate(wanted):
        score = codec.score_from_proto(found[index].scores["teacher"])
        assert named(score) == (version, stamps[version])
        request = codec.request_from_proto(job_request(make_group("r", index), views[index]))
        await assert_by_those_it_names(score, request)


async def test_a_replica_claims_no_more_jobs_than_it_works_on_where_the_weights_are_there(
    queue: Queue, store: PolicyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that looks for its weights, on a slow disk, waits for none: the others are for other replicas."""
    latest = Channel.latest
    monkeypatch.setattr(Channel, "latest", lambda channel: (time.sleep(0.05), latest(channel))[1])
    publish(store, 0)
    queue._max_queued_tokens = 10_000
    for index in range(12):
        await queue.submit_group(make_group("r", index), [pinned(min_weights_version=0)])
    slow = partial(fake, latency_seconds=0.1)
    async with started(store, slow) as engine, pulling(queue, engine, concurrency=2):
        most = 0
        for _ in range(40):
            await asyncio.sleep(0.01)
            most = max(most, (await queue.teacher_stats("fake")).jobs.in_flight)
        await scored(queue, 12)
    assert most == 2


async def test_a_job_whose_version_is_gone_fails_at_once_and_clearly(
    queue: Queue, store: PolicyStore
) -> None:
    for version in range(4):
        publish(store, version)
    store.prune(3)
    async with started(store) as engine, pulling(queue, engine, concurrency=2):
        await queue.submit_group(make_group("r", 0), [pinned(weights_version=1)])
        found = await scored(queue, 1)
    (letter,) = await queue.dead_letters("fake")
    assert letter.deliveries == 1
    assert "pins.weights_version: 1 has been deleted" in found[0].errors["teacher"]


async def test_a_drained_replica_hands_waiting_jobs_back_uncounted(queue: Queue, store: PolicyStore) -> None:
    publish(store, 0)
    async with started(store) as engine:
        async with pulling(queue, engine, concurrency=1):
            await queue.submit_group(make_group("r", 0), [pinned(weights_version=1)])
            async with asyncio.timeout(10):
                while (await queue.teacher_stats("fake")).jobs.in_flight == 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        async with queue.jobs("fake", "other") as worker:
            (claim,) = await worker.claim(1, 5_000)
            assert claim.deliveries == 1
            await worker.release(claim)


def test_a_replica_is_loading_until_something_is_published(tmp_path: Path, store: PolicyStore) -> None:
    teacher = TeacherProcess(tmp_path / "t", follow=store.directory)
    try:
        for _ in range(300):
            if "waiting_for_weights" in teacher.log.read_text():
                break
            time.sleep(0.05)
        assert not (tmp_path / "t" / "ready.json").exists()
        stamp = publish(store, 7)
        teacher.wait_ready()
        with TeacherClient(teacher.grpc, retry=RetryPolicy(attempts=1)) as client:
            identity = client.get_teacher().identity
        assert (identity.weights_version, identity.weights_id) == (7, stamp)
        assert teacher.terminate() == 0
    finally:
        teacher.kill()


def test_weights_that_change_come_without_a_model_adapters_or_a_cache() -> None:
    for extra in ({"model": "m"}, {"revision": "r"}):
        with pytest.raises(ValueError, match=f"{next(iter(extra))}: got .* with follow"):
            TeacherSettings(follow=Path("ema"), **extra)
