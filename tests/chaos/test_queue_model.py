"""A state machine on a real server: no order of adds, reads, commits, crashes, reclaims and trims breaks it.

The model predicts the exact answer of every operation. Time is simulated: no heartbeat runs, and a crash
makes the leases of the crashed worker run out at once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.queue_data import VIEW_TOKENS, make_group, make_request, make_scores

from services.queue import (
    Failed,
    JobClaim,
    JobWorker,
    LeaseSettings,
    Queue,
    ScoredGroup,
    ScoredReader,
    Submitted,
)

pytest_plugins = ["support.queue_server"]

RUN = "run"
TEACHERS = ("big", "small")  # a view is named after its teacher
MAX_DELIVERIES = 3
LEASE = LeaseSettings(heartbeat=3600, max_deliveries=MAX_DELIVERIES)
NAMESPACES = itertools.count()
PICK = st.integers(0, 99)
COUNT = st.integers(1, 4)


class SteadyHeart:
    """A heart without a thread: the server has always been there."""

    in_contact = float("inf")

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def is_alive(self) -> bool:
        return True


@dataclass
class Job:
    """One view of one group as the model sees it; claimed by at most one living worker."""

    group: int
    view: str
    state: str = "waiting"  # waiting → held ⇄ loose → done
    deliveries: int = 0


@dataclass
class Model:
    """Groups by index, jobs in stream order, and what the trainer should see in which order."""

    views: dict[int, tuple[str, ...]] = field(default_factory=dict)
    status: dict[int, str] = field(default_factory=dict)  # queued | scored | failed | gone
    scores: dict[int, dict[str, str]] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    pushed: list[int] = field(default_factory=list)
    commits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TEACHERS, 0))

    def add(self, index: int, views: tuple[str, ...]) -> None:
        self.views[index], self.scores[index] = views, {}
        self.status[index] = "queued" if views else "scored"
        self.jobs += [Job(index, view) for view in views]
        if not views:
            self.pushed.append(index)

    def job(self, claim: JobClaim) -> Job:
        wanted = (int(claim.group.split("-")[1]), claim.view)
        return next(job for job in self.jobs if (job.group, job.view) == wanted)

    def open(self, teacher: str, state: str) -> list[Job]:
        return [job for job in self.jobs if job.view == teacher and job.state == state]

    def claim(self, teacher: str, count: int) -> list[Job]:
        """Loose jobs first, in stream order, the exhausted ones buried; then waiting ones."""
        loose = self.open(teacher, "loose")
        for job in loose:
            if job.deliveries == MAX_DELIVERIES:
                self.bury(job)
        taken = [job for job in loose if job.state == "loose"][:count]
        taken += self.open(teacher, "waiting")[: count - len(taken)]
        for job in taken:
            job.state, job.deliveries = "held", job.deliveries + 1
        return taken

    def bury(self, job: Job) -> None:
        job.state = "done"
        if self.status[job.group] == "queued" and job.view not in self.scores[job.group]:
            self.status[job.group] = "failed"
            self.pushed.append(job.group)

    def commit(self, job: Job, tag: str) -> bool:
        job.state = "done"
        scores = self.scores[job.group]
        if self.status[job.group] != "queued" or job.view in scores:
            return False
        scores[job.view] = tag
        self.commits[job.view] += 1
        if len(scores) == len(self.views[job.group]):
            self.status[job.group] = "scored"
            self.pushed.append(job.group)
        return True


class QueueMachine(RuleBasedStateMachine):
    """Two teachers with two workers each, producers, and one trainer that restarts."""

    url: ClassVar[str] = ""
    loop: ClassVar[asyncio.AbstractEventLoop]

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(self.url, f"model:{next(NAMESPACES)}", lease=LEASE)
        self.model = Model()
        self.workers = [self.start_worker(teacher) for teacher in TEACHERS * 2]
        self.claims: list[tuple[JobWorker, JobClaim]] = []
        self.zombies: list[tuple[JobWorker, JobClaim]] = []
        self.restart_trainer()
        self.delivered = 0  # of model.pushed
        self.unacknowledged: list[int] = []
        self.tags = itertools.count()

    def do(self, step: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(step)

    def start_worker(self, teacher: str) -> JobWorker:
        worker = self.queue.jobs(teacher, teacher)
        worker._heart = SteadyHeart()  # type: ignore[assignment]
        self.do(worker.__aenter__())
        return worker

    def pop_claim(self, pick: int) -> tuple[JobWorker, JobClaim, Job]:
        worker, claim = self.claims.pop(pick % len(self.claims))
        return worker, claim, self.model.job(claim)

    @rule(views=st.sampled_from([(), ("big",), ("small",), TEACHERS]))
    def add(self, views: tuple[str, ...]) -> None:
        index = len(self.model.views)
        requests = [make_request(teacher, teacher) for teacher in views]
        assert self.do(self.queue.submit_group(make_group(RUN, index), requests)) is Submitted.QUEUED
        self.model.add(index, views)

    @precondition(lambda self: any(status != "gone" for status in self.model.status.values()))
    @rule(pick=PICK)
    def add_again(self, pick: int) -> None:
        present = [index for index, status in self.model.status.items() if status != "gone"]
        group = make_group(RUN, present[pick % len(present)])
        assert self.do(self.queue.submit_group(group, [make_request("big", "big")])) is Submitted.EXISTS

    @rule(which=st.integers(0, 3), count=COUNT)
    def read(self, which: int, count: int) -> None:
        worker, teacher = self.workers[which], (TEACHERS * 2)[which]
        worker._next_scan = 0.0
        claims = self.do(worker.claim(count, 0))
        expected = self.model.claim(teacher, count)
        assert [self.model.job(claim) for claim in claims] == expected
        assert [claim.deliveries for claim in claims] == [job.deliveries for job in expected]
        self.claims += [(worker, claim) for claim in claims]

    @precondition(lambda self: self.claims)
    @rule(pick=PICK)
    def commit(self, pick: int) -> None:
        worker, claim, job = self.pop_claim(pick)
        tag = str(next(self.tags))
        assert self.do(worker.commit(claim, make_scores(tag))) is self.model.commit(job, tag)

    @precondition(lambda self: self.zombies)
    @rule(pick=PICK)
    def commit_by_a_crashed_worker_that_was_only_slow(self, pick: int) -> None:
        worker, claim = self.zombies.pop(pick % len(self.zombies))
        tag = str(next(self.tags))
        assert self.do(worker.commit(claim, make_scores(tag))) is self.model.commit(
            self.model.job(claim), tag
        )

    @precondition(lambda self: self.claims)
    @rule(pick=PICK)
    def load(self, pick: int) -> None:
        worker, claim = self.claims[pick % len(self.claims)]
        job = self.model.job(claim)
        found = self.do(worker.load(claim))
        if self.model.status[job.group] == "queued":
            assert found is not None
            assert found[0].id == claim.group
        else:
            assert found is None
            job.state = "done"
            self.claims.remove((worker, claim))

    @precondition(lambda self: self.claims)
    @rule(pick=PICK)
    def fail(self, pick: int) -> None:
        worker, claim, job = self.pop_claim(pick)
        outcome = self.do(worker.fail(claim, "INTERNAL: no"))
        if job.state == "done":
            assert outcome is Failed.LOST
        elif job.deliveries == MAX_DELIVERIES:
            assert outcome is Failed.DEAD
            self.model.bury(job)
        else:
            assert outcome is Failed.RETRY
            job.state = "loose"

    @precondition(lambda self: self.claims)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        worker, claim, job = self.pop_claim(pick)
        self.do(worker.release(claim))
        if job.state == "held":
            job.state, job.deliveries = "loose", job.deliveries - 1

    @rule(which=st.integers(0, 3))
    def crash(self, which: int) -> None:
        worker = self.workers[which]
        self.workers[which] = self.start_worker((TEACHERS * 2)[which])
        lost = [(owner, claim) for owner, claim in self.claims if owner is worker]
        self.claims = [(owner, claim) for owner, claim in self.claims if owner is not worker]
        self.zombies += lost
        for _, claim in lost:
            job = self.model.job(claim)
            if job.state == "held":
                job.state = "loose"
                stream = worker._stream
                idle = 2 * LEASE.lease_ms
                self.do(
                    self.queue._client.xclaim(
                        stream.stream, stream.group, worker.consumer, 0, [claim.entry], idle=idle, justid=True
                    )
                )

    @rule(count=COUNT)
    def train(self, count: int) -> None:
        groups = self.do(self.reader.read(count, 0))
        again = [index for index in self.unacknowledged if index not in self.handed_out]
        if again:
            expected = again[:count]
        else:
            expected = self.model.pushed[self.delivered : self.delivered + count]
            self.delivered += len(expected)
            self.unacknowledged += expected
        assert [scored.group.index for scored in groups] == expected
        for scored in groups:
            index = scored.group.index
            assert scored.status == self.model.status[index]
            answers = {view: answer.request_id for view, answer in scored.scores.items()}
            assert answers == self.model.scores[index]
            self.handed_out[index] = scored

    @precondition(lambda self: self.handed_out)
    @rule(pick=PICK, count=COUNT)
    def acknowledge(self, pick: int, count: int) -> None:
        chosen = list(self.handed_out)[pick % len(self.handed_out) :][:count]
        self.do(self.reader.acknowledge([self.handed_out.pop(index) for index in chosen]))
        for index in chosen:
            self.unacknowledged.remove(index)
            self.model.status[index] = "gone"

    @rule()
    def restart_trainer(self) -> None:
        self.reader: ScoredReader = self.queue.scored(RUN)
        self.handed_out: dict[int, ScoredGroup] = {}

    @rule()
    def trim(self) -> None:
        self.do(self.queue.trim(teachers=TEACHERS, runs=[RUN]))

    @invariant()
    def counts_agree(self) -> None:
        self.do(self.check_counts())

    async def check_counts(self) -> None:
        async with self.queue._client.pipeline(transaction=False) as pipeline:
            for teacher in TEACHERS:
                stream = self.queue.keys.jobs(teacher)
                pipeline.hmget(stream.load, ["queued_tokens", "scored"]).xinfo_groups(stream.stream)
            answers = await pipeline.execute()
        for teacher, (tokens, scored), [group] in zip(TEACHERS, answers[::2], answers[1::2], strict=True):
            waiting = len(self.model.open(teacher, "waiting"))
            busy = len(self.model.open(teacher, "held")) + len(self.model.open(teacher, "loose"))
            assert int(tokens or 0) == VIEW_TOKENS * (waiting + busy)
            assert (group["lag"], group["pending"]) == (waiting, busy)
            assert int(scored or 0) == self.model.commits[teacher]

    def teardown(self) -> None:
        """Whatever has happened: drained, every group comes out once, and nothing is left behind."""
        for which in range(4):
            self.crash(which)
        for which in (0, 1):
            while self.model.open(TEACHERS[which], "waiting") or self.model.open(TEACHERS[which], "loose"):
                self.read(which, 4)
                while self.claims:
                    self.commit(0)
        self.restart_trainer()
        while self.delivered < len(self.model.pushed) or self.unacknowledged:
            self.train(4)
            self.acknowledge(0, 4)
        assert sorted(self.model.pushed) == sorted(self.model.views)
        self.trim()
        for teacher in TEACHERS:
            stats = self.do(self.queue.teacher_stats(teacher))
            assert (stats.queued_tokens, stats.jobs.in_flight) == (0, 0)
            assert stats.jobs.length <= 1
        self.do(self.queue.close())


def run_machine(queue_url: str, runs: int) -> None:
    QueueMachine.url, QueueMachine.loop = queue_url, asyncio.new_event_loop()
    try:
        run_state_machine_as_test(
            QueueMachine,
            settings=settings(
                max_examples=runs,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        QueueMachine.loop.close()


def test_model_holds_in_200_runs(queue_url: str) -> None:
    run_machine(queue_url, 200)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_model_holds_in_5000_runs(queue_url: str) -> None:
    run_machine(queue_url, 5000)
