"""A scoring worker process for tests: claims, "computes" for a while, commits. Run as a module.

`python -m support.queue_worker '{"url": ..., "namespace": ..., "teacher": ..., ...}'`; it ends on SIGTERM.
Groups whose index is a multiple of `fail_every` fail; those of `crash_every` end the process.
Every start of work is appended to `log` as one JSON line: time, entry, deliveries, group index.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from services.queue import JobClaim, JobWorker, LeaseSettings, Queue
from support.queue_data import make_scores

TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class WorkerOptions:
    url: str
    namespace: str
    teacher: str
    log: str
    heartbeat: float = 0.5
    work_seconds: float = 0.0
    concurrency: int = 4
    fail_every: int = 0
    crash_every: int = 0
    max_deliveries: int = 3


def start_worker(options: WorkerOptions) -> subprocess.Popen[bytes]:
    """A worker in a process of its own; the caller ends it."""
    command = [sys.executable, "-m", "support.queue_worker", json.dumps(asdict(options))]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=TESTS.parent, env=environment)


def read_log(path: str | Path) -> list[dict[str, float]]:
    """What workers wrote; a line that a kill cut short is left out."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def write_log(path: str, line: dict[str, float]) -> None:
    """Append a line with the time to a log that several processes share."""
    with Path(path).open("a") as log:
        log.write(json.dumps({"time": time.time(), **line}) + "\n")


async def _score(worker: JobWorker, claim: JobClaim, options: WorkerOptions) -> None:
    loaded = await worker.load(claim)
    if loaded is None:
        return
    index = loaded[0].index
    write_log(options.log, {"index": index, "deliveries": claim.deliveries, "pid": os.getpid()})
    if options.crash_every and index % options.crash_every == 0:
        os._exit(1)
    await asyncio.sleep(options.work_seconds)
    if options.fail_every and index % options.fail_every == 0:
        await worker.fail(claim, "INTERNAL: poison")
    else:
        await worker.commit(claim, make_scores(f"{claim.group}"))


async def work(worker: JobWorker, options: WorkerOptions, stopping: asyncio.Event) -> None:
    """Keep `concurrency` claims in work until told to stop."""
    tasks: set[asyncio.Task[None]] = set()
    while not stopping.is_set():
        if free := options.concurrency - len(tasks):
            for claim in await worker.claim(free, 100 if not tasks else 0):
                tasks.add(asyncio.create_task(_score(worker, claim, options)))
        if tasks:
            done, tasks = await asyncio.wait(tasks, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    await asyncio.gather(*tasks)


async def run(options: WorkerOptions) -> None:
    """Work until SIGTERM; then finish what was begun."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    lease = LeaseSettings(heartbeat=options.heartbeat, max_deliveries=options.max_deliveries)
    async with (
        Queue(options.url, options.namespace, lease=lease) as queue,
        queue.jobs(options.teacher, "worker") as worker,
    ):
        await work(worker, options, stopping)


if __name__ == "__main__":
    asyncio.run(run(WorkerOptions(**json.loads(sys.argv[1]))))
