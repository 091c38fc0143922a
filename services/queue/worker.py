"""Workers of a stream: claim, keep the lease, and end every claim in exactly one way."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

import redis
import redis.asyncio
import structlog
from google.protobuf.message import DecodeError
from tutelage.v1.rollout_pb2 import Group, SampleOrder, ViewRequest
from tutelage_client.errors import TutelageError

from services.queue.connection import AWAY, MAX_BLOCK_SECONDS, Persistence, backoff, is_away
from services.queue.heart import Heart
from services.queue.keys import Keys, StreamKeys
from services.queue.records import Claim, Failed, JobClaim, LeaseSettings, OrderClaim
from services.queue.scripts import Scripts, blocking_script
from services.queue.streams import Fields, ensure_group, read_group

C = TypeVar("C", bound=Claim)
Delivery = tuple[str, int, Fields]  # entry id, deliveries so far, fields
log = structlog.get_logger(__name__)

LEAVE_PATIENCE = 2.0
SILENT_LEASES = 4


class Worker(ABC, Generic[C]):
    """A member of a stream's consumer group; use it as an async context manager.

    Every claim must end in one of `commit`/`finish`, `fail`, `bury`, `release` or `abandon`; until then its
    lease is renewed by a thread. Leaving the context hands back whatever is still claimed.
    """

    def __init__(
        self,
        url: str,
        client: redis.asyncio.Redis,
        keys: Keys,
        stream: StreamKeys,
        registry: tuple[str, str],
        *,
        settings: LeaseSettings,
        consumer: str,
    ) -> None:
        # A name of its own for each life: a restarted process must not own its predecessor's leases.
        self.consumer = f"{consumer}.{secrets.token_hex(4)}"
        self._client = client
        self._scripts = Scripts(client)
        self._keys = keys
        self._stream = stream
        self._registry = registry  # a set of names, and the name that its stream has there
        self._settings = settings
        self._persist = Persistence()
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._claiming = asyncio.Lock()
        self._reply_lost = False
        self._next_scan = 0.0
        self._next_tidy = time.monotonic() + settings.lease
        self._heart = Heart(url, settings.renewal, self._renew, self.consumer)

    async def __aenter__(self) -> Self:
        await self._persist(self._join, "joining")
        self._heart.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._heart.stop)
        try:
            await self._persist(
                lambda: self._run("leave", self.consumer, self._settings.lease_ms), "leaving", LEAVE_PATIENCE
            )
        except AWAY as away:
            log.warning("left without handing back; leases will run out", error=str(away))

    @property
    def held(self) -> int:
        """Number of claims not ended yet."""
        return len(self._held)

    def holds(self, claim: C) -> bool:
        """False once the claim has ended, or its lease was lost to another worker."""
        return claim.entry in self._held

    def abandon(self, claim: C) -> None:
        """Stop renewing a claim that could not be ended: its lease runs out, which counts a delivery."""
        self._drop(claim.entry)

    async def claim(self, max_items: int, block_ms: int) -> list[C]:
        """Up to `max_items` claims: leases that ran out first, then new entries.

        Returns as soon as there is one, or with none after `block_ms` (also while the server is away).
        """
        end = time.monotonic() + block_ms / 1000
        attempt = 0
        async with self._claiming:
            while True:
                if not self._heart.is_alive():
                    raise TutelageError("INTERNAL", "the worker's heartbeat is not running")
                try:
                    if claims := await self._claim_once(max_items, end):
                        return claims
                    attempt = 0
                except AWAY as error:
                    if not is_away(error):
                        raise
                    self._persist.outage.failed("claiming", error)
                    await asyncio.sleep(min(backoff(attempt), max(0.0, end - time.monotonic())))
                    attempt += 1
                if time.monotonic() >= end:
                    return []

    async def fail(self, claim: C, error: str) -> Failed:
        """Count a failed delivery: claimable again at once, or a dead letter after the last one."""
        settings = self._settings
        result = await self._end(
            claim, "fail", claim.entry, self.consumer, settings.lease_ms, settings.max_deliveries, error
        )
        self._next_scan = 0.0
        return Failed(result.decode())

    async def bury(self, claim: C, error: str) -> Failed:
        """Make a dead letter at once: for an error that trying again cannot cure."""
        result = await self._end(claim, "bury", claim.entry, self.consumer, error)
        return Failed(result.decode())

    async def release(self, claim: C) -> None:
        """Hand back at once without counting the delivery (draining)."""
        before = claim.deliveries - 1
        await self._end(claim, "release", claim.entry, self.consumer, self._settings.lease_ms, before)

    async def _join(self) -> None:
        await ensure_group(self._client, self._stream)
        await self._client.sadd(*self._registry)

    @abstractmethod
    def _parse(self, entry: str, deliveries: int, fields: Fields) -> C: ...

    async def _run(self, name: str, *arguments: str | int | bytes) -> Any:
        return await self._scripts.run(
            name, self._stream.as_list(), [self._keys.namespace, self._stream.group, *arguments]
        )

    async def _end(self, claim: C, name: str, *arguments: str | int | bytes) -> Any:
        result = await self._persist(lambda: self._run(name, *arguments), name)
        self._drop(claim.entry)
        return result

    async def _claim_once(self, max_items: int, end: float) -> list[C]:
        found: list[Delivery] = []
        try:
            await self._find(max_items, end, found)
            claims = [claim for delivery in found if (claim := await self._read_claim(delivery))]
            return await self._drop_expired(claims)
        except BaseException:
            # Entries may be ours without anyone knowing: delivered in a lost reply, or found above.
            self._reply_lost = True
            for entry, _, _ in found:
                self._drop(entry)
            raise

    async def _read_claim(self, delivery: Delivery) -> C | None:
        try:
            return self._parse(*delivery)
        except (KeyError, ValueError, DecodeError) as error:
            # Not written by this queue. It must not stop the work behind it.
            await self._run(
                "bury", delivery[0], self.consumer, f"INVALID_ARGUMENT: malformed entry: {error!r}"
            )
            self._drop(delivery[0])
            return None

    async def _find(self, max_items: int, end: float, found: list[Delivery]) -> None:
        now = time.monotonic()
        if self._reply_lost or (now >= self._next_scan and self._heart.in_contact >= self._settings.lease):
            await self._reclaim(max_items, found)
        if now >= self._next_tidy:
            await self._tidy()
        if len(found) < max_items:
            wait = 0.0 if found else min(end - now, self._settings.scan, MAX_BLOCK_SECONDS)
            await self._read_new(max_items - len(found), wait, found)

    async def _reclaim(self, max_items: int, found: list[Delivery]) -> None:
        with self._lock:
            held = list(self._held)
        settings = self._settings
        # Before contact has lasted a lease's time only what is certainly ours may be taken.
        ran_out = int(self._heart.in_contact >= settings.lease)
        rows = await self._run(
            "reclaim", self.consumer, settings.lease_ms, max_items, settings.max_deliveries,
            ran_out, int(self._reply_lost), *held,
        )  # fmt: skip
        for entry, deliveries, flat in rows:
            self._hold(entry.decode())
            found.append((entry.decode(), int(deliveries), dict(zip(flat[::2], flat[1::2], strict=True))))
        if len(rows) < max_items:
            self._reply_lost = False
            self._next_scan = time.monotonic() + settings.scan

    async def _read_new(self, max_items: int, wait: float, found: list[Delivery]) -> None:
        entries = await read_group(self._client, self._stream, self.consumer, count=max_items, wait=wait)
        self._persist.outage.worked()
        for entry, fields in entries:
            if fields is not None:
                self._hold(entry)
                found.append((entry, 1, fields))

    async def _drop_expired(self, claims: list[C]) -> list[C]:
        return claims

    async def _tidy(self) -> None:
        self._next_tidy = time.monotonic() + self._settings.lease
        await self._run("tidy", self.consumer, SILENT_LEASES * self._settings.lease_ms)

    def _hold(self, entry: str) -> None:
        with self._lock:
            self._held.add(entry)

    def _drop(self, entry: str) -> None:
        with self._lock:
            self._held.discard(entry)

    def _renew(self, client: redis.Redis) -> None:
        with self._lock:
            held = list(self._held)
        if not held:
            client.ping()
            return
        script = blocking_script(client, "renew")
        stream = self._stream
        lost = script(keys=stream.as_list(), args=[self._keys.namespace, stream.group, self.consumer, *held])
        for entry in lost:
            # A claim that ended while this ran is no longer held; only a real loss is worth a line.
            if entry.decode() in self._held:
                log.warning("lease lost to another worker", entry=entry.decode(), consumer=self.consumer)
            self._drop(entry.decode())


class JobWorker(Worker[JobClaim]):
    """A teacher replica's end of the queue."""

    async def load(self, claim: JobClaim) -> tuple[Group, ViewRequest] | None:
        """What to score, or None when nobody needs it any more (then it is acknowledged)."""
        return await self._persist(lambda: self._load(claim), "loading")

    async def _load(self, claim: JobClaim) -> tuple[Group, ViewRequest] | None:
        key, wanted = self._keys.group(claim.group), ["status", "group", f"request:{claim.view}"]
        status, group, request = cast("list[bytes | None]", await self._client.hmget(key, wanted))
        if status != b"queued" or group is None or request is None:
            await self._end(claim, "skip", claim.entry)
            return None
        return Group.FromString(group), ViewRequest.FromString(request)

    async def commit(self, claim: JobClaim, scores: bytes) -> bool:
        """Store serialized ScoreResponse `scores`; False when another worker was first or nobody needs it."""
        result = await self._end(
            claim, "commit", claim.entry, self.consumer, claim.group, claim.run, claim.view, scores
        )
        return bool(result == 1)

    def _parse(self, entry: str, deliveries: int, fields: Fields) -> JobClaim:
        deadline = fields.get(b"deadline")
        return JobClaim(
            entry=entry,
            consumer=self.consumer,
            deliveries=deliveries,
            run=fields[b"run"].decode(),
            group=fields[b"group"].decode(),
            view=fields[b"view"].decode(),
            tokens=int(fields[b"tokens"]),
            deadline_ms=None if deadline is None else int(deadline),
            traceparent=fields.get(b"traceparent", b"").decode(),
        )

    async def _drop_expired(self, claims: list[JobClaim]) -> list[JobClaim]:
        timed = [claim.entry for claim in claims if claim.deadline_ms is not None]
        if not timed:
            return claims
        gone = {entry.decode() for entry in await self._run("expire", self.consumer, *timed)}
        for entry in gone:
            self._drop(entry)
        return [claim for claim in claims if claim.entry not in gone]


class OrderWorker(Worker[OrderClaim]):
    """A sampler's end of the queue."""

    async def finish(self, claim: OrderClaim) -> bool:
        """Every group of the order is submitted. False when it had been finished before."""
        order = claim.order
        keys = [
            *self._stream.as_list(),
            self._keys.placed(order.run),
            self._keys.submitted(order.run, order.id),
        ]
        arguments: list[str | int | bytes] = [
            self._keys.namespace, self._stream.group, claim.entry, order.id,
        ]  # fmt: skip
        result = await self._persist(lambda: self._scripts.run("finish", keys, arguments), "finishing")
        self._drop(claim.entry)
        return bool(result == 1)

    def _parse(self, entry: str, deliveries: int, fields: Fields) -> OrderClaim:
        return OrderClaim(
            entry=entry,
            consumer=self.consumer,
            deliveries=deliveries,
            run=fields[b"run"].decode(),
            order=SampleOrder.FromString(fields[b"order"]),
        )
