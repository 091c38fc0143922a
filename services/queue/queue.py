"""The queue as every process sees it: one handle on one server and one namespace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tutelage.v1.rollout_pb2 import Group, SampleOrder, ViewRequest
from tutelage_client.errors import TutelageError, invalid

from services import strict_json
from services.queue.connection import AWAY, Persistence, check_server, connect, without_secrets
from services.queue.eyes import Eyes
from services.queue.keys import Keys, StreamKeys
from services.queue.presence import Presence
from services.queue.reader import ScoredReader
from services.queue.records import (
    DeadLetter,
    LeaseSettings,
    OrderClaim,
    Overview,
    RunStats,
    Submitted,
    TeacherStats,
)
from services.queue.scripts import Scripts
from services.queue.worker import JobWorker, OrderWorker

Argument = str | int | bytes
INT32_BYTES = 4


class Queue:
    """Orders, groups, jobs and scores on a Redis or Valkey server.

    Use it as an async context manager, or call `open` and `close`. All its methods outlast an absent
    server (they wait and report); every write may be repeated without effect.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        namespace: prefix of every key.
        max_queued_tokens: per teacher; a group that would pass it is refused with `Submitted.FULL`.
        lease: heartbeat and delivery limits; the same in every process of a run.
    """

    def __init__(
        self,
        url: str,
        namespace: str = "tutelage",
        *,
        max_queued_tokens: int = 1_000_000,
        lease: LeaseSettings | None = None,
    ) -> None:
        self.url = url
        self.keys = Keys(namespace)
        self.lease = lease or LeaseSettings()
        self._max_queued_tokens = max_queued_tokens
        # Any: redis-py types replies as unions over protocols and decodings; ours is RESP2 in bytes.
        self._client: Any = connect(url)
        self._scripts = Scripts(self._client)
        self._persist = Persistence()
        self._eyes = Eyes(self._client, self._scripts, self.keys, self.lease)

    async def open(self, patience: float | None = 30.0) -> None:
        """Wait for the server and refuse one that cannot keep the promises.

        Raises:
            TutelageError: UNAVAILABLE when it did not answer within `patience` seconds (None: wait for
                ever), FAILED_PRECONDITION when its version or configuration will not do.
        """
        try:
            await self._persist(lambda: check_server(self._client), "connecting", patience)
        except AWAY as error:
            raise TutelageError(
                "UNAVAILABLE", f"queue server {without_secrets(self.url)}: {error}"
            ) from error

    async def close(self) -> None:
        """Close the connections; workers and readers of this handle must have ended."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Trainer: orders out, scored groups in.

    async def place_order(self, order: SampleOrder, *, again: bool = False) -> bool:
        """Ask the samplers for groups; once per order id and run.

        Args:
            again: also place an order that was finished or given up before (its groups are gone);
                an order that is still open is never placed twice.

        Returns:
            Whether it was placed now.
        """
        stream = self.keys.orders(order.run)
        placed = await self._run(
            "place", stream, [self.keys.placed(order.run)],
            order.run, order.id, order.SerializeToString(), "1" if again else "0",
        )  # fmt: skip
        return bool(placed == 1)

    def scored(self, run: str) -> ScoredReader:
        """The trainer's reader; one trainer per run."""
        return ScoredReader(self._client, self.keys, run)

    # Samplers and teachers.

    def orders(self, run: str, consumer: str) -> OrderWorker:
        """A sampler's worker on the orders of `run`."""
        return OrderWorker(
            self.url,
            self._client,
            self.keys,
            self.keys.orders(run),
            (self.keys.runs, run),
            settings=self.lease,
            consumer=consumer,
        )

    def jobs(self, teacher: str, consumer: str) -> JobWorker:
        """A replica's worker on the jobs of `teacher`."""
        return JobWorker(
            self.url,
            self._client,
            self.keys,
            self.keys.jobs(teacher),
            (self.keys.teachers, teacher),
            settings=self.lease,
            consumer=consumer,
        )

    async def submit_group(
        self,
        group: Group,
        requests: Sequence[ViewRequest],
        *,
        order: OrderClaim | None = None,
        deadline_ms: int | None = None,
    ) -> Submitted:
        """Store a group once and queue one job per view; without views it goes straight to the trainer.

        Args:
            order: the order this group answers. With it a group is stored once even after the trainer
                has deleted it, and nothing is stored once the order's lease is lost.
            deadline_ms: unix time after which no engine may see the jobs.

        Raises:
            TutelageError: INVALID_ARGUMENT, nothing stored.
        """
        _check_group(group, requests)
        stream = self.keys.orders(group.run)
        keys = [
            self.keys.group(group.id),
            self.keys.submitted(group.run, order.order.id if order else ""),
        ]
        arguments: list[Argument] = [
            group.run,
            group.id,
            group.SerializeToString(),
            self._max_queued_tokens,
            "" if deadline_ms is None else deadline_ms,
            group.traceparent,
            order.entry if order else "",
            order.consumer if order else "",
        ]
        for request in requests:
            jobs = self.keys.jobs(request.teacher)
            keys += [jobs.stream, jobs.load]
            tokens = count_tokens(group, request)
            arguments += [request.view, request.SerializeToString(), tokens, request.teacher]
        return Submitted((await self._run("submit", stream, keys, *arguments)).decode())

    # Eyes.

    async def teachers(self) -> list[str]:
        """Every teacher that was ever asked or had a replica here, sorted."""
        return await self._persist(self._eyes.teachers, "reading names")

    async def runs(self) -> list[str]:
        """Every run that ever placed an order or submitted a group here, sorted."""
        return await self._persist(self._eyes.runs, "reading names")

    async def teacher_stats(self, teacher: str) -> TeacherStats:
        """Counts of the queue in front of `teacher`; all zeros for one that nobody has asked."""
        return await self._persist(lambda: self._eyes.teacher_stats(teacher), "reading stats")

    async def run_stats(self, run: str) -> RunStats:
        """Counts of the run's orders and scored groups."""
        return await self._persist(lambda: self._eyes.run_stats(run), "reading stats")

    async def overview(self, patience: float | None = None) -> Overview:
        """Counts of every teacher and run, who is present, and the server itself, in two round trips.

        Raises:
            redis.RedisError, OSError: the server did not answer within `patience` seconds (None: wait for
                ever), or refuses.
        """
        return await self._persist(self._eyes.overview, "looking", patience)

    async def dead_letters(self, teacher: str, count: int = 100) -> list[DeadLetter]:
        """The newest jobs given up for `teacher`, newest first."""
        return await self._dead(self.keys.jobs(teacher), count)

    async def dead_orders(self, run: str, count: int = 100) -> list[DeadLetter]:
        """The newest orders given up in `run`, newest first."""
        return await self._dead(self.keys.orders(run), count)

    async def publish_progress(self, run: str, progress: Mapping[str, Any]) -> None:
        """Set fields of the run's progress; values are JSON, null for a number that is not finite."""
        values = {name: strict_json.dumps(value) for name, value in progress.items()}
        if values:
            key = self.keys.progress(run)
            await self._persist(lambda: self._client.hset(key, mapping=values), "publishing progress")

    async def read_progress(self, run: str) -> dict[str, Any]:
        """All fields of the run's progress."""
        key = self.keys.progress(run)
        found = await self._persist(lambda: self._client.hgetall(key), "reading progress")
        return {name.decode(): json.loads(value) for name, value in found.items()}

    def presence(self, role: str, name: str) -> Presence:
        """A context manager that says this process lives."""
        return Presence(self.url, self.keys, self.lease, role, name)

    async def alive(self, role: str) -> dict[str, float]:
        """Live processes of a role by name: seconds since each last said so, by the server's clock."""
        return await self._persist(lambda: self._eyes.alive(role), "looking for processes")

    async def trim(self, *, teachers: Sequence[str] = (), runs: Sequence[str] = ()) -> int:
        """Delete entries nobody needs any more; workers and reader also do it as they go."""
        streams = [self.keys.jobs(teacher) for teacher in teachers]
        streams += [stream for run in runs for stream in (self.keys.orders(run), self.keys.scored(run))]
        return sum([int(await self._run("trim", stream, [])) for stream in streams])

    async def _run(self, name: str, stream: StreamKeys, keys: list[str], *arguments: Argument) -> Any:
        everything: list[Argument] = [self.keys.namespace, stream.group, *arguments]
        return await self._persist(
            lambda: self._scripts.run(name, [*stream.as_list(), *keys], everything), name
        )

    async def _dead(self, stream: StreamKeys, count: int) -> list[DeadLetter]:
        rows = await self._persist(
            lambda: self._client.xrevrange(stream.dead, count=count), "reading dead letters"
        )
        return [_dead_letter(fields) for _, fields in rows or []]


def count_tokens(group: Group, request: ViewRequest) -> int:
    """Tokens a view's job puts into the queue: its contexts once, and every response."""
    contexts = sum(len(context.ids) for context in request.contexts)
    responses = sum(len(rollout.response_ids) for rollout in group.rollouts)
    return (contexts + responses) // INT32_BYTES


def _check_group(group: Group, requests: Sequence[ViewRequest]) -> None:
    if not group.id or not group.run:
        raise invalid(f"group: id and run must be set, got id={group.id!r} run={group.run!r}")
    views = [request.view for request in requests]
    if len(set(views)) != len(views) or "" in views:
        raise invalid(f"requests: view names must be set and different, got {views}")
    for request in requests:
        if not request.teacher:
            raise invalid(f"requests: teacher must be set, view {request.view!r} has none")


def _dead_letter(fields: Mapping[bytes, bytes]) -> DeadLetter:
    text = {name.decode(): value.decode() for name, value in fields.items()}
    return DeadLetter(
        run=text["run"],
        group=text["group"],
        view=text["view"],
        order=text["order"],
        deliveries=int(text["deliveries"]),
        error=text["error"],
    )
