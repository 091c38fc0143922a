"""The trainer's end of the queue: read scored groups, acknowledge them when a checkpoint covers them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import redis.asyncio
from tutelage.v1.rollout_pb2 import Group
from tutelage.v1.teacher_pb2 import ScoreResponse

from services.queue.connection import AWAY, MAX_BLOCK_SECONDS, Persistence, backoff, is_away
from services.queue.keys import Keys
from services.queue.records import ScoredGroup
from services.queue.scripts import Scripts
from services.queue.streams import Entry, Fields, read_group

CONSUMER = "trainer"
ACKNOWLEDGE_CHUNK = 256
READ_CHUNK = 64


class ScoredReader:
    """One trainer's reader of one run.

    A new reader first gets every group that was read but never acknowledged (the trainer restarted),
    then new ones. A group is handed out once per reader.
    """

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, run: str) -> None:
        self._client = client
        self._keys = keys
        self._run = run
        self._stream = keys.scored(run)
        self._scripts = Scripts(client)
        self._persist = Persistence()
        self._handed_out: set[str] = set()
        # Position in our own pending entries; None when all of them have been handed out.
        self._pending_from: str | None = "0"

    async def read(self, max_items: int, block_ms: int) -> list[ScoredGroup]:
        """Up to `max_items` groups; as soon as there is one, or none after `block_ms`."""
        end = time.monotonic() + block_ms / 1000
        attempt = 0
        while True:
            try:
                if groups := await self._read_once(max_items, end):
                    return groups
                attempt = 0
            except asyncio.CancelledError:
                self._pending_from = "0"
                raise
            except AWAY as error:
                if not is_away(error):
                    raise
                # The lost reply may have delivered groups: look at our own pending ones again.
                self._pending_from = "0"
                self._persist.outage.failed("reading scored groups", error)
                await asyncio.sleep(min(backoff(attempt), max(0.0, end - time.monotonic())))
                attempt += 1
            if time.monotonic() >= end:
                return []

    async def acknowledge(self, groups: Sequence[ScoredGroup]) -> None:
        """Groups that a durable checkpoint covers, or that are dropped: forget them, payload and all."""
        for start in range(0, len(groups), ACKNOWLEDGE_CHUNK):
            chunk = groups[start : start + ACKNOWLEDGE_CHUNK]
            arguments: list[str | int | bytes] = [self._keys.namespace, self._stream.group]
            for scored in chunk:
                arguments += [scored.entry, scored.group.id]
            await self._acknowledge(arguments)
            self._handed_out.difference_update(scored.entry for scored in chunk)

    async def _acknowledge(self, arguments: list[str | int | bytes]) -> None:
        await self._persist(
            lambda: self._scripts.run("acknowledge", self._stream.as_list(), arguments), "acknowledging"
        )

    async def _read_once(self, max_items: int, end: float) -> list[ScoredGroup]:
        max_items = min(max_items, READ_CHUNK)
        while self._pending_from is not None:
            entries = await self._read(max_items, 0.0, self._pending_from)
            groups = await self._load(entries)
            self._pending_from = entries[-1][0] if entries else None
            if groups:
                return groups
        wait = min(end - time.monotonic(), MAX_BLOCK_SECONDS)
        return await self._load(await self._read(max_items, wait, ">"))

    async def _read(self, max_items: int, wait: float, after: str) -> list[Entry]:
        entries = await read_group(
            self._client, self._stream, CONSUMER, count=max_items, wait=wait, after=after
        )
        self._persist.outage.worked()
        return entries

    async def _load(self, entries: list[Entry]) -> list[ScoredGroup]:
        wanted = [(entry, fields) for entry, fields in entries if entry not in self._handed_out]
        if not wanted:
            return []
        async with self._client.pipeline(transaction=False) as pipeline:
            for _, fields in wanted:
                pipeline.hgetall(self._keys.group((fields or {}).get(b"group", b"").decode()))
            payloads = await pipeline.execute()
        groups = []
        for (entry, _), payload in zip(wanted, payloads, strict=True):
            if not payload:
                # Acknowledging deletes payload and entry in one step, so this entry is a leftover.
                await self._client.xack(self._stream.stream, self._stream.group, entry)
                continue
            groups.append(_scored_group(entry, payload))
        # Only now: had a leftover's acknowledgement failed, all of them must be read again.
        self._handed_out.update(group.entry for group in groups)
        return groups


def _scored_group(entry: str, payload: Fields) -> ScoredGroup:
    scores, errors = {}, {}
    for name, value in payload.items():
        kind, _, view = name.decode().partition(":")
        if kind == "scores":
            scores[view] = ScoreResponse.FromString(value)
        elif kind == "error":
            errors[view] = value.decode()
    return ScoredGroup(entry=entry, group=Group.FromString(payload[b"group"]), scores=scores, errors=errors)
