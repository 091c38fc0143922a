"""Which of several addresses gets the next request: the one with the fewest tokens outstanding."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Generic, TypeVar

from tutelage_client.errors import invalid

T = TypeVar("T")

# Answers that say the endpoint itself is not doing well.
UNREACHABLE = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})

_FIRST_REST_SECONDS = 0.5
_LONGEST_REST_SECONDS = 15.0


class Endpoint(Generic[T]):
    """One address, its connection and how it has been doing."""

    def __init__(self, address: str, connection: T) -> None:
        self.address = address
        self.connection = connection
        self.outstanding_tokens = 0
        self.failures = 0
        self.resting_until = 0.0


class Balancer(Generic[T]):
    """Picks endpoints; safe to use from several threads.

    An endpoint that failed rests for a time that doubles with every failure in a row. When all
    rest, the one that is back first is tried, so a single address is never given up.
    """

    def __init__(self, endpoints: Sequence[Endpoint[T]]) -> None:
        self.endpoints = tuple(endpoints)
        self._lock = threading.Lock()

    def take(self, tokens: int) -> Endpoint[T]:
        """The endpoint for a request of `tokens`; give it back with `give_back`."""
        with self._lock:
            now = time.monotonic()
            awake = [e for e in self.endpoints if e.resting_until <= now]
            if awake:
                chosen = min(awake, key=lambda e: (e.outstanding_tokens, e.failures))
            else:
                chosen = min(self.endpoints, key=lambda e: e.resting_until)
            chosen.outstanding_tokens += tokens
            return chosen

    def give_back(self, endpoint: Endpoint[T], tokens: int, *, available: bool) -> None:
        """The request is over; `available` is False when the endpoint could not be reached."""
        with self._lock:
            endpoint.outstanding_tokens -= tokens
            if available:
                endpoint.failures = 0
                endpoint.resting_until = 0.0
            else:
                rest = min(_FIRST_REST_SECONDS * 2.0**endpoint.failures, _LONGEST_REST_SECONDS)
                endpoint.failures += 1
                endpoint.resting_until = time.monotonic() + rest


def as_addresses(addresses: str | Sequence[str]) -> tuple[str, ...]:
    """One or several "host:port" as a tuple without repeats; refuses none at all."""
    several = (addresses,) if isinstance(addresses, str) else tuple(dict.fromkeys(addresses))
    if not several or not all(several):
        raise invalid(f"addresses: got {addresses!r}, at least one host:port is needed")
    return several
