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
    {"acknowledge", "finish", "leave", "present", "release", "renew", "skip", "tidy", "trim"}
)
_READ_ONLY = frozenset({"load"})


@cache
def source(name: str) -> str:
    """The text of script `name`, with the shared functions in front."""
    folder = resources.files(__package__) / "scripts"
    flags = " flags=no-writes" if name in _READ_ONLY else ""
    if name in _ALLOWED_OUT_OF_MEMORY:
        flags = " flags=allow-oom"
    return f"#!lua{flags}\n" + (folder / "common.lua").read_text() + (folder / f"{name}.lua").read_text()


class Scripts:
    """The scripts as callables on one asynchronous client."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._loaded: dict[str, AsyncScript] = {}

    async def run(self, name: str, keys: list[str], arguments: list[str | int | bytes]) -> Any:
        return await self._script(name)(keys=keys, args=arguments)

    def queue(self, pipeline: Any, name: str, keys: list[str], arguments: list[str | int | bytes]) -> None:
        """Put a call into a pipeline; whoever executes it has to `load` the script on NoScriptError."""
        pipeline.evalsha(self._script(name).sha, len(keys), *keys, *arguments)

    async def load(self, name: str) -> None:
        """Make the server know the script."""
        await self._client.script_load(source(name))

    def _script(self, name: str) -> AsyncScript:
        if name not in self._loaded:
            self._loaded[name] = self._client.register_script(source(name))
        return self._loaded[name]


def blocking_script(client: redis.Redis, name: str) -> Script:
    """Script `name` on a synchronous client (heartbeat threads)."""
    return client.register_script(source(name))
