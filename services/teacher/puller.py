"""Takes jobs from the queue and scores them through the same core as direct calls.

A job ends in exactly one way: committed, failed (tried again, in the end a dead letter), buried
(trying again cannot help) or handed back (draining). The queue's own thread keeps the leases, also of
jobs that wait for weights which their trainer has not published yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial

import structlog
from tutelage_client import codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Score, ScoreRequest, SequenceError

from services import tracing
from services.api.core import ScoringCore, spent
from services.logs import about
from services.queue import Failed, JobClaim, JobWorker, Queue, teacher_role
from services.teacher.following import FollowingEngine
from services.teacher.jobs import job_request
from services.teacher.spans import record_wait, score_span

_HOPELESS = frozenset({"INVALID_ARGUMENT", "NOT_FOUND"})
_BLOCK_MS = 1_000

log = structlog.get_logger(__name__)


class _DrainingError(Exception):
    """Told to stop while the job waited for weights."""


class Puller:
    """Works on the jobs of one teacher until `stop`.

    Args:
        concurrency: jobs that the core has at once.
        following: the engine behind `core` where its weights change; a job then gets those it asks for.
    """

    def __init__(
        self,
        core: ScoringCore,
        queue: Queue,
        *,
        teacher: str,
        consumer: str,
        concurrency: int,
        following: FollowingEngine | None = None,
    ) -> None:
        self._core = core
        self._queue = queue
        self._teacher = teacher
        self._consumer = consumer
        self._concurrency = concurrency
        self._following = following
        self._slots = asyncio.Semaphore(concurrency)
        self._waiting = 0  # jobs that want weights which are not there yet; they keep nobody from working
        self._begins_to_wait = asyncio.Event()
        self._running: dict[asyncio.Task[None], JobClaim] = {}
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> None:
        """Claim and score until stopped; returns when every claim has ended."""
        with self._queue.presence(teacher_role(self._teacher), self._consumer):
            async with self._queue.jobs(self._teacher, self._consumer) as worker:
                while not self._stopping.is_set():
                    await self._take_jobs(worker)
                await self._finish(worker)

    def stop(self) -> None:
        """Claim nothing more; what is claimed is finished."""
        self._stopping.set()

    def hurry(self) -> None:
        """Hand back what is claimed and not committed."""
        self._stopping.set()
        self._hurry.set()

    async def _take_jobs(self, worker: JobWorker) -> None:
        free = self._concurrency - (len(self._running) - self._waiting)
        if free <= 0:
            self._begins_to_wait.clear()
            waits = asyncio.create_task(self._begins_to_wait.wait())
            await self._until_stopped_or(waits, *self._running)
            waits.cancel()
            return
        claiming = asyncio.create_task(worker.claim(free, _BLOCK_MS))
        await self._until_stopped_or(claiming)
        if not claiming.done():
            claiming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await claiming
        if claiming.cancelled():
            return
        for claim in claiming.result():
            task = asyncio.create_task(self._work(worker, claim))
            self._running[task] = claim
            task.add_done_callback(partial(self._ended, worker))

    async def _until_stopped_or(self, *tasks: asyncio.Task[object]) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    def _ended(self, worker: JobWorker, task: asyncio.Task[None]) -> None:
        claim = self._running.pop(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # Not even its failure could be written down: let the lease run out.
            worker.abandon(claim)
            with job_log(claim):
                log.error("job_abandoned", exc_info=error)

    async def _finish(self, worker: JobWorker) -> None:
        """Wait for running jobs; when told to hurry, cancel them and hand their claims back."""
        hurry = asyncio.create_task(self._hurry.wait())
        while self._running and not hurry.done():
            await asyncio.wait({hurry, *self._running}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        left = dict(self._running)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _work(self, worker: JobWorker, claim: JobClaim) -> None:
        stream = self._queue.keys.jobs(self._teacher).stream
        record_wait(claim, stream)
        with job_log(claim), score_span(claim, stream) as span:
            try:
                outcome = await self._score(worker, claim, span)
            except asyncio.CancelledError:
                await self._hand_back(worker, claim, span)
                raise
            except _DrainingError:
                await self._hand_back(worker, claim, span)
                return
            except TutelageError as error:
                outcome = await self._fail(worker, claim, span, error)
            except Exception as error:
                log.exception("job_broke")
                broke = TutelageError("INTERNAL", f"{type(error).__name__}: {error}")
                outcome = await self._fail(worker, claim, span, broke)
            self._core.metrics.queue_jobs.labels(outcome).inc()
            span.set({"tutelage.outcome": outcome})

    async def _score(self, worker: JobWorker, claim: JobClaim, span: tracing.Span) -> str:
        loaded = await worker.load(claim)
        if loaded is None:
            return "not_needed"
        malformed: dict[int, SequenceError] = {}
        request = codec.request_from_proto(job_request(*loaded), malformed)

        async def ask() -> Score:
            remaining = None if claim.deadline_ms is None else claim.deadline_ms / 1000 - time.time()
            return await self._core.score(
                request, transport="queue", remaining_seconds=remaining, malformed=malformed
            )

        score = await (
            ask() if self._following is None else self._with_weights(self._following, request, ask)
        )
        if tracing.enabled():
            span.set(spent(score))
        answer = codec.score_to_bytes(score, request.signal.encoding)
        return "committed" if await worker.commit(claim, answer) else "second"

    async def _with_weights(
        self, following: FollowingEngine, request: ScoreRequest, ask: Callable[[], Awaitable[Score]]
    ) -> Score:
        """Ask once the weights that the job wants are there, while they stay."""
        while True:
            if not await following.offers(request.pins):  # who only looks keeps its place
                await self._until_published(following, request)
            async with self._slots, following.holding(request.pins) as held:
                if held:
                    return await ask()

    async def _until_published(self, following: FollowingEngine, request: ScoreRequest) -> None:
        publication = asyncio.create_task(following.published(request.pins))
        self._waiting += 1
        self._begins_to_wait.set()
        try:
            await self._until_stopped_or(publication)
        finally:
            self._waiting -= 1
            publication.cancel()
        if not publication.done():
            raise _DrainingError
        publication.result()

    async def _hand_back(self, worker: JobWorker, claim: JobClaim, span: tracing.Span) -> None:
        await worker.release(claim)
        self._core.metrics.queue_jobs.labels("released").inc()
        span.event("handed_back")

    async def _fail(
        self, worker: JobWorker, claim: JobClaim, span: tracing.Span, error: TutelageError
    ) -> str:
        log.warning("job_failed", error=str(error))
        span.fail(error.code, error.message)
        end = worker.bury if error.code in _HOPELESS else worker.fail
        failed = await end(claim, str(error))
        if failed is Failed.DEAD:
            span.event("dead_letter")
        return f"failed_{failed.value}"


def job_log(claim: JobClaim) -> AbstractContextManager[None]:
    """Every line that is logged inside is about the job."""
    return about(
        claim.traceparent, job=claim.entry, group=claim.group, view=claim.view, delivery=claim.deliveries
    )
