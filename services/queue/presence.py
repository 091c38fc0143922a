"""Presence: a process says that it lives, in a key that vanishes when it stops saying so."""

from __future__ import annotations

from types import TracebackType

import redis

from services.queue.heart import Heart
from services.queue.keys import Keys
from services.queue.records import LeaseSettings

TTL_HEARTBEATS = 3


class Presence:
    """`alive:{role}:{name}`, refreshed by a thread while the context is open."""

    def __init__(self, url: str, keys: Keys, settings: LeaseSettings, role: str, name: str) -> None:
        self._key = keys.alive(role, name)
        self._ttl_ms = round(1000 * TTL_HEARTBEATS * settings.heartbeat)
        self._heart = Heart(url, settings.renewal, self._refresh, f"{role}-{name}")

    def _refresh(self, client: redis.Redis) -> None:
        # The value is the full time to live: age = value - time left, by the server's clock alone.
        client.set(self._key, self._ttl_ms, px=self._ttl_ms)

    def __enter__(self) -> Presence:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heart.stop()
        # The key is left to vanish: deleting it here would need a server that may be away.
