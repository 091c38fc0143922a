"""A cache on a Redis or Valkey: values that expire, and a sorted set that says which was used last.

The limit in bytes is kept by the cache itself, entry by entry in one script, so the server may be the
queue's, which must not evict anything by itself. A server that is away or full costs a request at most
TIMEOUT seconds, once: the cache then leaves it alone for a while.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from importlib import resources
from typing import Any, TypeVar

import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.teacher.cache.store import StoreError

TIMEOUT = 2.0
ENTRY_BYTES = 256  # what the server needs for an entry beside its value
KEYS_AT_ONCE = 32

T = TypeVar("T")


class ServerStore:
    """Entries as values of a server.

    Args:
        url: redis://, rediss:// or unix://.
        namespace: prefix of every key.
    """

    def __init__(self, url: str, namespace: str, *, max_bytes: int, ttl_seconds: float) -> None:
        self._client = redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
        self._prefix = f"{namespace}:cache:"
        self._order, self._bytes = f"{self._prefix}order", f"{self._prefix}bytes"
        self._max_bytes = max_bytes
        self._ttl_ms = max(1, int(ttl_seconds * 1000))
        # A get must also work when the server is out of memory; its ZADD adds nothing.
        self._get = self._client.register_script("#!lua flags=allow-oom\n" + _source("get"))
        self._put = self._client.register_script("#!lua\n" + _source("put"))
        self._held = 0

    @property
    def held_bytes(self) -> int:
        return self._held

    async def open(self) -> None:
        held: Any = await _answered(self._client.get(self._bytes))
        self._held = int(held or 0)

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for start in range(0, len(keys), KEYS_AT_ONCE):
            digests = [key.hex() for key in keys[start : start + KEYS_AT_ONCE]]
            values = [self._prefix + digest for digest in digests]
            found += await _answered(self._get(keys=[self._order, *values], args=[self._ttl_ms, *digests]))
        return found

    async def put(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        for key, value in entries:
            if len(value) + ENTRY_BYTES > self._max_bytes:
                continue
            digest = key.hex()
            self._held = await _answered(
                self._put(
                    keys=[self._order, self._bytes, self._prefix + digest],
                    args=[self._ttl_ms, self._max_bytes, ENTRY_BYTES, digest, value, self._prefix],
                )
            )

    async def drop(self, key: bytes) -> None:
        await _answered(self._client.unlink(self._prefix + key.hex()))

    async def close(self) -> None:
        await self._client.aclose()


async def _answered(call: Awaitable[T]) -> T:
    try:
        return await call
    except (exceptions.RedisError, OSError) as error:
        raise StoreError(f"{type(error).__name__}: {error}") from error


def _source(name: str) -> str:
    return (resources.files(__package__) / "scripts" / f"{name}.lua").read_text()
