"""The cache in front of an engine: what it answers, what it never keeps, and what it does without."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import redis
from support.teachers import VOCAB, RecordingScorer, ids, serve
from tutelage_client import AsyncTeacherClient, codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Pins, Score, ScoreRequest, Sequence, Signal

from services.api.core import ScoringCore
from services.api.metrics import Metrics
from services.teacher.cache.directory import BLOCK, DirectoryStore
from services.teacher.cache.engine import CachedEngine
from services.teacher.cache.entry import pack
from services.teacher.cache.key import sequence_keys, teacher_digest
from services.teacher.cache.server import ENTRY_BYTES, ServerStore
from services.teacher.cache.settings import CacheSettings
from services.teacher.cache.store import Store, build_store

pytest_plugins = ["support.queue_server"]

SIGNAL = Signal(top_k=3, entropy=True)
GB = 2**30


class Replica:
    """A recording engine behind a cache of its own over a store that others may use, too."""

    def __init__(self, store: Store, **fake: Any) -> None:
        self.scorer = RecordingScorer(**fake)
        self.metrics = Metrics()
        self.engine = CachedEngine(_AsEngine(self.scorer), store, variant=fake, metrics=self.metrics)

    def outcomes(self) -> dict[str, int]:
        """Sequences by outcome so far, of the outcomes that occurred."""
        samples = next(iter(self.metrics.cache_sequences.collect())).samples
        return {
            s.labels["outcome"]: int(s.value) for s in samples if s.name.endswith("_total") and s.value > 0
        }

    def failures(self, reason: str) -> float:
        return float(self.metrics.cache_failures.labels(reason)._value.get())

    async def reaches(self, requests: int) -> None:
        """Wait until so many requests have reached the engine."""
        for _ in range(5000):
            if len(self.reached) == requests:
                return
            await asyncio.sleep(0.001)
        raise AssertionError(f"{len(self.reached)} requests have reached the engine, not {requests}")

    @property
    def reached(self) -> list[list[list[int]]]:
        """Responses of every request that reached the engine."""
        return [[s.response_ids.tolist() for s in request.sequences] for request in self.scorer.reached]


class _AsEngine:
    """What a cache needs beside scoring."""

    def __init__(self, scorer: RecordingScorer) -> None:
        self._scorer = scorer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer if name in ("score", "identities") else self._scorer.engine, name)


@pytest.fixture(params=["directory", "server"])
async def open_store(
    request: pytest.FixtureRequest, tmp_path: Path, queue_url: str
) -> AsyncIterator[Callable[..., Store]]:
    """Opens stores on one place; two of them are two replicas'."""
    kind: Literal["directory", "server"] = request.param
    opened: list[Store] = []

    def make(max_bytes: int = GB, ttl_seconds: float = 60.0) -> Store:
        location = str(tmp_path / "cache") if kind == "directory" else queue_url
        settings = CacheSettings(location=location, max_bytes=max_bytes, ttl_seconds=ttl_seconds)
        opened.append(build_store(settings, f"cache:{request.node.name}"))
        return opened[-1]

    yield make
    for store in opened:
        await store.close()


async def opened(replica: Replica) -> Replica:
    await replica.engine.start()
    return replica


def request_of(
    *responses: list[int], context: tuple[int, ...] = (1, 2), signal: Signal = SIGNAL
) -> ScoreRequest:
    sequences = tuple(Sequence(f"s{i}", 0, ids(*response)) for i, response in enumerate(responses))
    return ScoreRequest((ids(*context),), sequences, signal)


def on_the_wire(score: Score, signal: Signal = SIGNAL) -> list[bytes]:
    """Every sequence's answer as it leaves the service."""
    message = codec.score_to_proto(score, signal.encoding)
    return [sequence.SerializeToString() for sequence in message.sequences]


