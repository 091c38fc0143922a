"""The trainer's collecting and pacing on a real Valkey, with samplers and teachers that the test controls."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.training_groups import RUN, make_expectations, make_group, make_plan, make_scores
from tutelage.v1.rollout_pb2 import SampleOrder, ViewRequest
from tutelage.v1.teacher_pb2 import Context
from tutelage_client.codec import score_to_proto, signal_to_proto
from tutelage_client.errors import TutelageError

from services.queue import JobClaim, JobWorker, OrderClaim, Queue, Submitted, sampler_role, teacher_role
from student_trainer.collect import Collector
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.evaluations import Evaluations
from student_trainer.ledger import Ledger
from student_trainer.lineage import continued, to_proto
from student_trainer.objective.compile import Plan
from student_trainer.pacing import REPLACEMENTS_FROM, Pacer
from student_trainer.policy_store import PolicyStore
from student_trainer.verify import TrainingGroup
from student_trainer.waiting import Watch

pytest_plugins = ["support.queue_server"]

REWARD = make_plan(preset="grpo")
SAMPLED = make_plan()


def make_config(**training: object) -> RunConfig:
    deterministic = bool(training.pop("deterministic", False))
    values = {"steps": 12, "prompts_per_step": 6} | training
    return parse_run_config(
        {
            "run": {"name": RUN, "deterministic": deterministic},
            "student": {"model": "unused"},
            "teachers": {"big": {"model": "unused"}},
            "data": {"task": "addition"},
            "sampling": {"groups_per_order": 4, "samples_per_prompt": 2},
            "objective": {},
            "training": values,
        }
    )


@dataclass
class Loop:
    """The trainer's side of a run without a model: what it collects is what it would train."""

    queue: Queue
    config: RunConfig
    plan: Plan
    ledger: Ledger = field(default_factory=lambda: Ledger(settings={}))

    def __post_init__(self) -> None:
        self.stop, self.over = asyncio.Event(), asyncio.Event()
        self.said: list[str] = []
        self.published = self.ledger.step
        self.pacer = Pacer(self.queue, self.config, self.ledger)
        self.watch = Watch(self.queue, RUN, [sampler_role(RUN), *map(teacher_role, self.teachers)])
        self.collector = Collector(
            config=self.config,
            reader=self.queue.scored(RUN),
            pacer=self.pacer,
            watch=self.watch,
            ledger=self.ledger,
            expected=make_expectations(self.plan),
            stop=self.stop,
        )

    @property
    def teachers(self) -> list[str]:
        return [teacher for teacher, _ in self.plan.view_requests.values()]

    async def begin(self) -> None:
        await self.pacer.place_ahead(self.ledger.step)
        await self.pacer.place_missing_replacements(self.ledger.step)

    async def step(self) -> list[TrainingGroup]:
        """One step: collect, apply, publish."""

        async def show(status: str) -> None:
            self.said.append(status)

        groups = await asyncio.wait_for(self.collector.collect(show), 30)
        assert groups is not None
        for group in groups:
            self.ledger.applied.add(group.index)
        self.ledger.step += 1
        self.published = self.ledger.step
        await self.pacer.place_ahead(self.published)
        return groups


Pause = Callable[[], float]


async def sample_orders(loop: Loop, pause: Pause, orders: list[SampleOrder] | None = None) -> None:
    """A sampler: answers orders with the newest version, or exactly the one asked for."""
    async with loop.queue.orders(RUN, "s") as worker:
        while not loop.over.is_set():
            for claim in await worker.claim(1, 50):
                if orders is not None:
                    orders.append(claim.order)
                if await sample_order(loop, claim, pause):
                    await worker.finish(claim)


