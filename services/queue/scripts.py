"""The queue's Lua scripts: every step that touches several keys is one of them, so it happens whole.

A client calls a script by its hash; redis-py loads it again when the server does not know it (any more).
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import redis
import redis.asyncio
from redis.commands.core import AsyncScript, Script

# These free memory or keep what is held, so they must also run when the server is out of memory.
_ALLOWED_OUT_OF_MEMORY = frozenset(
    {"acknowledge", "finish", "leave", "release", "renew", "skip", "tidy", "trim"}
)


@cache
def source(name: str) -> str:
    """The text of script `name`, with the shared functions in front."""
    folder = resources.files(__package__) / "scripts"
    flags = "#!lua flags=allow-oom\n" if name in _ALLOWED_OUT_OF_MEMORY else "#!lua\n"
    return flags + (folder / "common.lua").read_text() + (folder / f"{name}.lua").read_text()


class Scripts:
    """The scripts as callables on one asynchronous client."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._loaded: dict[str, AsyncScript] = {}

    async def run(self, name: str, keys: list[str], arguments: list[str | int | bytes]) -> Any:
        script = self._loaded.get(name)
        if script is None:
            script = self._loaded[name] = self._client.register_script(source(name))
        return await script(keys=keys, args=arguments)


def blocking_script(client: redis.Redis, name: str) -> Script:
    """Script `name` on a synchronous client (heartbeat threads)."""
    return client.register_script(source(name))
