"""What a scrape of the exporter costs: its time, and processor time of the queue's server and of itself.

8 teachers, each with 4,000 jobs that replicas hold and 4,000 that wait, on a server and an exporter in
processes of their own: while everything works, with a quarter of the held jobs handed back (replicas have
died), and with all but one of them, which is the worst there is.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import record
from services.queue import Queue
from services.queue.embedded import EmbeddedServer

TEACHERS, PENDING, TOKENS = 8, 4000, 2000
HEARTBEAT = 3600.0  # no lease runs out by itself
SCENES = {"all held": 0, "a quarter handed back": PENDING // 4, "all but one handed back": PENDING - 1}
LONG_IDLE_MS = 10**9


async def fill(url: str) -> None:
    """Entries as submit.lua writes them; nobody looks at what they stand for."""
    async with Queue(url) as queue:
        client: Any = queue._client
        for teacher in teachers():
            keys = queue.keys.jobs(teacher)
            await client.xgroup_create(keys.stream, keys.group, id="0", mkstream=True)
            async with client.pipeline(transaction=False) as pipeline:
                for job in range(2 * PENDING):
                    pipeline.xadd(
                        keys.stream,
                        {
                            "group": f"run-{job}",
                            "view": teacher,
                            "run": "run",
                            "tokens": TOKENS,
                            "before": TOKENS * job,
                            "traceparent": f"00-{job:032x}-{job:016x}-01",
                        },
                    )
                added = 2 * PENDING * TOKENS
                pipeline.hset(keys.load, mapping={"queued_tokens": added, "added_tokens": added})
                pipeline.sadd(queue.keys.teachers, teacher)
                pipeline.xreadgroup(keys.group, "replica", {keys.stream: ">"}, count=PENDING)
                await pipeline.execute()


async def hand_back(url: str, count: int) -> None:
    """The first `count` pending jobs of every teacher have been silent for long."""
    async with Queue(url) as queue:
        client: Any = queue._client
        for teacher in teachers():
            keys = queue.keys.jobs(teacher)
            rows = await client.xpending_range(keys.stream, keys.group, "-", "+", count)
            for start in range(0, len(rows), 500):
                some = [row["message_id"] for row in rows[start : start + 500]]
                await client.xclaim(
                    keys.stream, keys.group, "replica", 0, some, idle=LONG_IDLE_MS, justid=True
                )


def teachers() -> list[str]:
    return [f"teacher-{index}" for index in range(TEACHERS)]


@contextmanager
def exporter(url: str) -> Iterator[tuple[int, int]]:
    """A process; its id and its port."""
    command = [sys.executable, "-m", "launcher", "exporter", "--queue", url, "--port", "0"]
    with subprocess.Popen(
        [*command, "--heartbeat-seconds", str(HEARTBEAT)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", process.stderr.readline())
        assert found is not None
        try:
            yield process.pid, int(found[1])
        finally:
            process.terminate()


def scrape(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert "tutelage_queue_up 1.0" in text
    return text


def processor_seconds(pid: int) -> float:
    """User and system time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one scrape, in milliseconds: the median of its time, and means of processor time."""

    scrape_ms: float
    queue_ms: float
    exporter_ms: float


def measure(port: int, server: int, process: int, rounds: int) -> Cost:
    """The cost of `rounds` scrapes in a row."""
    scrape(port)
    before = processor_seconds(server), processor_seconds(process)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        scrape(port)
        times.append(time.perf_counter() - started)
    spent = processor_seconds(server) - before[0], processor_seconds(process) - before[1]
    return Cost(1000 * statistics.median(times), 1000 * spent[0] / rounds, 1000 * spent[1] / rounds)


def main() -> None:
    """Entry point of `python -m benchmarks.exporter`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="scrapes of each scene")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory, EmbeddedServer(Path(directory)) as server:
        asyncio.run(fill(server.url))
        with exporter(server.url) as (pid, port):
            for scene, count in SCENES.items():
                if count:
                    asyncio.run(hand_back(server.url, count))
                cost = measure(port, server.pid, pid, rounds)
                print(
                    f"{scene}: {cost.scrape_ms:.1f} ms a scrape; processor time: queue "
                    f"{cost.queue_ms:.2f} ms, exporter {cost.exporter_ms:.2f} ms"
                )
                record(
                    f"exporter.{scene.replace(' ', '_')}",
                    cost.queue_ms,
                    unit="ms of the queue's processor a scrape",
                    ours=cost.queue_ms,
                    extra={
                        "scrape_ms": cost.scrape_ms,
                        "exporter_ms": cost.exporter_ms,
                        "teachers": TEACHERS,
                        "pending": PENDING,
                    },
                )


if __name__ == "__main__":
    main()
