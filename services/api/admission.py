"""Who may wait: a bound on accepted tokens, and an honest estimate of when to come back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from tutelage_client.errors import TutelageError

_MEMORY_SECONDS = 20.0
_UNKNOWN_RATE_RETRY_SECONDS = 1.0
# Waiting is estimated from an average; work is accepted only with this much room before its deadline.
_SAFETY = 1.2


class Admission:
    """Counts the tokens accepted and not yet answered; refuses early what could not be served in time.

    Nothing is refused while nothing else waits, so a wrong estimate corrects itself.
    """

    def __init__(self, max_queued_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_queued_tokens = max_queued_tokens
        self.queued_tokens = 0
        self._clock = clock
        self._done_tokens = 0.0
        self._busy_seconds = 0.0
        self._mark = 0.0
        self._freed = asyncio.Event()

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens answered per busy second over the last while; None before the first answer."""
        return self._done_tokens / self._busy_seconds if self._busy_seconds > 0 else None

    def enter(self, tokens: int, remaining_seconds: float | None) -> None:
        """Accept `tokens`, or raise RESOURCE_EXHAUSTED with the seconds after which to retry."""
        if self.queued_tokens:
            self._check_room(tokens, remaining_seconds)
        self.enter_unchecked(tokens)

    def enter_unchecked(self, tokens: int) -> None:
        """Count `tokens` that were admitted elsewhere (the queue bounds its own)."""
        if not self.queued_tokens:
            self._mark = self._clock()
        self.queued_tokens += tokens

    async def enter_when_free(self, tokens: int) -> None:
        """Accept `tokens` as soon as there is room: for callers that can be slowed down."""
        while self.queued_tokens and self.queued_tokens + tokens > self.max_queued_tokens:
            self._freed.clear()
            await self._freed.wait()
        self.enter_unchecked(tokens)

    def leave(self, tokens: int, *, answered: bool) -> None:
        """Take `tokens` out again; only answered ones say how fast the engine is."""
        self.queued_tokens -= tokens
        self._freed.set()
        if not answered:
            return
        now = self._clock()
        elapsed, self._mark = now - self._mark, now
        keep = math.exp(-elapsed / _MEMORY_SECONDS)
        # An exponential average over busy time, in which even a long interval counts no more than that.
        seconds = -math.expm1(-elapsed / _MEMORY_SECONDS) * _MEMORY_SECONDS
        share = seconds / elapsed if elapsed > 0 else 1.0
        self._done_tokens = self._done_tokens * keep + tokens * share
        self._busy_seconds = self._busy_seconds * keep + seconds

    def _check_room(self, tokens: int, remaining_seconds: float | None) -> None:
        rate = self.tokens_per_second
        excess = self.queued_tokens + tokens - self.max_queued_tokens
        if excess > 0:
            raise TutelageError(
                "RESOURCE_EXHAUSTED",
                f"queued tokens: {self.queued_tokens} wait and the request has {tokens}, "
                f"allowed are {self.max_queued_tokens}",
                retry_after=_bounded(excess / rate if rate else _UNKNOWN_RATE_RETRY_SECONDS),
            )
        if rate is None or remaining_seconds is None:
            return
        wait = (self.queued_tokens + tokens) / rate * _SAFETY
        if wait > remaining_seconds:
            raise TutelageError(
                "RESOURCE_EXHAUSTED",
                f"deadline: {remaining_seconds:.3f} s are left and the answer would take about {wait:.3f} s",
                retry_after=_bounded(wait - remaining_seconds),
            )


def _bounded(seconds: float) -> float:
    return min(max(seconds, 0.05), 60.0)
