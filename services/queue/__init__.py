"""The queue: orders, groups, jobs and scores between trainer, samplers and teachers.

Public API (asynchronous; writes may be repeated without effect, calls outlast an absent server):

    async with Queue(url, namespace="tutelage", max_queued_tokens=..., lease=LeaseSettings(...)) as queue:

    Trainer      await queue.place_order(SampleOrder, again=False) -> bool
                 reader = queue.scored(run)
                 await reader.read(max_items, block_ms) -> [ScoredGroup]   .group .scores .errors .status
                 await reader.acknowledge(groups)          after a durable checkpoint, or for dropped groups
    Sampler      async with queue.orders(run, consumer) as worker:
                     [OrderClaim(.order)] = await worker.claim(max_items, block_ms)
                     await queue.submit_group(Group, [ViewRequest], order=claim, deadline_ms=) -> Submitted
                         QUEUED | EXISTS (go on) | FULL (wait, submit again) | LOST (drop the order)
                     await worker.finish(claim)  |  fail(claim, error)  |  release(claim)
    Teacher      async with queue.jobs(teacher, consumer) as worker:
                     [JobClaim(.group, .view, .deadline_ms, .traceparent)] = await worker.claim(n, block_ms)
                     (Group, ViewRequest) | None = await worker.load(claim)     None: not needed any more
                     await worker.commit(claim, score_response_bytes) -> bool   False: another was first
                     fail(claim, error) | bury(claim, error) | release(claim)
                     worker.holds(claim)             False once its lease went to another worker
    Eyes         overview(), teachers(), runs(), teacher_stats(teacher), run_stats(run),
                 dead_letters(teacher), dead_orders(run), alive(role), trim(),
                 publish_progress(run, {...}), read_progress(run), with queue.presence(role, name): ...

`services.queue.embedded.EmbeddedServer(directory)` runs a Valkey here; `.start()` returns its URL.
Leases are renewed by a thread with its own connection, so a blocked event loop does not lose them.
"""

from services.queue.connection import check_server, connect
from services.queue.presence import TRAINER_ROLE, Presence, sampler_role, teacher_role
from services.queue.queue import Queue, count_tokens
from services.queue.reader import ScoredReader
from services.queue.records import (
    Claim,
    DeadLetter,
    Failed,
    JobClaim,
    LeaseSettings,
    OrderClaim,
    Overview,
    RunStats,
    ScoredGroup,
    ServerStats,
    StreamStats,
    Submitted,
    TeacherStats,
)
from services.queue.worker import JobWorker, OrderWorker, Worker

__all__ = [
    "TRAINER_ROLE",
    "Claim",
    "DeadLetter",
    "Failed",
    "JobClaim",
    "JobWorker",
    "LeaseSettings",
    "OrderClaim",
    "OrderWorker",
    "Overview",
    "Presence",
    "Queue",
    "RunStats",
    "ScoredGroup",
    "ScoredReader",
    "ServerStats",
    "StreamStats",
    "Submitted",
    "TeacherStats",
    "Worker",
    "check_server",
    "connect",
    "count_tokens",
    "sampler_role",
    "teacher_role",
]
