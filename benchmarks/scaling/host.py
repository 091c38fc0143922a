"""A process that hosts replicas: the real puller over the real core and the fake engine, one task each.

python -m benchmarks.scaling.host HOST_OPTIONS_AS_JSON

Commands come as JSON lines on standard input, {"do": "start" | "drain", "name": ...}; what happens goes out
as JSON lines on standard output. Its log goes to standard error. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
import time
from dataclasses import asdict, dataclass

from services.api.core import ScoringCore
from services.logs import log_to_stderr
from services.queue import LeaseSettings, Queue
from services.teacher.engines.fake import FakeEngine, FakeSettings
from services.teacher.puller import Puller

VOCABULARY = 64
TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class HostOptions:
    """Real seconds, and tokens of the queue, whatever they stand for."""

    url: str
    namespace: str
    tokens_per_second: float
    load_seconds: float
    grace_seconds: float
    heartbeat: float
    concurrency: int

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def tell(event: str, **facts: object) -> None:
    """One line for the process that started this one; times are of the clock that all processes share."""
    print(json.dumps({"event": event, "at": time.monotonic(), **facts}), flush=True)


class HostedReplica:
    """A replica's life without its doors: load, pull, drain; see services/teacher/process.py."""

    def __init__(self, name: str, options: HostOptions) -> None:
        self._name = name
        self._options = options
        self._stop = asyncio.Event()
        engine = FakeSettings(
            vocab_size=VOCABULARY,
            tokens_per_second=options.tokens_per_second,
            load_seconds=options.load_seconds,
        )
        self._engine = FakeEngine(engine, name=TEACHER)
        self._core = ScoringCore(self._engine, max_queued_tokens=2**40, max_message_bytes=2**24)

    def drain(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        """Until drained; tells when it is ready and when it has gone."""
        stopping = asyncio.create_task(self._stop.wait())
        loading = asyncio.create_task(self._engine.start())
        await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            self._core.open()
            await self._serve(stopping)
        loading.cancel()
        outcomes = next(iter(self._core.metrics.queue_jobs.collect())).samples
        counts = {s.labels["outcome"]: int(s.value) for s in outcomes if s.name.endswith("_total")}
        tell("gone", name=self._name, outcomes=counts)

    async def _serve(self, stopping: asyncio.Task[bool]) -> None:
        options = self._options
        lease = LeaseSettings(heartbeat=options.heartbeat)
        async with Queue(options.url, options.namespace, lease=lease) as queue:
            (identity,) = self._core.identities
            puller = Puller(
                self._core,
                queue,
                teacher=identity.name,
                consumer=self._name,
                concurrency=options.concurrency,
            )
            pulling = asyncio.create_task(puller.run())
            tell("ready", name=self._name)
            await asyncio.wait({stopping, pulling}, return_when=asyncio.FIRST_COMPLETED)
            self._core.begin_drain()
            puller.stop()
            await asyncio.wait({pulling}, timeout=options.grace_seconds)
            puller.hurry()
            await pulling


async def host(options: HostOptions) -> None:
    """Do what the lines say until there are no more."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    replicas: dict[str, tuple[HostedReplica, asyncio.Task[None]]] = {}
    tell("up")
    while line := await lines.readline():
        command = json.loads(line)
        if command["do"] == "start":
            replica = HostedReplica(command["name"], options)
            replicas[command["name"]] = replica, asyncio.create_task(replica.run())
        else:
            replicas[command["name"]][0].drain()
        for name, (_, task) in list(replicas.items()):
            if task.done():
                task.result()
                del replicas[name]
    for replica, _ in replicas.values():
        replica.drain()
    await asyncio.gather(*(task for _, task in replicas.values()))
    used = resource.getrusage(resource.RUSAGE_SELF)
    tell("end", cpu_seconds=used.ru_utime + used.ru_stime)


if __name__ == "__main__":
    log_to_stderr(logging.WARNING)
    asyncio.run(host(HostOptions(**json.loads(sys.argv[1]))))
