"""What tracing costs a replica: the same jobs with it off, on and off again, in turns."""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import redis
from tutelage.v1.rollout_pb2 import Group, Rollout, ViewRequest
from tutelage.v1.teacher_pb2 import Context, Signal

from benchmarks.results import record
from services import tracing
from services.api.core import ScoringCore
from services.logs import log_to_stderr
from services.queue import JobClaim, Queue
from services.queue.embedded import EmbeddedServer
from services.teacher.engines.fake import FakeEngine, FakeSettings
from services.teacher.puller import Puller, job_log
from services.teacher.spans import record_wait, score_span

JOBS, ROLLOUTS, TOKENS, TOP_K, VOCABULARY = 300, 8, 256, 64, 32_000
TEACHER, CONCURRENCY = "fake", 8
OFF_JOBS = 50_000


@dataclass(frozen=True, slots=True)
class Run:
    """What one round of jobs took, per job."""

    seconds: float
    processor_seconds: float


def measure(rounds: int) -> None:
    """Measure, print and record both ratios, and what is left of the cost while tracing is off."""
    log_to_stderr(logging.WARNING)
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedServer(Path(directory), dies_with_parent=True) as server,
        _sink() as sink,
    ):
        asyncio.run(_round(server.url))
        runs = []
        for _ in range(rounds):
            before = asyncio.run(_round(server.url))
            os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = sink
            tracing.start("tutelage-teacher", "bench")
            on = asyncio.run(_round(server.url))
            tracing.stop()
            runs.append({"before": before, "on": on, "after": asyncio.run(_round(server.url))})
    for name, what in (("processor_seconds", "processor time"), ("seconds", "time")):
        off = [1e3 * getattr(run[side], name) for run in runs for side in ("before", "after")]
        on_ms = [1e3 * getattr(run["on"], name) for run in runs]
        again = statistics.median(getattr(run["after"], name) / getattr(run["before"], name) for run in runs)
        a, b = statistics.median(on_ms), statistics.median(off)
        short = "cpu_ratio" if name == "processor_seconds" else "time_ratio"
        extra = {
            "off_again_ratio": again,
            "positions_per_job": ROLLOUTS * TOKENS,
            "unit_of_sides": "ms per job",
        }
        record(f"tracing.{short}", a / b, unit="ratio", ours=a, peer=b, peer_name="tracing off", extra=extra)
        print(f"tracing.{short:12} {a / b:.3f}  ({what} per job: on {a:.2f} ms, off {b:.2f} ms;", end=" ")
        print(f"off again {again:.3f})")
    off_us = _off_us()
    record("tracing.off_us_per_job", off_us, unit="µs", ours=off_us)
    print(f"tracing.off_us_per_job  {off_us:.1f}  (what a job pays while tracing is off)")


async def _round(url: str) -> Run:
    """Score every job once, from an empty queue."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
    engine = FakeEngine(FakeSettings(vocab_size=VOCABULARY), name=TEACHER)
    core = ScoringCore(engine, max_queued_tokens=2**40, max_message_bytes=2**30)
    core.open()
    async with Queue(url, max_queued_tokens=2**40) as queue:
        for index in range(JOBS):
            await queue.submit_group(*_job(index))
        puller = Puller(core, queue, teacher=TEACHER, consumer="bench", concurrency=CONCURRENCY)
        began, used = time.perf_counter(), time.process_time()
        pulling = asyncio.create_task(puller.run())
        while (outcomes := _outcomes(core)).total() < JOBS and not pulling.done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        run = Run((time.perf_counter() - began) / JOBS, (time.process_time() - used) / JOBS)
        puller.stop()
        await pulling
    if outcomes["committed"] != JOBS:
        raise RuntimeError(f"of {JOBS} jobs: {dict(outcomes)}")
    return run


def _outcomes(core: ScoringCore) -> Counter[str]:
    samples = core.metrics.queue_jobs.collect()[0].samples
    return Counter({s.labels["outcome"]: int(s.value) for s in samples if s.name.endswith("_total")})


def _job(index: int) -> tuple[Group, list[ViewRequest]]:
    random = np.random.default_rng(index)
    ids = random.integers(0, VOCABULARY, (ROLLOUTS + 1, TOKENS)).astype("<i4")
    group = Group(
        id=f"bench-{index}",
        run="bench",
        index=index,
        prompt_ids=ids[0].tobytes(),
        rollouts=[Rollout(response_ids=row.tobytes()) for row in ids[1:]],
        traceparent=f"00-{index + 1:032x}-{index + 1:016x}-01",
    )
    signal = Signal(sampled=True, top_k=TOP_K, temperature=1.0)
    view = ViewRequest(
        view="teacher", teacher=TEACHER, signal=signal, contexts=[Context(ids=group.prompt_ids)]
    )
    return group, [view]


@contextmanager
def _sink() -> Iterator[str]:
    """A collector in a process of its own; yields its endpoint."""
    command = [sys.executable, "-m", "benchmarks.tracing.collector"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def _off_us() -> float:
    """Everything that a job passes on its way, around no work."""
    claim = JobClaim(
        entry="1700000000000-0",
        consumer="bench.1",
        deliveries=1,
        run="bench",
        group="bench-1",
        view="teacher",
        tokens=TOKENS,
        traceparent=f"00-{1:032x}-{1:016x}-01",
    )
    began = time.process_time()
    for _ in range(OFF_JOBS):
        record_wait(claim, "jobs")
        with job_log(claim), score_span(claim, "jobs"), tracing.span("engine"):
            pass
    return (time.process_time() - began) / OFF_JOBS * 1e6