@pytest.mark.parametrize("encoding", ["float32", "float16"])
async def test_a_hit_is_the_miss_bit_for_bit_also_for_another_replica(
    open_store: Callable[..., Store], encoding: Literal["float32", "float16"]
) -> None:
    first, second = [await opened(Replica(open_store())) for _ in range(2)]
    candidates = np.array([[7, -1], [8, 9]], dtype=np.int32)
    signal = Signal(top_k=3, candidates=True, entropy=True, temperature=1.3, encoding=encoding)
    asked = ScoreRequest((ids(1), ids(2, 3)), (Sequence("x", 1, ids(4, 5), candidates),), signal)
    miss = await first.engine.score(asked)
    hits = [await replica.engine.score(asked) for replica in (first, second)]
    alone = await RecordingScorer().score(asked)
    for score in (miss, *hits):
        assert on_the_wire(score, signal) == on_the_wire(alone, signal)
        assert score.identity == alone.identity
        for field in ("sampled", "top_ids", "top_logprobs", "candidate_logprobs", "entropy", "valid"):
            expected, got = (getattr(one.sequences[0], field) for one in (alone, score))
            assert got.dtype == expected.dtype
            assert got.tobytes() == expected.tobytes()
    assert len(first.reached) == 1
    assert second.reached == []
    assert (first.outcomes(), second.outcomes()) == ({"miss": 1, "hit": 1}, {"hit": 1})


async def test_only_what_is_missing_reaches_the_engine_and_answers_keep_their_order(
    open_store: Callable[..., Store],
) -> None:
    replica = await opened(Replica(open_store()))
    await replica.engine.score(request_of([5], [6, 7]))
    asked = request_of([8], [6, 7], [9, 9], [5], [8])
    score = await replica.engine.score(asked)
    alone = await RecordingScorer().score(asked)
    assert on_the_wire(score) == on_the_wire(alone)
    assert replica.reached == [[[5], [6, 7]], [[8], [9, 9]]]
    assert replica.outcomes() == {"miss": 4, "hit": 2, "shared": 1}
    assert score.usage.positions == 7
    assert score.usage.tokens_computed < alone.usage.tokens_computed


async def test_equal_sequences_in_flight_are_computed_once(open_store: Callable[..., Store]) -> None:
    replica = await opened(Replica(open_store()))
    replica.scorer.gate.clear()
    asked = [request_of([5], [6]), request_of([6], [7]), request_of([7], [5])]
    tasks = [asyncio.create_task(replica.engine.score(one)) for one in asked]
    await replica.reaches(2)
    replica.scorer.gate.set()
    scores = await asyncio.gather(*tasks)
    assert sorted(replica.reached) == [[[5], [6]], [[7]]]
    for one, score in zip(asked, scores, strict=True):
        assert on_the_wire(score) == on_the_wire(await RecordingScorer().score(one))


async def test_who_waits_for_a_request_that_is_withdrawn_computes_itself(
    open_store: Callable[..., Store],
) -> None:
    replica = await opened(Replica(open_store()))
    replica.scorer.gate.clear()
    withdrawn = asyncio.create_task(replica.engine.score(request_of([5])))
    await replica.reaches(1)
    waiting = [asyncio.create_task(replica.engine.score(request_of([5]))) for _ in range(3)]
    await asyncio.sleep(0.01)
    waiting[0].cancel()  # one that only waits takes nothing from the others
    await asyncio.sleep(0.01)
    withdrawn.cancel()
    replica.scorer.gate.set()
    ended = await asyncio.gather(withdrawn, *waiting, return_exceptions=True)
    assert [type(one) for one in ended] == [asyncio.CancelledError, asyncio.CancelledError, Score, Score]
    assert len(replica.reached) == 2


async def test_errors_and_invalid_positions_are_never_kept(open_store: Callable[..., Store]) -> None:
    store = open_store()
    replica = await opened(Replica(store, nan_rate=0.5))
    asked = request_of(*[[i, i + 1, i + 2] for i in range(1, 9)])
    first, second = [await replica.engine.score(asked) for _ in range(2)]
    valid = [bool(np.isfinite(score.sampled).all()) for score in first.sequences if score.sampled is not None]
    assert set(valid) == {True, False}
    assert on_the_wire(first) == on_the_wire(second)
    assert replica.reached[1] == [
        s.response_ids.tolist() for s, ok in zip(asked.sequences, valid, strict=True) if not ok
    ]

    poisoned = await opened(Replica(store, poison_token=50))
    for _ in range(2):
        with pytest.raises(TutelageError, match="injected"):
            await poisoned.engine.score(request_of([50], [51]))
    assert len(poisoned.reached) == 2


