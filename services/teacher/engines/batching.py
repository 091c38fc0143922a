"""Requests waiting for the compute thread, and how they are cut into forward passes.

A request becomes units: one context with as many of its sequences as fit the token budget. A batch
is as many waiting units as fit, of any requests, in order of arrival. Withdrawn requests leave no
work behind: their units are dropped when they come up.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tutelage_client.errors import TutelageError
from tutelage_client.types import Score, ScoreRequest, SequenceScore

T = TypeVar("T")


class Answer(Generic[T]):
    """A future of the running event loop that another thread completes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self._loop.create_future()

    @property
    def withdrawn(self) -> bool:
        """Nobody waits any more; safe to read from any thread."""
        return self.future.cancelled() or self._loop.is_closed()

    def resolve(self, result: T) -> None:
        self._settle(lambda: self.future.set_result(result))

    def fail(self, error: Exception) -> None:
        self._settle(lambda: self.future.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> None:
        def unless_done() -> None:
            if not self.future.done():
                settle()

        # The loop may close at any moment when its process ends; then nobody waits for the answer.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(unless_done)


@dataclass(eq=False)
class Job:
    """A request on its way through the engine; after it was queued the compute thread alone changes it."""

    request: ScoreRequest
    answer: Answer[Score]
    arrived: float = field(default_factory=time.perf_counter)
    began: float | None = None
    compute_seconds: float = 0.0
    tokens_computed: int = 0
    tokens_reused: int = 0
    open_units: int = 0
    failed: bool = False
    dropped: bool = False
    scores: dict[int, SequenceScore] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Unit:
    """Sequences (by index) of one context of a job; `tokens` is what a forward pass computes for them."""

    job: Job
    context: int
    sequences: tuple[int, ...]
    tokens: int

    def unwanted(self) -> bool:
        """Nobody waits for its scores any more: what takes long looks now and then."""
        return self.job.failed or self.job.answer.withdrawn


@dataclass(frozen=True)
class Control:
    """Something to do between batches, when no request is half done."""

    run: Callable[[], None]
    answer: Answer[None]


def cut(job: Job, budget: int) -> Iterator[Unit]:
    """The units of a job. A sequence longer than the budget is a unit of its own."""
    members: dict[int, list[int]] = {}
    for index, sequence in enumerate(job.request.sequences):
        members.setdefault(sequence.context, []).append(index)
    for context, indices in members.items():
        base = len(job.request.contexts[context])
        held: list[int] = []
        tokens = base
        for index in indices:
            rows = len(job.request.sequences[index].response_ids) - 1
            if held and tokens + rows > budget:
                yield Unit(job, context, tuple(held), tokens)
                held, tokens = [], base
            held.append(index)
            tokens += rows
        yield Unit(job, context, tuple(held), tokens)


class WaitingLine:
    """The line between the event loop, which submits, and the compute thread, which takes batches.

    Args:
        budget: tokens of one forward pass.
        alone: never put two requests into one batch.
    """

    def __init__(self, budget: int, *, alone: bool) -> None:
        self._budget = budget
        self._alone = alone
        self._units: deque[Unit] = deque()
        self._controls: deque[Control] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self.dropped_jobs = 0

    def submit(self, job: Job) -> None:
        units = list(cut(job, self._budget))
        job.open_units = len(units)
        with self._changed:
            self._refuse_if_closed()
            self._units.extend(units)
            self._changed.notify()

    def submit_control(self, control: Control) -> None:
        with self._changed:
            self._refuse_if_closed()
            self._controls.append(control)
            self._changed.notify()

    def close(self) -> None:
        """Fail everything that waits; the next take answers None."""
        with self._changed:
            self._closed = True
            for answer in {unit.job.answer for unit in self._units} | {c.answer for c in self._controls}:
                answer.fail(_closed_error())
            self._units.clear()
            self._controls.clear()
            self._changed.notify()

    def take(self) -> list[Unit] | Control | None:
        """Block until there is work: a batch, a control between batches, or None when closed."""
        with self._changed:
            while True:
                self._drop_withdrawn()
                if self._closed:
                    return None
                if self._controls and not (self._units and self._units[0].job.began is not None):
                    return self._controls.popleft()
                if self._units:
                    return self._next_batch()
                self._changed.wait()

    def give_up(self, job: Job) -> None:
        """Count a withdrawn job, once, whose remaining work is not done."""
        if not (job.failed or job.dropped):
            job.dropped = True
            self.dropped_jobs += 1

    def _next_batch(self) -> list[Unit]:
        batch = [self._units.popleft()]
        tokens = batch[0].tokens
        while self._units:
            self._drop_withdrawn()
            if not self._units or tokens + self._units[0].tokens > self._budget:
                break
            following = self._units[0].job
            if self._alone and following is not batch[0].job:
                break
            if self._controls and following.began is None and following is not batch[-1].job:
                break
            tokens += self._units[0].tokens
            batch.append(self._units.popleft())
        return batch

    def _drop_withdrawn(self) -> None:
        while self._units:
            job = self._units[0].job
            if not self._units[0].unwanted():
                return
            self._units.popleft()
            self.give_up(job)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise _closed_error()


def _closed_error() -> TutelageError:
    return TutelageError("UNAVAILABLE", "engine: closed")