async def sample_order(loop: Loop, claim: OrderClaim, pause: Pause) -> bool:
    order = claim.order
    for index in range(order.first_group, order.first_group + order.num_groups):
        version = order.policy_version if order.exact else loop.published
        await asyncio.sleep(pause())
        group = make_group(index, loop.plan, version=version, rewards=(1.0, 0.0))
        group.lineage.extend(to_proto(loop.ledger.lineage))
        requests = [request(view, loop.plan, group.prompt_ids) for view in loop.plan.view_requests]
        while await loop.queue.submit_group(group, requests, order=claim) is Submitted.FULL:
            if loop.over.is_set():
                return False
            await asyncio.sleep(0.01)
    return True


def request(view: str, plan: Plan, prompt: bytes) -> ViewRequest:
    teacher, signal = plan.view_requests[view]
    return ViewRequest(
        view=view, teacher=teacher, signal=signal_to_proto(signal), contexts=[Context(ids=prompt)]
    )


async def score_jobs(
    loop: Loop,
    pause: Pause,
    poison: Callable[[str], bool] = lambda _: False,
    held: Mapping[str, int] | None = None,
) -> None:
    """A teacher: scores in any order, some jobs later than others.

    Args:
        poison: names its dead letters.
        held: groups it scores only after the trainer has made so many steps.
    """

    async def work(worker: JobWorker, claim: JobClaim) -> None:
        await asyncio.sleep(pause())
        while not loop.over.is_set() and loop.ledger.step < (held or {}).get(claim.group, 0):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        loaded = await worker.load(claim)
        if loaded is None:
            return
        if poison(claim.group):
            await worker.bury(claim, "poison")
            return
        scores = score_to_proto(make_scores(loaded[0], loop.plan, claim.view))
        await worker.commit(claim, scores.SerializeToString())

    async with loop.queue.jobs("big", "t") as worker, asyncio.TaskGroup() as tasks:
        while not loop.over.is_set():
            for claim in await worker.claim(8, 50):
                tasks.create_task(work(worker, claim))


