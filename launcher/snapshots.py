"""Looks at a run from outside: its metrics file, the queue and its processes, into one Snapshot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from launcher.progress import ChildView, Snapshot, View
from services.queue.queue import Queue

if TYPE_CHECKING:
    from launcher.children import Child
    from student_trainer.config import RunConfig

LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 2.0


class MetricsTail:
    """Follows RUN_DIR/metrics.jsonl: only whole lines, each once, later values over earlier ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.step: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}

    def read(self) -> None:
        """Take in what was appended since the last call."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a line torn by a killed trainer
                continue
            if "evaluation" in record:
                self.evaluation = record["evaluation"]
            elif "step" in record:
                self.step = record


class Lookout:
    """Shows a fresh snapshot twice a second until cancelled."""

    def __init__(self, config: RunConfig, queue_url: str, children: Callable[[], Sequence[Child]]) -> None:
        self._config = config
        self._children = children
        self._queue = Queue(queue_url, config.queue.namespace)
        self._metrics = MetricsTail(config.run.directory / "metrics.jsonl")
        self._queued: int | None = None

    async def run(self, view: View) -> None:
        """Look and show, until cancelled."""
        try:
            while True:
                view.show(await self.look())
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await self._queue.close()

    async def look(self) -> Snapshot:
        """One snapshot; what cannot be read now keeps its last value, or None."""
        self._metrics.read()
        self._queued = await self._queued_tokens()
        step, evaluation = self._metrics.step, self._metrics.evaluation
        return Snapshot(
            run=self._config.run.name,
            steps=self._config.training.steps,
            step=step.get("step"),
            loss=step.get("loss"),
            kl=step.get("kl"),
            reward=step.get("reward_mean"),
            staleness=step.get("staleness_mean"),
            greedy=evaluation.get("greedy", {}).get("accuracy"),
            sampled=evaluation.get("sampled", {}).get("accuracy"),
            evaluated_version=evaluation.get("version"),
            queued_tokens=self._queued,
            scored_per_second=step.get("scored_tokens_per_second"),
            children=tuple(view_of(child) for child in self._children()),
        )

    async def _queued_tokens(self) -> int | None:
        """Unscored tokens in front of all teachers; None while the queue is away."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                stats = [await self._queue.teacher_stats(name) for name in self._config.teachers]
        except (TimeoutError, redis.RedisError):
            return None
        return sum(stat.queued_tokens for stat in stats)


def view_of(child: Child) -> ChildView:
    """A child as the screen shows it."""
    stopped = "restarting" if child.restart_at is not None else "stopped"
    state = "running" if child.running else stopped
    return ChildView(child.spec.name, state, child.total_restarts)
