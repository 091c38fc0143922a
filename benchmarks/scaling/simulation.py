"""One day: groups are submitted, replicas come and go as the rule says, scored groups are counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tutelage.v1.rollout_pb2 import Group, Rollout, ViewRequest
from tutelage.v1.teacher_pb2 import Context, ScoreResponse
from tutelage_client import codec

from benchmarks.scaling.autoscaler import HorizontalAutoscaler, KedaAutoscaler
from benchmarks.scaling.fleet import Fleet, Replica, process_cpu_seconds
from benchmarks.scaling.host import TEACHER, VOCABULARY, HostOptions
from benchmarks.scaling.load import Arrival, Load, arrivals
from benchmarks.scaling.meter import Meter
from benchmarks.scaling.rules import HpaRule, KedaRule
from services.queue import LeaseSettings, Queue, Submitted
from services.queue.embedded import EmbeddedServer

RUN = "day"
CONTEXT_TOKENS = 2
SUBMITTED_AT_ONCE = 32
SAY_EVERY = 720  # samples
SETTLE_SECONDS = 60.0  # real; to finish what is left after the last arrival
Autoscaler = HorizontalAutoscaler | KedaAutoscaler


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated, in simulated seconds and tokens, and how it is made smaller."""

    load: Load
    rule: HpaRule | KedaRule  # averages in simulated tokens, or in jobs of `concurrency` at a time
    factor: float  # simulated seconds per real second
    unit: float = 1000.0  # simulated tokens that one token of the queue stands for
    rate: float = 200_000 / 30  # simulated tokens per second of a replica: hpa.yaml's half a minute
    group_tokens: float = 100_000.0
    model_load_seconds: float = 90.0
    grace_seconds: float = 30.0
    tick: float = 5.0  # how often the autoscaler is asked; it keeps its own, slower time
    metric_age: float = 15.0  # what it is told is this old: a scrape interval
    heartbeat: float = 0.5  # real seconds: threads cannot be hurried
    concurrency: int = 1
    hosts: int = 4
    kills: tuple[float, ...] = ()  # when a host is killed
    seed: int = 0

    @property
    def mean_units(self) -> int:
        return round(self.group_tokens / self.unit)

    @property
    def real_rate(self) -> float:
        """Tokens of the queue per real second of a replica."""
        return self.rate / self.unit * self.factor

    def host_options(self, url: str) -> HostOptions:
        return HostOptions(
            url=url, namespace="scaling", tokens_per_second=self.real_rate,
            load_seconds=self.model_load_seconds / self.factor,
            grace_seconds=self.grace_seconds / self.factor,
            heartbeat=self.heartbeat, concurrency=self.concurrency,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the system. Times in simulated seconds, tokens simulated."""

    at: float
    demand: float
    wanted: int
    living: int
    ready: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Scored:
    """One group's way: simulated seconds when it was submitted, when its scores were read, and its tokens."""

    submitted: float
    read: float
    tokens: float


@dataclass
class Day:
    """What happened."""

    setup: Setup
    samples: list[Sample] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    received: Counter[int] = field(default_factory=Counter)
    submitted: int = 0
    failed: int = 0
    replicas: list[Replica] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    killed_replicas: list[tuple[float, int]] = field(default_factory=list)  # simulated second, how many
    left: dict[str, int] = field(default_factory=dict)  # in the queue when everything was over
    late: float = 0.0  # longest that a submission came after its time, simulated seconds
    cpu: list[tuple[float, float]] = field(default_factory=list)  # real seconds, processor seconds so far
    busy: list[float] = field(default_factory=list)  # load average of the machine, a look a second
    began: float = 0.0
    ended: float = 0.0

    @property
    def lost(self) -> int:
        return self.submitted - len(self.received)

    @property
    def doubles(self) -> int:
        return sum(count - 1 for count in self.received.values())


class Simulation:
    """Runs one Setup; `announce` is told about the way of the day, a line now and then."""

    def __init__(self, setup: Setup, announce: Callable[[str], None] = print) -> None:
        self._setup = setup
        self._announce = announce
        self._day = Day(setup)
        self._planned: list[Arrival] = arrivals(
            setup.load, rate=setup.rate / setup.unit, mean_tokens=setup.mean_units, seed=setup.seed
        )
        self._at: dict[int, Arrival] = {}
        self._over = False

    async def run(self) -> Day:
        """From the first arrival until every group is scored and every replica has gone."""
        day = self._day
        with tempfile.TemporaryDirectory(prefix="scaling-") as name:
            directory = Path(name)
            with EmbeddedServer(directory / "queue", dies_with_parent=True) as server:
                async with Queue(
                    server.url, "scaling", max_queued_tokens=2**40,
                    lease=LeaseSettings(heartbeat=self._setup.heartbeat),
                ) as queue:  # fmt: skip
                    fleet = Fleet(self._setup.host_options(server.url), directory / "log")
                    await fleet.start(self._setup.hosts)
                    try:
                        await self._live(queue, fleet, server.pid)
                    finally:
                        await fleet.stop()
                    await self._look_at_the_end(queue)
        day.replicas, day.outcomes = fleet.replicas, fleet.outcomes
        return day

    async def _live(self, queue: Queue, fleet: Fleet, server: int) -> None:
        day = self._day
        day.began = time.monotonic()
        submitting = asyncio.create_task(self._submit(queue))
        others = [
            asyncio.create_task(self._collect(queue)),
            asyncio.create_task(self._scale(queue, fleet)),
            asyncio.create_task(self._kill(fleet)),
            asyncio.create_task(self._watch_processors(fleet, server)),
        ]
        try:
            await _first_failure(submitting, others)
            end = time.monotonic() + SETTLE_SECONDS
            while len(day.received) < day.submitted and time.monotonic() < end:
                await _first_failure(asyncio.create_task(asyncio.sleep(0.05)), others)
            # A while longer: one too many would show, and the last replicas may go.
            rest = self._setup.load.seconds - self.now()
            await _first_failure(
                asyncio.create_task(asyncio.sleep(max(0.3, rest / self._setup.factor))), others
            )
        finally:
            # Python 3.11's wait_for, which redis-py sends with, can swallow a cancellation.
            self._over = True
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        day.ended = time.monotonic()

    def now(self) -> float:
        """Simulated seconds since the day began."""
        return (time.monotonic() - self._day.began) * self._setup.factor

    async def _sleep_until(self, at: float) -> None:
        await asyncio.sleep(max(0.0, at - self.now()) / self._setup.factor)

    async def _submit(self, queue: Queue) -> None:
        """Every group at its time, several at once when the queue is slower than they come."""
        rng, request = np.random.default_rng(self._setup.seed), view_request()
        free = asyncio.Semaphore(SUBMITTED_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            for index, arrival in enumerate(self._planned):
                await self._sleep_until(arrival.at)
                await free.acquire()
                self._day.late = max(self._day.late, self.now() - arrival.at)
                group = make_group(index, arrival.tokens - CONTEXT_TOKENS, rng)
                self._at[index] = Arrival(self.now(), arrival.tokens)
                task = tasks.create_task(self._submit_one(queue, group, request))
                task.add_done_callback(lambda _: free.release())

    async def _submit_one(self, queue: Queue, group: Group, request: ViewRequest) -> None:
        outcome = await queue.submit_group(group, [request])
        if outcome is not Submitted.QUEUED:
            raise RuntimeError(f"group {group.index} was not queued: {outcome}")
        self._day.submitted += 1

    async def _collect(self, queue: Queue) -> None:
        """As a trainer: read, check, acknowledge."""
        day, reader = self._day, queue.scored(RUN)
        while not self._over:
            groups = await reader.read(64, 200)
            now = self.now()
            for scored in groups:
                index = scored.group.index
                arrival = self._at[index]
                day.received[index] += 1
                day.failed += not _complete(scored.scores.get("teacher"), arrival.tokens - CONTEXT_TOKENS)
                day.scored.append(Scored(arrival.at, now, arrival.tokens * self._setup.unit))
            await reader.acknowledge(groups)

    async def _scale(self, queue: Queue, fleet: Fleet) -> None:
        """Ask the autoscaler in its own rhythm, with figures as old as a scrape makes them."""
        setup, day = self._setup, self._day
        autoscaler, meter, at, next_sync = build_autoscaler(setup), Meter(queue, setup.unit), 0.0, 0.0
        fleet.scale(setup.rule.minimum if isinstance(setup.rule, HpaRule) else 0)
        async with contextlib.aclosing(meter):
            while not self._over:
                values, now = await meter.read(), self.now()
                demand = setup.load.demand(now) if now < setup.load.seconds else 0.0
                living = len(fleet.living())
                day.samples.append(Sample(now, demand, fleet.wanted, living, fleet.ready(), values))
                wanted = fleet.wanted
                if isinstance(autoscaler, KedaAutoscaler):  # it asks the queue itself, and keeps its own time
                    wanted = autoscaler.decide(now, wanted, values)
                elif now >= next_sync:
                    next_sync = now + autoscaler.rule.period
                    wanted = autoscaler.decide(now, wanted, self._older_values(now))
                fleet.scale(wanted)  # also replaces what was killed
                if len(day.samples) % SAY_EVERY == 0:
                    self._say(fleet)
                at = max(at + setup.tick, self.now())
                await self._sleep_until(at)

    def _older_values(self, now: float) -> Mapping[str, float]:
        old = [s for s in self._day.samples[-32:] if s.at <= now - self._setup.metric_age]
        return (old[-1] if old else self._day.samples[0]).values

    def _say(self, fleet: Fleet) -> None:
        sample = self._day.samples[-1]
        self._announce(
            f"  {sample.at / 3600:5.1f} h  load {sample.demand:5.1f}, ready {sample.ready:3d} of "
            f"{sample.wanted:3d}, {len(self._day.received):,} of {self._day.submitted:,} groups scored"
        )

    async def _kill(self, fleet: Fleet) -> None:
        for at in self._setup.kills:
            await self._sleep_until(at)
            self._day.killed_replicas.append((self.now(), await fleet.kill_host()))
        await asyncio.Event().wait()

    async def _watch_processors(self, fleet: Fleet, server: int) -> None:
        while not self._over:
            used = time.process_time() + process_cpu_seconds(server) + fleet.cpu_seconds()
            self._day.busy.append(os.getloadavg()[0])
            self._day.cpu.append((time.monotonic() - self._day.began, used))
            await asyncio.sleep(1.0)

    async def _look_at_the_end(self, queue: Queue) -> None:
        """What the queue itself says about the day."""
        stats = await queue.teacher_stats(TEACHER)
        self._day.left = {
            "scored": stats.scored, "dead": stats.dead, "expired": stats.expired,
            "waiting": stats.jobs.waiting, "in_flight": stats.jobs.in_flight,
        }  # fmt: skip


def build_autoscaler(setup: Setup) -> Autoscaler:
    if isinstance(setup.rule, KedaRule):
        return KedaAutoscaler(setup.rule)
    return HorizontalAutoscaler(setup.rule)


def view_request() -> ViewRequest:
    """One view: the log-probability of every response token."""
    request = ViewRequest(view="teacher", teacher=TEACHER)
    request.signal.sampled = True
    request.contexts.append(Context(ids=codec.pack_ids(np.zeros(CONTEXT_TOKENS, np.int32))))
    return request


def make_group(index: int, tokens: int, rng: np.random.Generator) -> Group:
    """A group whose one response has so many tokens."""
    ids = rng.integers(0, VOCABULARY, tokens).astype(np.int32)
    rollout = Rollout(response_ids=codec.pack_ids(ids))
    return Group(id=f"{RUN}-{index}", run=RUN, index=index, rollouts=[rollout], temperature=1.0)


def _complete(answer: ScoreResponse | None, positions: int) -> bool:
    """Whether every position of the group has a score."""
    if answer is None or len(answer.sequences) != 1 or answer.sequences[0].HasField("error"):
        return False
    sampled = np.frombuffer(answer.sequences[0].sampled, "<f4")
    return len(sampled) == positions and bool(np.isfinite(sampled).all())


async def _first_failure(main: asyncio.Task[None], others: Sequence[asyncio.Task[None]]) -> None:
    """Wait for `main`; what another task raised meanwhile is raised here."""
    await asyncio.wait({main, *others}, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        if task.done():
            main.cancel()
            task.result()
    await main
