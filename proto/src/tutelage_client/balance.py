"""Which of several addresses gets the next request: the one with the fewest tokens outstanding.

An address may be a name that stands for several replicas; gRPC gives them their turns (see connect.py).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence
from typing import Generic, TypeVar

from tutelage_client.errors import TutelageError, invalid

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Answers that say the endpoint itself is not doing well.
UNREACHABLE = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})

_FIRST_REST_SECONDS = 0.5
_LONGEST_REST_SECONDS = 15.0
_SHORTEST_FULL_SECONDS = 0.05
_TOLD_AFTER_SECONDS = 5.0  # an outage that lasts longer is told, once


class Endpoint(Generic[T]):
    """One address, its connection and how it has been doing."""

    def __init__(self, address: str, connection: T) -> None:
        self.address = address
        self.connection = connection
        self.outstanding_tokens = 0
        self.failures = 0
        self.failing_since = 0.0
        self.failed_at = 0.0
        self.resting_until = 0.0
        self.full_until = 0.0
        self.outage_told = False

    @property
    def awake_at(self) -> float:
        """When it may be asked again, by the monotonic clock."""
        return max(self.resting_until, self.full_until)


class Balancer(Generic[T]):
    """Picks endpoints; safe to use from several threads.

    Among equals the choice is random, so that many clients do not all begin with the same address.
    An endpoint that failed rests for a time that doubles with every failure in a row, one that is
    full rests for as long as it said. When all rest, the one that is back first is tried, so a
    single address is never given up; when all failed, the one that did so longest ago: it may well
    be back, and the one that failed just now is not.
    """

    def __init__(self, endpoints: Sequence[Endpoint[T]]) -> None:
        self.endpoints = tuple(endpoints)
        self._lock = threading.Lock()

    def take(self, tokens: int) -> Endpoint[T]:
        """The endpoint for a call of `tokens`, at least one; give it back with `give_back`."""
        with self._lock:
            now = time.monotonic()
            awake = [e for e in self.endpoints if e.awake_at <= now]
            if awake:
                chosen = min(awake, key=lambda e: (e.outstanding_tokens, e.failures, random.random()))
            elif all(e.resting_until > now for e in self.endpoints):
                chosen = min(self.endpoints, key=lambda e: e.failed_at)
            else:
                chosen = min(self.endpoints, key=lambda e: e.awake_at)
            chosen.outstanding_tokens += max(tokens, 1)
            return chosen

    def give_back(self, endpoint: Endpoint[T], tokens: int) -> None:
        """The call of `tokens` is over."""
        with self._lock:
            endpoint.outstanding_tokens -= max(tokens, 1)

    def observe(self, endpoint: Endpoint[T], error: TutelageError | None = None) -> None:
        """The endpoint answered, or `error` came instead; CANCELLED is of this side and says nothing."""
        if error is not None and error.code == "CANCELLED":
            return
        with self._lock:
            news = self._note(endpoint, error, time.monotonic())
        if news:
            logger.warning("%s: %s", endpoint.address, news)

    def _note(self, endpoint: Endpoint[T], error: TutelageError | None, now: float) -> str:
        """What there is to tell of it, mostly nothing."""
        if error is not None and error.code in UNREACHABLE:
            rest = min(_FIRST_REST_SECONDS * 2.0**endpoint.failures, _LONGEST_REST_SECONDS)
            if not endpoint.failures:
                endpoint.failing_since = now
            endpoint.failures += 1
            endpoint.failed_at = now
            endpoint.resting_until = now + rest
            seconds = now - endpoint.failing_since
            if endpoint.outage_told or seconds < _TOLD_AFTER_SECONDS:
                return ""
            endpoint.outage_told = True
            return f"{endpoint.failures} calls in a row have failed, the first {seconds:.0f} s ago; {error}"
        news = "answers again" if endpoint.outage_told else ""
        endpoint.failures = 0
        endpoint.resting_until = 0.0
        endpoint.outage_told = False
        if error is not None and error.code == "RESOURCE_EXHAUSTED" and error.retry_after is not None:
            endpoint.full_until = now + max(error.retry_after, _SHORTEST_FULL_SECONDS)
        return news

    def add_load(self, endpoint: Endpoint[T], tokens: int) -> None:
        """Count `tokens` more on an endpoint that is taken, or fewer when negative."""
        with self._lock:
            endpoint.outstanding_tokens += tokens

    def rest_seconds(self) -> float:
        """Seconds until an endpoint is awake; 0 when one is."""
        with self._lock:
            return max(0.0, min(e.awake_at for e in self.endpoints) - time.monotonic())


def as_addresses(addresses: str | Sequence[str]) -> tuple[str, ...]:
    """One or several "host:port" as a tuple without repeats; refuses none at all."""
    several = (addresses,) if isinstance(addresses, str) else tuple(dict.fromkeys(addresses))
    if not several or not all(several):
        raise invalid(f"addresses: got {addresses!r}, at least one host:port is needed")
    return several
