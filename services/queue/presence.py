"""Presence: a process says that it lives, in a role's hash, where it is forgotten when it stops saying so."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import redis

from services.queue.heart import Heart
from services.queue.keys import Keys
from services.queue.records import LeaseSettings
from services.queue.scripts import blocking_script

TTL_HEARTBEATS = 3
TRAINER_ROLE = "trainer"  # its name is the run's


def sampler_role(run: str) -> str:
    """The role under which the samplers of a run are present."""
    return f"sampler:{run}"


def teacher_role(name: str) -> str:
    """The role under which replicas of a teacher are present."""
    return f"teacher:{name}"


class Presence:
    """A name in the hash of its role, refreshed by a thread while the context is open."""

    def __init__(self, url: str, keys: Keys, settings: LeaseSettings, role: str, name: str) -> None:
        self._key = keys.present(role)
        ttl_ms = round(1000 * TTL_HEARTBEATS * settings.heartbeat)
        self._arguments: list[str | int] = [keys.namespace, "", name, ttl_ms]
        self._heart = Heart(url, settings.renewal, self._refresh, f"{role}-{name}")

    def _refresh(self, client: redis.Redis) -> None:
        blocking_script(client, "present")(keys=[self._key], args=self._arguments)

    def __enter__(self) -> Presence:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heart.stop()
        # The name is left to expire: deleting it here would need a server that may be away.


def ages(hash_of_role: Mapping[bytes, bytes], now: float) -> dict[str, float]:
    """Who of a role is present at `now`, the server's clock in seconds: seconds since each last said so."""
    result = {}
    for name, value in hash_of_role.items():
        said, expires = (int(part) / 1000 for part in value.split())
        if expires > now:
            result[name.decode()] = max(0.0, now - said)
    return result