@asynccontextmanager
async def running(loop: Loop, *workers: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Samplers and teachers beside the body; a worker that fails fails the test."""
    async with asyncio.TaskGroup() as tasks:
        for worker in workers:
            tasks.create_task(worker)
        try:
            yield
        finally:
            loop.over.set()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Poll, because what is waited for happens in a server or in another task."""
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def uneven(seed: int) -> Pause:
    """Mostly at once, sometimes a long time: groups overtake each other and grow stale."""
    chance = random.Random(seed)
    return lambda: chance.choice([0.0, 0.0, 0.0, 0.0, 0.002, 0.15])


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_nothing_staler_than_the_bound_is_trained(queue: Queue, max_staleness: int) -> None:
    """Groups grow stale while they are scored and while they wait for a slow trainer; none gets through."""
    steps = 12
    loop = Loop(queue, make_config(steps=steps, max_staleness=max_staleness), SAMPLED)
    queue._max_queued_tokens = 10_000
    seen: Counter[int] = Counter()
    staleness = []
    # Two jobs that the teacher is slow with; without slack the trainer itself would wait for them.
    late = {f"{RUN}-3": max_staleness + 3, f"{RUN}-8": max_staleness + 4} if max_staleness else {}
    async with running(loop, sample_orders(loop, uneven(1)), score_jobs(loop, uneven(2), held=late)):
        await loop.begin()
        for step in range(steps):
            groups = await loop.step()
            assert len(groups) == 6
            seen.update(group.index for group in groups)
            staleness += [step - group.policy_version for group in groups]
            await asyncio.sleep(0.02)
    assert max(staleness) <= max_staleness
    assert min(staleness) >= 0
    assert set(seen.values()) == {1}
    dropped = loop.ledger.drop_counts["stale"]
    assert set(loop.ledger.drop_counts) <= {"stale"}
    assert dropped >= len(late)
    assert not {3, 8} & set(seen) if late else dropped == 0
    assert loop.ledger.replacements == dropped
    assert len(loop.ledger.applied) == steps * 6


async def test_groups_waiting_in_the_queue_grow_stale_there(queue: Queue) -> None:
    loop = Loop(queue, make_config(max_staleness=1), REWARD)
    for index in range(6):
        group = make_group(index, REWARD, version=0, rewards=(1.0, 0.0))
        await queue.submit_group(group, [])
    loop.ledger.step = loop.published = 2  # the trainer went on while they waited
    async with running(loop, sample_orders(loop, lambda: 0.0)):
        await loop.begin()
        groups = await loop.step()
    assert loop.ledger.drop_counts == {"stale": 6}
    assert {group.policy_version for group in groups} == {2}


async def test_versions_of_a_lost_timeline_count_as_just_as_far(queue: Queue) -> None:
    """After a resumption groups of later versions are in the queue: those weights are as far away."""
    loop = Loop(queue, make_config(max_staleness=1), REWARD)
    loop.ledger.step = loop.published = 3
    for index, version in enumerate([3, 4, 5, 9]):
        await queue.submit_group(make_group(index, REWARD, version=version, rewards=(1.0, 0.0)), [])
    async with running(loop, sample_orders(loop, lambda: 0.0)):
        await loop.begin()
        await loop.step()
    assert loop.ledger.drop_counts == {"stale": 2}
    assert 0 in loop.ledger.applied
    assert 1 in loop.ledger.applied


async def test_version_of_a_killed_trainer_is_as_far_as_the_way_through_the_checkpoint(queue: Queue) -> None:
    """Numbers that are next to each other name weights that parted many updates ago."""
    killed = continued((), 0)
    ledger = Ledger(settings={}, step=9, lineage=continued(killed, 5))
    loop = Loop(queue, make_config(max_staleness=1), REWARD, ledger)
    for index, (version, lineage) in enumerate([(8, killed), (9, killed), (9, ledger.lineage)]):
        group = make_group(index, REWARD, version=version, rewards=(1.0, 0.0))
        group.lineage.extend(to_proto(lineage))
        await queue.submit_group(group, [])
    async with running(loop, sample_orders(loop, lambda: 0.0)):
        await loop.begin()
        groups = await loop.step()
    assert loop.ledger.drop_counts == {"stale": 2}
    assert {group.distance for group in groups} == {0}
    assert 2 in loop.ledger.applied


async def test_deterministic_run_takes_its_own_groups_in_index_order(queue: Queue) -> None:
    loop = Loop(queue, make_config(deterministic=True, steps=5, max_staleness=1), SAMPLED)
    queue._max_queued_tokens = 10_000
    async with running(loop, sample_orders(loop, uneven(3)), score_jobs(loop, uneven(4))):
        await loop.begin()
        for step in range(5):
            groups = await loop.step()
            assert [group.index for group in groups] == list(range(step * 6, step * 6 + 6))
            assert {group.policy_version for group in groups} == {max(0, step - 1)}
    assert loop.ledger.applied.intervals() == [[0, 30]]


async def test_deterministic_run_stops_when_a_group_cannot_be_had(queue: Queue) -> None:
    loop = Loop(queue, make_config(deterministic=True), SAMPLED)
    async with running(
        loop,
        sample_orders(loop, lambda: 0.0),
        score_jobs(loop, lambda: 0.0, poison=lambda group: group == f"{RUN}-2"),
    ):
        await loop.begin()
        with pytest.raises(
            TutelageError, match=r"run-2 cannot be trained \(failed\): view 'teacher': poison"
        ):
            await loop.step()


async def test_poisoned_groups_are_counted_and_replaced(queue: Queue) -> None:
    loop = Loop(queue, make_config(steps=4), SAMPLED)
    queue._max_queued_tokens = 10_000
    poisoned = {f"{RUN}-{index}" for index in (1, 8, REPLACEMENTS_FROM)}
    async with running(
        loop,
        sample_orders(loop, lambda: 0.0),
        score_jobs(loop, lambda: 0.0, poison=lambda group: group in poisoned),
    ):
        await loop.begin()
        for _ in range(4):
            assert len(await loop.step()) == 6
    assert loop.ledger.drop_counts == {"failed": 3}
    assert loop.ledger.replacements == 3


async def test_run_stops_when_every_group_is_refused(queue: Queue) -> None:
    loop = Loop(queue, make_config(), SAMPLED)
    queue._max_queued_tokens = 10_000
    async with running(
        loop, sample_orders(loop, lambda: 0.0), score_jobs(loop, lambda: 0.0, poison=lambda _: True)
    ):
        await loop.begin()
        with pytest.raises(TutelageError, match=r"8 groups in a row were refused, the last one \(failed\)"):
            await loop.step()


async def test_group_trained_before_a_restart_is_not_trained_again(queue: Queue) -> None:
    """Killed between the checkpoint and the acknowledgement: the ledger knows what comes again."""
    config = make_config(steps=4)
    loop = Loop(queue, config, REWARD)
    async with running(loop, sample_orders(loop, lambda: 0.0)):
        await loop.begin()
        first = await loop.step()
        saved = Ledger.from_json(loop.ledger.to_json())
        again = Loop(queue, config, REWARD, saved)
        await again.begin()
        second = await again.step()
        assert again.collector.duplicates == 6
        assert not {g.index for g in first} & {g.index for g in second}
        await again.collector.acknowledge()
        third = Loop(queue, config, REWARD, Ledger.from_json(again.ledger.to_json()))
        await third.begin()
        await third.step()
        assert third.collector.duplicates == 0


async def test_only_what_a_checkpoint_covers_is_acknowledged(queue: Queue) -> None:
    config = make_config(steps=6)
    loop = Loop(queue, config, REWARD)
    async with running(loop, sample_orders(loop, lambda: 0.0)):
        await loop.begin()
        await loop.step()
        await loop.collector.acknowledge()
        checkpoint = loop.ledger.to_json()
        lost = {group.index for group in await loop.step()}
        # Killed here: the step after the checkpoint is forgotten, its groups come again.
        again = Loop(queue, config, REWARD, Ledger.from_json(checkpoint))
        await again.begin()
        assert {group.index for group in await again.step()} == lost


async def test_what_a_checkpoint_would_free_is_known_in_bytes(queue: Queue) -> None:
    loop = Loop(queue, make_config(max_staleness=1), SAMPLED)
    queue._max_queued_tokens = 10_000
    async with running(loop, sample_orders(loop, lambda: 0.0), score_jobs(loop, lambda: 0.0)):
        await loop.begin()
        groups = await loop.step()
        rollouts = make_group(groups[0].index, SAMPLED, version=groups[0].policy_version)
        scores = score_to_proto(make_scores(rollouts, SAMPLED))
        one = rollouts.ByteSize() + scores.ByteSize()
        assert 6 * 0.9 * one < loop.collector.consumed_bytes() < 6 * 1.5 * one
        await loop.collector.acknowledge()
        assert loop.collector.consumed_bytes() == 0


async def test_group_resubmitted_long_after_its_payload_is_gone_is_not_trained_again(queue: Queue) -> None:
    loop = Loop(queue, make_config(steps=4), REWARD)
    async with running(loop, sample_orders(loop, lambda: 0.0)):
        await loop.begin()
        first = await loop.step()
        await loop.collector.acknowledge()
        # No order vouches for it: the queue has nothing left to recognise it by.
        await queue.submit_group(make_group(first[0].index, REWARD, version=1, rewards=(1.0, 0.0)), [])
        for _ in range(3):
            assert first[0].index not in {group.index for group in await loop.step()}
    assert loop.collector.duplicates <= 1


async def test_stop_is_honoured_while_waiting(queue: Queue) -> None:
    loop = Loop(queue, make_config(), REWARD)

    async def show(_: str) -> None: ...

    collecting = asyncio.create_task(loop.collector.collect(show))
    await asyncio.sleep(0.1)
    loop.stop.set()
    assert await asyncio.wait_for(collecting, 2) is None


async def test_missing_components_are_named_while_waiting(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_trainer.waiting.PATIENCE", 0.3)
    loop = Loop(queue, make_config(), SAMPLED)
    await loop.begin()

    async def heard(status: str) -> None:
        async def said() -> bool:
            return status in loop.said

        await until(said)

    stepping = asyncio.create_task(loop.step())
    try:
        await heard("waiting for scores: no sampler:run, no teacher:big")
        with queue.presence(sampler_role(RUN), "s"):
            await heard("waiting for scores: no teacher:big")
            with queue.presence(teacher_role("big"), "t"):
                await heard("waiting for scores")
        loop.said.clear()
        await heard("waiting for scores: no sampler:run, no teacher:big")
    finally:
        stepping.cancel()


async def test_work_that_the_queue_lost_is_ordered_again(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure may take acknowledged groups with it; their orders are finished all the same."""
    monkeypatch.setattr("student_trainer.waiting.PATIENCE", 0.3)
    loop = Loop(queue, make_config(steps=2, max_staleness=0), REWARD)
    async with running(loop, sample_orders(loop, lambda: 0.0)):
        await loop.begin()

        async def all_sampled() -> bool:
            return (await queue.run_stats(RUN)).scored.length >= 6

        await until(all_sampled)
        await queue._client.delete(queue.keys.scored(RUN).stream)
        for index in range(6):
            await queue._client.delete(queue.keys.group(f"{RUN}-{index}"))
        async for key in queue._client.scan_iter(match=queue.keys.submitted(RUN, "*")):
            await queue._client.delete(key)
        assert len(await loop.step()) == 6


async def test_run_stops_when_samplers_give_up_what_is_ordered(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_trainer.waiting.PATIENCE", 0.1)
    loop = Loop(queue, make_config(steps=2), REWARD)

    async def refuse() -> None:
        async with queue.orders(RUN, "s") as worker:
            while not loop.over.is_set():
                for claim in await worker.claim(1, 50):
                    await worker.bury(claim, "NOT_FOUND: no such field")

    async with running(loop, refuse()):
        await loop.begin()
        with pytest.raises(TutelageError, match=r"order run-s\d-\d was given up: NOT_FOUND: no such field"):
            await loop.step()


async def test_orders_ask_for_no_more_than_staleness_allows(queue: Queue) -> None:
    loop = Loop(queue, make_config(steps=12, prompts_per_step=6, max_staleness=2), REWARD)
    orders: list[SampleOrder] = []

    async def placed(count: int) -> bool:
        return len(orders) >= count

    async with running(loop, sample_orders(loop, lambda: 0.0, orders=orders)):
        await loop.begin()
        await until(lambda: placed(6))
        await asyncio.sleep(0.2)
        assert [(o.first_group, o.num_groups, o.policy_version) for o in orders] == [
            (0, 4, 0), (4, 2, 0), (6, 4, 0), (10, 2, 0), (12, 4, 0), (16, 2, 0),
        ]  # fmt: skip
        await loop.step()
        await until(lambda: placed(8))
        await asyncio.sleep(0.1)
        assert [(o.first_group, o.num_groups, o.policy_version) for o in orders[6:]] == [
            (18, 4, 1),
            (22, 2, 1),
        ]


async def test_evaluation_left_by_another_timeline_is_not_believed(queue: Queue, tmp_path: Path) -> None:
    ledger = Ledger(settings={})
    evaluations = Evaluations(queue, make_config(evaluate_every=5), ledger, PolicyStore(tmp_path))
    answer = {"version": 5, "prompts": 9, "greedy": {"accuracy": 0.1}, "sampled": {"accuracy": 0.2}}
    await queue.publish_progress(RUN, {"eval:5": answer})
    evaluations.note(3)
    evaluations.note(5)
    await evaluations.order()
    assert evaluations.collect(await queue.read_progress(RUN)) == []
    await queue.publish_progress(RUN, {"eval:5": answer | {"greedy": {"accuracy": 0.9}}})
    (found,) = evaluations.collect(await queue.read_progress(RUN))
    assert (found.policy_version, found.greedy, found.sampled) == (5, 0.9, 0.2)
    assert ledger.pending_evaluations == []
