"""What the cache asks of the place that keeps its entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.teacher.cache.settings import CacheSettings, is_server


class StoreError(Exception):
    """The store cannot be used now; scoring goes on without it."""


class Store(Protocol):
    """Bytes by key, at most so many; every method but `close` may raise StoreError."""

    @property
    def held_bytes(self) -> int:
        """Bytes kept, as last counted."""
        ...

    async def open(self) -> None:
        """Raises OSError for a place that will never do, StoreError for one that may later."""
        ...

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What is kept under each key, or None; asking makes an entry recent."""
        ...

    async def put(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep each value under its key unless there is one; older entries make room."""
        ...

    async def drop(self, key: bytes) -> None:
        """Forget one entry."""
        ...

    async def close(self) -> None: ...


def build_store(settings: CacheSettings, namespace: str) -> Store:
    """The store of `settings.location`, not open yet.

    Args:
        namespace: prefix of the keys on a server.
    """
    if is_server(settings.location):
        from services.teacher.cache.server import ServerStore

        return ServerStore(
            settings.location, namespace, max_bytes=settings.limit, ttl_seconds=settings.ttl_seconds
        )
    from services.teacher.cache.directory import DirectoryStore

    return DirectoryStore(settings.location, max_bytes=settings.limit)
