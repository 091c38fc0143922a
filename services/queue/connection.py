"""Connections to Redis or Valkey with one retry policy: ours.

redis-py would retry writes and time out blocking reads by itself. Here every command is sent once, and
`Persistence` repeats whole steps, which are all idempotent, for as long as the server is away.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis
import redis.asyncio
import structlog
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from tutelage_client.errors import TutelageError

T = TypeVar("T")
log = structlog.get_logger(__name__)

# A blocking read waits at most this long at the server; the socket waits longer.
MAX_BLOCK_SECONDS = 10.0
SOCKET_TIMEOUT = 15.0
CONNECT_TIMEOUT = 5.0

# The server is away, starting, failing over or full: trying again later is right.
AWAY = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    OSError,
)
# Subclasses of ConnectionError that no waiting cures.
REFUSED = (exceptions.AuthenticationError, exceptions.AuthorizationError)

MIN_BACKOFF, MAX_BACKOFF = 0.02, 1.0
FIRST_REPORT, REPORT_EVERY = 1.0, 10.0


def connect(url: str) -> redis.asyncio.Redis:
    """A lazy asynchronous client of `redis://`, `rediss://` or `unix://`; RESP2, bytes, no retries."""
    return redis.asyncio.Redis.from_url(
        url,
        protocol=2,
        socket_timeout=SOCKET_TIMEOUT,
        socket_connect_timeout=CONNECT_TIMEOUT,
        retry=AsyncRetry(NoBackoff(), 0),
    )


def connect_blocking(url: str, timeout: float) -> redis.Redis:
    """The same, synchronous, for heartbeat threads; `timeout` seconds for every answer."""
    return redis.Redis.from_url(
        url,
        protocol=2,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),
    )


# Whatever it is, what stands before the last "@" is no place; the query may hold a password with one, too.
_PLACE = re.compile(
    r"(?P<scheme>rediss?|unix)://"
    r"(?:[^?]*(?:\?[^=]*)?@)?"
    r"(?P<place>(?:\[[\w:.%]+\]|[\w.%-]*)(?::\d+)?(?:/[^?#@]*)?)"
    r"(?:[?#][^@]*)?",
    re.DOTALL,
)


def without_secrets(url: str) -> str:
    """`url` for people to read: without user, password and query, also when it is malformed."""
    found = _PLACE.fullmatch(url)
    return f"{found['scheme']}://{found['place']}" if found else "(address not shown)"


class Outage:
    """Notices when the server goes away and returns, and reports it at a bearable rate."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._reported = 0.0

    def failed(self, doing: str, error: BaseException) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since, self._reported = now, now + FIRST_REPORT - REPORT_EVERY
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            log.warning(
                "queue unreachable", seconds=round(now - self._since, 1), doing=doing, error=str(error)
            )

    def worked(self) -> None:
        if self._since is not None:
            if time.monotonic() - self._since >= FIRST_REPORT:
                log.info("queue reachable again", seconds=round(time.monotonic() - self._since, 1))
            self._since = None


def is_away(error: BaseException) -> bool:
    """Whether `error` means that the same step may work later."""
    return isinstance(error, AWAY) and not isinstance(error, REFUSED)


class Persistence:
    """Repeats a step until the server has answered it, with backoff; other errors pass through."""

    def __init__(self) -> None:
        self.outage = Outage()

    async def __call__(
        self, step: Callable[[], Awaitable[T]], doing: str, patience: float | None = None
    ) -> T:
        """The result of `step`; raises its connection error after `patience` seconds (None: never)."""
        started, attempt = time.monotonic(), 0
        while True:
            try:
                result = await step()
            except AWAY as error:
                spent = time.monotonic() - started
                if not is_away(error) or (patience is not None and spent >= patience):
                    raise
                self.outage.failed(doing, error)
                await asyncio.sleep(backoff(attempt))
                attempt += 1
            else:
                self.outage.worked()
                return result


def backoff(attempt: int) -> float:
    """Seconds to wait before the next try: doubling, capped, with jitter so that a fleet spreads."""
    ceiling: float = min(MAX_BACKOFF, MIN_BACKOFF * 2 ** min(attempt, 10))
    return ceiling * random.uniform(0.5, 1.0)


async def check_server(client: redis.asyncio.Redis) -> None:
    """Refuse a server on which a promise of the queue would not hold.

    Raises:
        TutelageError: FAILED_PRECONDITION, saying what to change.
    """
    info: dict[str, Any] = await client.info()
    version = str(info.get("redis_version", "0"))
    if int(version.split(".", maxsplit=1)[0]) < 7:
        raise TutelageError(
            "FAILED_PRECONDITION", f"queue server: got version {version}, Redis >= 7 or Valkey is needed"
        )
    policy = str(info.get("maxmemory_policy", ""))
    if policy != "noeviction":
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"queue server: maxmemory-policy is {policy!r} and would evict queued work; "
            "run CONFIG SET maxmemory-policy noeviction (and set it in the server's configuration)",
        )
    if int(info.get("aof_enabled", 0)) != 1:
        log.warning("queue server keeps no append-only file: a restart of it loses queued work")
