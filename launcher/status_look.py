"""One look at a running stack, straight from the queue: what a person wants to know of teachers and runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.queue import Overview, Queue, RunStats, ServerStats, StreamStats, TeacherStats
from services.queue.connection import without_secrets

if TYPE_CHECKING:
    from student_trainer.config import RunConfig

RATE_SECONDS = 10.0  # the window of scored jobs per second
HISTORY = 64  # looks that the sparkline remembers
RETRY_SECONDS = 1.0
ENDED = ("finished", "stopped")

NOTHING = StreamStats(length=0, waiting=0, in_flight=0, consumers=0, oldest_age=0.0)
NEVER_ASKED = TeacherStats(
    jobs=NOTHING, queued_tokens=0, waiting_tokens=0, in_flight_tokens=0, scored=0, dead=0, expired=0
)
NEVER_ORDERED = RunStats(orders=NOTHING, scored=NOTHING, dead_orders=0)


@dataclass(frozen=True, slots=True)
class TeacherLook:
    """A teacher; jobs per second are None until there have been two looks."""

    name: str
    replicas: int
    stats: TeacherStats
    scored_per_second: float | None
    history: tuple[int, ...]  # queued tokens, oldest first

    @property
    def missing(self) -> bool:
        """Somebody waits for it, and nobody is there."""
        return self.replicas == 0 and self.stats.jobs.waiting + self.stats.jobs.in_flight > 0


@dataclass(frozen=True, slots=True)
class RunLook:
    """A run; `progress` is what its trainer says."""

    name: str
    stats: RunStats
    samplers: int
    trainer: bool
    progress: Mapping[str, Any]

    @property
    def status(self) -> str:
        """The trainer's own words, or what is known without any."""
        said = self.progress.get("status")
        return "not started" if said is None else str(said)

    @property
    def ended(self) -> bool:
        return self.status in ENDED or self.status.startswith("failed")

    @property
    def missing(self) -> tuple[str, ...]:
        """Processes without which it does not go on."""
        if self.ended:
            return ()
        found = {"trainer": self.trainer, "sampler": self.samplers > 0}
        return tuple(name for name, there in found.items() if not there)


@dataclass(frozen=True, slots=True)
class StackLook:
    """Everything; runs that go on come first."""

    address: str
    server: ServerStats
    teachers: tuple[TeacherLook, ...]
    runs: tuple[RunLook, ...]


class Lookout:
    """Looks again and again, so that it knows rates and a history.

    Args:
        expected: a run whose parts are shown also before they have ever been in the queue.
    """

    def __init__(self, queue: Queue, expected: RunConfig | None = None) -> None:
        self._queue = queue
        self._expected_teachers = list(expected.teachers) if expected else []
        self._expected_runs = [expected.run.name] if expected else []
        self._only = expected is not None
        self._scored: dict[str, deque[tuple[float, int]]] = {}
        self._history: dict[str, deque[int]] = {}

    async def look(self) -> StackLook:
        """One look; raises redis-py's errors when the queue does not answer."""
        overview = await self._queue.overview(RETRY_SECONDS)
        runs = self._expected_runs if self._only else list(overview.runs)
        progress = {run: await self._queue.read_progress(run) for run in runs}
        teachers = self._expected_teachers if self._only else list(overview.teachers)
        looks = [_run(run, overview, progress[run]) for run in runs]
        return StackLook(
            address=without_secrets(self._queue.url),
            server=overview.server,
            teachers=tuple(self._teacher(name, overview) for name in teachers),
            runs=tuple(sorted(looks, key=lambda run: (run.ended, run.name))),
        )

    def _teacher(self, name: str, overview: Overview) -> TeacherLook:
        stats = overview.teachers.get(name, NEVER_ASKED)
        history = self._history.setdefault(name, deque(maxlen=HISTORY))
        history.append(stats.queued_tokens)
        return TeacherLook(
            name=name,
            replicas=overview.replicas.get(name, 0),
            stats=stats,
            scored_per_second=self._rate(name, stats.scored),
            history=tuple(history),
        )

    def _rate(self, name: str, scored: int) -> float | None:
        seen, now = self._scored.setdefault(name, deque()), time.monotonic()
        seen.append((now, scored))
        while now - seen[0][0] > RATE_SECONDS:
            seen.popleft()
        seconds = now - seen[0][0]
        return max(0, scored - seen[0][1]) / seconds if seconds > 0 else None


def _run(name: str, overview: Overview, progress: Mapping[str, Any]) -> RunLook:
    return RunLook(
        name=name,
        stats=overview.runs.get(name, NEVER_ORDERED),
        samplers=overview.samplers.get(name, 0),
        trainer=overview.trainers.get(name, 0) > 0,
        progress=progress,
    )


def as_document(look: StackLook) -> dict[str, Any]:
    """The look as one JSON object; null is what nobody knows."""
    return {
        "queue": {
            "address": look.address,
            "memory_bytes": look.server.memory_bytes,
            "memory_limit_bytes": look.server.memory_limit_bytes,
            "clients": look.server.clients,
        },
        "teachers": {teacher.name: _teacher_document(teacher) for teacher in look.teachers},
        "runs": {run.name: _run_document(run) for run in look.runs},
    }


def _teacher_document(teacher: TeacherLook) -> dict[str, Any]:
    stats = teacher.stats
    return {
        "replicas": teacher.replicas,
        "waiting_tokens": stats.waiting_tokens,
        "in_flight_tokens": stats.in_flight_tokens,
        "jobs": {"waiting": stats.jobs.waiting, "in_flight": stats.jobs.in_flight},
        "oldest_job_age_seconds": stats.jobs.oldest_age,
        "scored_jobs": stats.scored,
        "scored_jobs_per_second": teacher.scored_per_second,
        "dead_jobs": stats.dead,
        "expired_jobs": stats.expired,
        "missing": teacher.missing,
    }


def _run_document(run: RunLook) -> dict[str, Any]:
    shown = ("step", "steps", "loss", "kl", "accuracy_greedy", "accuracy_sampled", "staleness_mean")
    return {
        "status": run.status,
        **{name: run.progress.get(name) for name in shown},
        "trainer": run.trainer,
        "samplers": run.samplers,
        "orders": {"waiting": run.stats.orders.waiting, "in_flight": run.stats.orders.in_flight},
        "scored_groups": {"waiting": run.stats.scored.waiting, "in_flight": run.stats.scored.in_flight},
        "dead_orders": run.stats.dead_orders,
        "missing": list(run.missing),
    }
