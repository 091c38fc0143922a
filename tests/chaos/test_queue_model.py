"""A state machine on a real server: no order of adds, reads, commits, crashes, reclaims and trims breaks it.

The model predicts the exact answer of every operation, and of its repetition, as after a lost reply.
Time is simulated: no heartbeat runs, and a crash makes the leases of the crashed worker run out at once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.queue_data import PROMPT_TOKENS, VIEW_TOKENS, ids, make_group, make_request, make_scores
from tutelage.v1.rollout_pb2 import ViewRequest
from tutelage.v1.teacher_pb2 import Context

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
from services.queue.keys import StreamKeys
from services.queue.streams import read_group

pytest_plugins = ["support.queue_server"]

RUN = "run"
TEACHERS = ("big", "small")  # a view is named after its teacher
MAX_DELIVERIES = 3
LEASE = LeaseSettings(heartbeat=3600, max_deliveries=MAX_DELIVERIES)
NAMESPACES = itertools.count()
TEACHER = st.sampled_from(TEACHERS)
VIEWS = st.sampled_from([("big",), ("small",), TEACHERS, ()])
PICK = st.integers(0, 99)
COUNT = st.integers(1, 4)


class SteadyHeart:
    """A heart without a thread: the server has always been there."""

    in_contact = float("inf")

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def is_alive(self) -> bool:
        return True


def request(teacher: str, index: int) -> ViewRequest:
    """A view with a context of its own length: no two jobs in a row have as many tokens."""
    return ViewRequest(view=teacher, teacher=teacher, contexts=[Context(ids=ids(PROMPT_TOKENS + index % 5))])


def job_tokens(index: int) -> int:
    return VIEW_TOKENS + index % 5


@dataclass
class Job:
    """One view of one group as the model sees it; claimed by at most one living worker."""

    group: int
    view: str
    state: str = "waiting"  # waiting → (orphan →) held ⇄ loose → done
    deliveries: int = 0

    @property
    def tokens(self) -> int:
        return job_tokens(self.group)


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
        """Loose jobs first, in stream order, the exhausted ones buried; orphans; then waiting ones."""
        for job in self.open(teacher, "loose"):
            if job.deliveries == MAX_DELIVERIES:
                self.bury(job)
        taken: list[Job] = []
        for state, counted in (("loose", 1), ("orphan", 0), ("waiting", 1)):
            for job in self.open(teacher, state)[: count - len(taken)]:
                job.state, job.deliveries = "held", job.deliveries + counted
                taken.append(job)
        return taken

    def busy(self, teacher: str) -> int:
        return sum(len(self.open(teacher, state)) for state in ("held", "loose", "orphan"))

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


async def age(client: Any, stream: StreamKeys, consumer: str) -> None:
    """Let the leases of a consumer run out: its pending entries have been idle for long."""
    rows = await client.xpending_range(stream.stream, stream.group, "-", "+", 1000, consumername=consumer)
    for row in rows:
        await client.xclaim(
            stream.stream, stream.group, consumer, 0, [row["message_id"]],
            idle=2 * LEASE.lease_ms, retrycount=row["times_delivered"], justid=True,
        )  # fmt: skip


class QueueMachine(RuleBasedStateMachine):
    """Two teachers, producers, and one trainer that restarts; every crashed worker is replaced."""

    url: ClassVar[str] = ""
    loop: ClassVar[asyncio.AbstractEventLoop]

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(self.url, f"model:{next(NAMESPACES)}", lease=LEASE)
        self.model = Model()
        self.workers = {teacher: self.start_worker(teacher) for teacher in TEACHERS}
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

    @initialize(groups=st.lists(VIEWS, min_size=2, max_size=6))
    def begin_with_groups(self, groups: list[tuple[str, ...]]) -> None:
        for views in groups:
            self.add(views)

    @rule(views=VIEWS)
    def add(self, views: tuple[str, ...]) -> None:
        index = len(self.model.views)
        requests = [request(teacher, index) for teacher in views]
        assert self.do(self.queue.submit_group(make_group(RUN, index), requests)) is Submitted.QUEUED
        self.model.add(index, views)

    @precondition(lambda self: any(status != "gone" for status in self.model.status.values()))
    @rule(pick=PICK)
    def add_again(self, pick: int) -> None:
        present = [index for index, status in self.model.status.items() if status != "gone"]
        group = make_group(RUN, present[pick % len(present)])
        assert self.do(self.queue.submit_group(group, [make_request("big", "big")])) is Submitted.EXISTS

    @precondition(lambda self: any(job.state in ("waiting", "loose", "orphan") for job in self.model.jobs))
    @rule(teacher=TEACHER, count=COUNT)
    def read(self, teacher: str, count: int) -> None:
        worker = self.workers[teacher]
        worker._next_scan = 0.0
        claims = self.do(worker.claim(count, 0))
        expected = self.model.claim(teacher, count)
        assert [self.model.job(claim) for claim in claims] == expected
        assert [claim.deliveries for claim in claims] == [job.deliveries for job in expected]
        self.claims += [(worker, claim) for claim in claims]

    @precondition(lambda self: any(job.state == "waiting" for job in self.model.jobs))
    @rule(teacher=TEACHER, count=COUNT)
    def read_and_lose_the_reply(self, teacher: str, count: int) -> None:
        worker = self.workers[teacher]
        self.do(read_group(self.queue._client, worker._stream, worker.consumer, count=count, wait=0))
        worker._reply_lost = True
        for job in self.model.open(teacher, "waiting")[:count]:
            job.state, job.deliveries = "orphan", 1

    @precondition(lambda self: self.claims)
    @rule(pick=PICK, twice=st.booleans())
    def commit(self, pick: int, twice: bool) -> None:
        worker, claim, job = self.pop_claim(pick)
        tag = str(next(self.tags))
        expected = self.model.commit(job, tag)
        for _ in range(1 + twice):
            assert self.do(worker.commit(claim, make_scores(tag))) is expected

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
    @rule(pick=PICK, twice=st.booleans())
    def fail(self, pick: int, twice: bool) -> None:
        worker, claim, job = self.pop_claim(pick)
        for _ in range(1 + twice):
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
    @rule(pick=PICK, twice=st.booleans())
    def release(self, pick: int, twice: bool) -> None:
        worker, claim, job = self.pop_claim(pick)
        for _ in range(1 + twice):
            self.do(worker.release(claim))
        if job.state == "held":
            job.state, job.deliveries = "loose", job.deliveries - 1

    @precondition(lambda self: self.claims or any(self.model.open(t, "orphan") for t in TEACHERS))
    @rule(teacher=TEACHER)
    def crash(self, teacher: str) -> None:
        """The worker is gone, or so slow that its leases run out; another takes its place."""
        worker, stream = self.workers[teacher], self.queue.keys.jobs(teacher)
        self.workers[teacher] = self.start_worker(teacher)
        self.zombies += [(owner, claim) for owner, claim in self.claims if owner is worker]
        self.claims = [(owner, claim) for owner, claim in self.claims if owner is not worker]
        for job in self.model.open(teacher, "held") + self.model.open(teacher, "orphan"):
            job.state = "loose"
        self.do(age(self.queue._client, stream, worker.consumer))

    @precondition(lambda self: len(self.model.pushed) > self.delivered or self.unacknowledged)
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

    @precondition(lambda self: self.unacknowledged)
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
            busy = self.model.busy(teacher)
            states = ("waiting", "loose", "held", "orphan")
            jobs = [job for state in states for job in self.model.open(teacher, state)]
            assert int(tokens or 0) == sum(job.tokens for job in jobs)
            assert (group["lag"], group["pending"]) == (waiting, busy)
            assert int(scored or 0) == self.model.commits[teacher]
            # What an autoscaler is told: nobody holds what is waiting or loose.
            free = [job for job in jobs if job.state in ("waiting", "loose")]
            stats = await self.queue.teacher_stats(teacher)
            assert (stats.jobs.waiting, stats.jobs.in_flight) == (len(free), len(jobs) - len(free))
            assert stats.waiting_tokens == sum(job.tokens for job in free)
            assert stats.waiting_tokens + stats.in_flight_tokens == stats.queued_tokens == int(tokens or 0)

    def teardown(self) -> None:
        """Whatever has happened: drained, every group comes out once, and nothing is left behind."""
        for teacher in TEACHERS:
            self.crash(teacher)
            while self.model.open(teacher, "waiting") or self.model.open(teacher, "loose"):
                self.read(teacher, 4)
                while self.claims:
                    self.commit(0, False)
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
                phases=[Phase.reuse, Phase.generate, Phase.shrink],
            ),
        )
    finally:
        QueueMachine.loop.close()


@pytest.mark.timeout(400)
def test_model_holds_in_200_runs(queue_url: str) -> None:
    run_machine(queue_url, 200)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_model_holds_in_5000_runs(queue_url: str) -> None:
    run_machine(queue_url, 5000)
