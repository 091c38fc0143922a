"""Looks at a run from outside: its progress and teachers in the queue, and its processes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import redis

from launcher.progress import ChildView, Snapshot, View
from student_trainer.run_queue import run_queue

if TYPE_CHECKING:
    from launcher.children import Child
    from student_trainer.config import RunConfig

LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 2.0
RATE_SECONDS = 10.0  # the window of tokens per second


class Lookout:
    """Sees what the processes of a run say about themselves; while the queue is away, what it saw last."""

    def __init__(self, config: RunConfig, children: Callable[[], Sequence[Child]]) -> None:
        self._config = config
        self._children = children
        self._queue = run_queue(config)
        self._teachers = sorted(config.all_teachers())
        self._progress: dict[str, Any] = {}
        self._queued: int | None = None
        self._scored: deque[tuple[float, float]] = deque()

    async def run(self, view: View) -> None:
        """Look and show, until cancelled."""
        while True:
            view.show(await self.look())
            await asyncio.sleep(LOOK_SECONDS)

    async def close(self) -> None:
        await self._queue.close()

    async def says_finished(self) -> bool | None:
        """Whether the trainer says that the run has reached its end; None while nobody can be asked."""
        if not await self._ask():
            return None
        return self._progress.get("status") == "finished"

    async def look(self) -> Snapshot:
        """One snapshot."""
        await self._ask()
        progress = self._progress
        return Snapshot(
            run=self._config.run.name,
            steps=self._config.training.steps,
            status=progress.get("status"),
            step=progress.get("step"),
            loss=progress.get("loss"),
            kl=progress.get("kl"),
            reward=progress.get("reward_mean"),
            staleness=progress.get("staleness_mean"),
            greedy=progress.get("accuracy_greedy"),
            sampled=progress.get("accuracy_sampled"),
            queued_tokens=self._queued,
            scored_per_second=self._rate(progress.get("tokens_scored")),
            children=tuple(view_of(child) for child in self._children()),
        )

    async def _ask(self) -> bool:
        """Refresh what the queue knows; False when it did not answer in time."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                self._progress = await self._queue.read_progress(self._config.run.name)
                stats = [await self._queue.teacher_stats(name) for name in self._teachers]
        except (TimeoutError, redis.RedisError):
            self._queued = None
            return False
        self._queued = sum(stat.queued_tokens for stat in stats)
        return True

    def _rate(self, total: float | None) -> float | None:
        """Tokens per second over the last few looks."""
        if total is None:
            return None
        now = time.monotonic()
        self._scored.append((now, total))
        while now - self._scored[0][0] > RATE_SECONDS:
            self._scored.popleft()
        seconds = now - self._scored[0][0]
        return max(0.0, total - self._scored[0][1]) / seconds if seconds > 0 else None


def view_of(child: Child) -> ChildView:
    """A child as the screen shows it."""
    stopped = "restarting" if child.restart_at is not None else "stopped"
    state = "running" if child.running else stopped
    return ChildView(child.spec.name, state, child.total_restarts)