async def test_weights_that_move_never_answer_from_others(open_store: Callable[..., Store]) -> None:
    """Each publication has scores of its own, also one that repeats a version number."""
    replica = await opened(Replica(open_store()))
    asked = request_of([5], [6])
    answers: dict[tuple[int, str], list[bytes]] = {}
    for version, stamp in [(0, ""), (1, "a"), (1, "b"), (2, "c"), (1, "a"), (0, "")]:
        await replica.engine.load_weights(Path(), version, stamp)
        score = await replica.engine.score(asked)
        assert (score.identity.weights_version, score.identity.weights_id) == (version, stamp)
        fresh = RecordingScorer()
        await fresh.engine.load_weights(Path(), version, stamp)
        assert on_the_wire(score) == on_the_wire(await fresh.score(asked))
        answers[version, stamp] = on_the_wire(score)
    assert len(replica.reached) == len(answers) == 4
    assert len({tuple(answers[k]) for k in ((0, ""), (1, "a"), (2, "c"))}) == 3


async def test_weights_that_move_while_a_request_is_computed_answer_all_of_it(
    open_store: Callable[..., Store],
) -> None:
    """Half of the request was found under the old weights: an answer of both would be nobody's."""
    replica = await opened(Replica(open_store()))
    await replica.engine.score(request_of([5]))
    replica.scorer.gate.clear()
    asked = request_of([5], [6])
    task = asyncio.create_task(replica.engine.score(asked))
    await replica.reaches(2)
    await replica.engine.load_weights(Path(), 1, "a")
    replica.scorer.gate.set()
    score = await task
    assert score.identity.weights_version == 1
    assert on_the_wire(score) == on_the_wire(await replica.scorer.engine.score(asked))
    assert on_the_wire(await replica.engine.score(asked)) == on_the_wire(score)


async def test_a_pin_to_weights_that_have_gone_is_refused_though_their_scores_are_kept(
    open_store: Callable[..., Store],
) -> None:
    replica = await opened(Replica(open_store()))
    core = ScoringCore(replica.engine, max_queued_tokens=1000, max_message_bytes=10**6)
    core.open()
    pinned = ScoreRequest((ids(1),), (Sequence("a", 0, ids(5)),), pins=Pins(weights_version=0))
    await core.score(pinned, transport="grpc")
    await replica.engine.load_weights(Path(), 1, "a")
    with pytest.raises(TutelageError, match=r"pins\.weights_version"):
        await core.score(pinned, transport="grpc")


async def test_a_damaged_entry_is_a_miss_that_is_counted_and_written_anew(
    tmp_path: Path, open_store: Callable[..., Store], queue_url: str
) -> None:
    replica = await opened(Replica(open_store()))
    asked = request_of([5], [6])
    whole = await replica.engine.score(asked)
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        _damage(tmp_path / "cache", queue_url, replica.engine, damage)
        assert on_the_wire(await replica.engine.score(asked)) == on_the_wire(whole)
    assert replica.failures("corrupt") == 4
    assert len(replica.reached) == 3
    await replica.engine.score(asked)
    assert len(replica.reached) == 3


async def test_an_entry_under_another_key_is_not_taken_for_it(tmp_path: Path) -> None:
    """Two files change places, each whole in itself."""
    replica = await opened(Replica(DirectoryStore(tmp_path, max_bytes=GB)))
    asked = request_of([5], [6])
    whole = await replica.engine.score(asked)
    one, two = files(tmp_path)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert on_the_wire(await replica.engine.score(asked)) == on_the_wire(whole)
    assert replica.failures("corrupt") == 2


async def test_an_entry_that_other_weights_wrote_is_no_answer_whatever_its_key_says(
    open_store: Callable[..., Store],
) -> None:
    store = open_store()
    replica = await opened(Replica(store))
    asked = request_of([5])
    right = await RecordingScorer().score(asked)
    (key,) = sequence_keys(teacher_digest(right.identity, {}), asked)
    wrong = replace(right.identity, weights_id="another")
    await store.put([(key, pack(key, right.sequences[0], wrong))])
    assert on_the_wire(await replica.engine.score(asked)) == on_the_wire(right)
    assert (len(replica.reached), replica.failures("corrupt")) == (1, 1)


def files(directory: Path) -> list[Path]:
    return list(directory.glob("*/*.score"))


def _damage(directory: Path, url: str, engine: CachedEngine, damage: Callable[[bytes], bytes]) -> None:
    if directory.exists():
        for path in files(directory):
            path.write_bytes(damage(path.read_bytes()))
        return
    store = engine._store
    assert isinstance(store, ServerStore)
    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter():
            if key.startswith(store._prefix.encode()) and len(key) == len(store._prefix) + 64:
                client.set(key, damage(client.get(key)), keepttl=True)  # type: ignore[arg-type]


