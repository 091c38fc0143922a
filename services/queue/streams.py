"""Plain stream commands that worker and reader share."""

from __future__ import annotations

from typing import Any

import redis.asyncio
from redis import exceptions

from services.queue.keys import StreamKeys

Fields = dict[bytes, bytes]
Entry = tuple[str, Fields | None]  # no fields: the entry was trimmed while it was pending


async def ensure_group(client: redis.asyncio.Redis, stream: StreamKeys) -> None:
    """Create stream and consumer group when they are not there; the group starts at the first entry."""
    try:
        await client.xgroup_create(stream.stream, stream.group, id="0", mkstream=True)
    except exceptions.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


async def read_group(
    client: Any, stream: StreamKeys, consumer: str, *, count: int, wait: float, after: str = ">"
) -> list[Entry]:
    """Read as `consumer`: new entries (`>`), or its own pending ones after an id. Waits `wait` seconds."""
    # BLOCK 0 would wait for ever, so no wait means no BLOCK at all.
    block = [] if wait < 0.001 else ["BLOCK", int(wait * 1000)]
    try:
        reply = await client.execute_command(
            "XREADGROUP", "GROUP", stream.group, consumer, "COUNT", count, *block,
            "STREAMS", stream.stream, after,
        )  # fmt: skip
    except exceptions.ResponseError as error:
        # Not there yet, or deleted by someone while we waited.
        if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
            raise
        await ensure_group(client, stream)
        return []
    return [(entry.decode(), fields or None) for entry, fields in reply[0][1]] if reply else []
