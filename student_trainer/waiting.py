"""What the trainer says while it waits: which component is missing, or where the work is."""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog

from services.queue import Queue

log = structlog.get_logger(__name__)

PATIENCE = 5.0  # seconds without news before anybody is looked for
REPEAT = 30.0


class Watch:
    """Looks for the processes a run needs whenever nothing has arrived for a while.

    A killed process stops being present within three heartbeats, and is reported at the next look.
    """

    def __init__(self, queue: Queue, run: str, roles: list[str]) -> None:
        self._queue = queue
        self._run = run
        self._roles = roles
        self._last_news = self._last_look = time.monotonic()
        self._last_report = 0.0
        self._missing: list[str] = []

    def news(self) -> None:
        """Something arrived."""
        self._last_news = self._last_look = time.monotonic()

    async def look(self, waiting_for: str) -> str | None:
        """Called while waiting; returns the status to show when it is time to say something.

        Statuses: "waiting for scores: no sampler:run, no teacher:large" or "waiting for scores".
        """
        now = time.monotonic()
        if now - max(self._last_news, self._last_look) < PATIENCE:
            return None
        self._last_look = now
        missing = [role for role in self._roles if not await self._queue.alive(role)]
        status = f"waiting for {waiting_for}"
        if missing:
            status += ": no " + ", no ".join(missing)
        if missing != self._missing or now - self._last_report >= REPEAT:
            self._missing, self._last_report = missing, now
            report = log.warning if missing else log.info
            report(status, seconds=round(now - self._last_news, 1), missing=missing)
        return status

    async def given_up(self) -> str:
        """Why the newest order was given up, for the message of a run that cannot go on."""
        dead = await self._queue.dead_orders(self._run, count=1)
        return f"order {dead[0].order} was given up: {dead[0].error}" if dead else "no order was given up"

    async def idle(self, teachers: Sequence[str]) -> bool:
        """Whether neither samplers nor teachers have anything left to do for the run."""
        orders = (await self._queue.run_stats(self._run)).orders
        if orders.waiting + orders.in_flight:
            return False
        for teacher in teachers:
            jobs = (await self._queue.teacher_stats(teacher)).jobs
            if jobs.waiting + jobs.in_flight:
                return False
        return True