async def test_the_least_recently_used_leave_a_directory_that_is_full(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, max_bytes=10 * BLOCK)
    await store.open()
    keys = [bytes([i]) * 32 for i in range(12)]
    for age, key in enumerate(keys[:10]):
        await store.put([(key, b"x" * 100)])
        path = next(path for path in files(tmp_path) if path.parent.name == key.hex()[:2])
        os.utime(path, (time.time() - 1000 + age, time.time() - 1000 + age))
    assert store.held_bytes == 10 * BLOCK
    await store.get([keys[0]])  # now the most recent
    await store.put([(keys[10], b"y" * 100)])
    held = await store.get(keys)
    assert [bool(value) for value in held] == [True, False, False] + [True] * 8 + [False]
    assert store.held_bytes == 9 * BLOCK
    await store.put([(keys[11], b"z" * 11 * BLOCK)])
    assert await store.get([keys[11]]) == [None], "an entry above the limit would push out all others"


async def test_the_least_recently_used_leave_a_server_that_is_full(queue_url: str) -> None:
    size = 100 + ENTRY_BYTES
    store = ServerStore(queue_url, "cache:full", max_bytes=4 * size, ttl_seconds=60)
    keys = [bytes([i]) * 32 for i in range(6)]
    for key in keys[:4]:
        await store.put([(key, b"x" * 100)])
        await asyncio.sleep(0.002)
    await store.get([keys[0]])
    await asyncio.sleep(0.002)
    await store.put([(keys[4], b"y" * 100), (keys[4], b"another" * 10)])
    assert [bool(value) for value in await store.get(keys)] == [True, False, True, True, True, False]
    assert (await store.get([keys[4]])) == [b"y" * 100], "the first writer wins"
    assert store.held_bytes == 4 * size
    await store.close()


async def test_entries_of_a_server_that_nobody_asks_for_expire_and_stop_counting(queue_url: str) -> None:
    store = ServerStore(queue_url, "cache:ttl", max_bytes=GB, ttl_seconds=0.2)
    old, used, new = (bytes([i]) * 32 for i in range(3))
    await store.put([(old, b"x" * 100), (used, b"x" * 100)])
    for _ in range(4):
        await asyncio.sleep(0.08)
        assert await store.get([used]) == [b"x" * 100]
    assert await store.get([old]) == [None]
    await store.put([(new, b"x" * 100)])
    assert store.held_bytes == 2 * (100 + ENTRY_BYTES)
    await store.close()


async def test_a_store_that_fails_costs_no_request(tmp_path: Path) -> None:
    store = ServerStore(f"unix://{tmp_path}/nothing", "cache", max_bytes=GB, ttl_seconds=60)
    replica = await opened(Replica(store))
    asked = request_of([5])
    for _ in range(3):
        assert on_the_wire(await replica.engine.score(asked)) == on_the_wire(
            await RecordingScorer().score(asked)
        )
    assert len(replica.reached) == 3
    assert replica.failures("store") == 1, "left alone for a while"
    await store.close()


async def test_a_directory_that_cannot_be_is_refused_at_the_start(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(OSError, match=r"cache: .*file"):
        await Replica(DirectoryStore(blocked / "cache", max_bytes=GB)).engine.start()


async def test_a_directory_that_vanished_costs_no_request(tmp_path: Path) -> None:
    replica = await opened(Replica(DirectoryStore(tmp_path / "cache", max_bytes=GB)))
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    asked = request_of([5])
    assert on_the_wire(await replica.engine.score(asked)) == on_the_wire(await RecordingScorer().score(asked))
    assert replica.failures("store") == 1


async def test_callers_over_the_wire_see_the_cache_only_in_the_metrics(
    open_store: Callable[..., Store],
) -> None:
    replica = await opened(Replica(open_store()))
    async with serve(replica.engine) as doors, AsyncTeacherClient(doors.grpc) as client:
        miss, hit = [await client.score_request(request_of([5, VOCAB - 1])) for _ in range(2)]
    assert on_the_wire(miss) == on_the_wire(hit)
    assert miss.identity == hit.identity
    assert (miss.usage.tokens_computed > 0, hit.usage.tokens_computed) == (True, 0)
    assert replica.outcomes() == {"miss": 1, "hit": 1}
