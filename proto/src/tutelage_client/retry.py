"""Which failures are worth another try, and when: exponential backoff with full jitter."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from tutelage_client.errors import TutelageError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Scoring changes nothing on a teacher, so an unanswered request may always be sent again.

    Retried are UNAVAILABLE, up to `attempts` times in all, and RESOURCE_EXHAUSTED when the
    teacher says when to come back, until the deadline: at once while another address has not said
    so too. Nothing else is. The 30 attempts take about a minute, so that a replica may be replaced:
    its new address is found up to twice as late as it is there, because lookups of a name that has
    gone back off, too.
    """

    attempts: int = 30
    initial_seconds: float = 0.05
    max_seconds: float = 5.0


class Attempts:
    """The tries of one call against its one overall deadline."""

    def __init__(self, policy: RetryPolicy, timeout: float | None) -> None:
        self._policy = policy
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._unavailable = 0
        self._tries = 0

    def remaining(self) -> float | None:
        """Seconds to the deadline, None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause_after(self, error: TutelageError, rest_seconds: float) -> float:
        """Seconds to wait before the next try; raises `error` when there is to be none.

        Args:
            rest_seconds: until one of the addresses is ready to be asked.
        """
        self._tries += 1
        full = error.code == "RESOURCE_EXHAUSTED" and error.retry_after is not None
        if error.code == "UNAVAILABLE":
            self._unavailable += 1
        elif not full:
            raise error
        if self._unavailable >= self._policy.attempts:
            raise error
        ceiling = min(self._policy.initial_seconds * 2.0 ** (self._tries - 1), self._policy.max_seconds)
        pause = random.uniform(0, ceiling)
        if full:
            # A full teacher said when there is room; the jitter keeps its callers from coming back as one.
            pause = rest_seconds + pause if rest_seconds else 0.0
        remaining = self.remaining()
        if remaining is not None and pause >= remaining:
            raise error
        return pause
