"""Looks at the queue: everything in a round trip or two, whatever it holds, and nothing searches the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from redis import exceptions

from services.queue.keys import Keys, StreamKeys
from services.queue.presence import TRAINER_ROLE, ages, sampler_role, teacher_role
from services.queue.records import LeaseSettings, Overview, RunStats, ServerStats, StreamStats, TeacherStats
from services.queue.scripts import Scripts

Look = tuple[StreamKeys, int]  # a stream, and the lease in ms after which its entries wait again
NO_LEASE = 0


class Eyes:
    """Statistics of one namespace; every method raises redis-py's errors while the server is away."""

    def __init__(self, client: Any, scripts: Scripts, keys: Keys, lease: LeaseSettings) -> None:
        self._client = client
        self._scripts = scripts
        self._keys = keys
        self._lease_ms = lease.lease_ms

    async def teachers(self) -> list[str]:
        """Names in the registry of teachers, sorted."""
        return _names(await self._client.smembers(self._keys.teachers))

    async def runs(self) -> list[str]:
        """Names in the registry of runs, sorted."""
        return _names(await self._client.smembers(self._keys.runs))

    async def teacher_stats(self, teacher: str) -> TeacherStats:
        [row] = await self._ask([self._jobs(teacher)])
        return _teacher_stats(row)

    async def run_stats(self, run: str) -> RunStats:
        return _run_stats(*await self._ask(self._of_run(run)))

    async def alive(self, role: str) -> dict[str, float]:
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.time().hgetall(self._keys.present(role))
            time, found = await pipeline.execute()
        return ages(found, _seconds(time))

    async def overview(self) -> Overview:
        """Everything at once: one round trip for the names, one for the rest."""
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.smembers(self._keys.teachers).smembers(self._keys.runs)
            pipeline.info("memory").info("clients")
            teachers, runs, memory, clients = await pipeline.execute()
        teachers, runs = _names(teachers), _names(runs)
        roles = [*map(teacher_role, teachers), *map(sampler_role, runs), TRAINER_ROLE]
        looks = [self._jobs(name) for name in teachers] + [look for run in runs for look in self._of_run(run)]

        def ask_who_lives(pipeline: Any) -> None:
            pipeline.time()
            for role in roles:
                pipeline.hgetall(self._keys.present(role))

        answers = await self._ask(looks, ask_who_lives)
        rows, (time, *living) = answers[: len(looks)], answers[len(looks) :]
        present = dict(zip(roles, (ages(found, _seconds(time)) for found in living), strict=True))
        run_rows = rows[len(teachers) :]
        return Overview(
            server=ServerStats(
                memory_bytes=int(memory["used_memory"]),
                memory_limit_bytes=int(memory["maxmemory"]),
                clients=int(clients["connected_clients"]),
            ),
            teachers={name: _teacher_stats(row) for name, row in zip(teachers, rows, strict=False)},
            runs={run: _run_stats(run_rows[2 * i], run_rows[2 * i + 1]) for i, run in enumerate(runs)},
            replicas={name: len(present[teacher_role(name)]) for name in teachers},
            samplers={run: len(present[sampler_role(run)]) for run in runs},
            trainers={run: int(run in present[TRAINER_ROLE]) for run in runs},
        )

    def _jobs(self, teacher: str) -> Look:
        return self._keys.jobs(teacher), self._lease_ms

    def _of_run(self, run: str) -> tuple[Look, Look]:
        """Orders have a lease; what the trainer has read stays with it until a checkpoint covers it."""
        return (self._keys.orders(run), self._lease_ms), (self._keys.scored(run), NO_LEASE)

    async def _ask(self, looks: Sequence[Look], also: Callable[[Any], None] = lambda _: None) -> list[Any]:
        """Rows of load.lua, one for each look, then the answers to what `also` puts into the pipeline."""
        for last_try in (False, True):
            async with self._client.pipeline(transaction=False) as pipeline:
                for stream, lease_ms in looks:
                    arguments: list[str | int | bytes] = [self._keys.namespace, stream.group, lease_ms]
                    self._scripts.queue(pipeline, "load", stream.as_list(), arguments)
                also(pipeline)
                try:
                    return list(await pipeline.execute())
                except exceptions.NoScriptError:
                    if last_try:
                        raise
            await self._scripts.load("load")
        raise AssertionError("the second try returns or raises")


def _names(members: Iterable[bytes]) -> list[str]:
    return sorted(member.decode() for member in members)


def _seconds(time: tuple[int, int]) -> float:
    return time[0] + time[1] / 1e6


def _stream_stats(row: Sequence[int]) -> StreamStats:
    length, waiting, in_flight, consumers, age_ms = row[:5]
    return StreamStats(length, waiting, in_flight, consumers, age_ms / 1000)


def _teacher_stats(row: Sequence[int]) -> TeacherStats:
    queued, waiting, in_flight, scored, dead, expired = row[5:]
    return TeacherStats(
        jobs=_stream_stats(row),
        queued_tokens=queued,
        waiting_tokens=waiting,
        in_flight_tokens=in_flight,
        scored=scored,
        dead=dead,
        expired=expired,
    )


def _run_stats(orders: Sequence[int], scored: Sequence[int]) -> RunStats:
    return RunStats(orders=_stream_stats(orders), scored=_stream_stats(scored), dead_orders=orders[9])
