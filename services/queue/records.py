"""What the queue hands out: claims, scored groups, counts. Plain frozen data."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field
from tutelage.v1.rollout_pb2 import Group, SampleOrder
from tutelage.v1.teacher_pb2 import ScoreResponse


class LeaseSettings(BaseModel):
    """How long work may go without a sign of life, and how often it may be tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heartbeat: float = Field(
        default=5.0, gt=0, description="Seconds; a dead worker's jobs move within two of them."
    )
    max_deliveries: int = Field(default=3, ge=1, description="Deliveries before a job is a dead letter.")

    @property
    def lease(self) -> float:
        """Seconds without renewal after which work may be taken over."""
        return 1.5 * self.heartbeat

    @property
    def lease_ms(self) -> int:
        return max(1, round(1000 * self.lease))

    @property
    def renewal(self) -> float:
        """Seconds between renewals: two may be missed before the lease runs out."""
        return self.heartbeat / 2

    @property
    def scan(self) -> float:
        """Seconds between looks for leases that ran out."""
        return self.heartbeat / 4


class Submitted(enum.StrEnum):
    """What became of a submitted group."""

    QUEUED = "queued"
    EXISTS = "exists"  # stored before; nothing changed
    FULL = "full"  # over the limit of queued tokens; nothing stored: wait and submit again
    LOST = "lost"  # the order's lease went to another sampler; nothing stored: drop the order


class Failed(enum.StrEnum):
    """What became of a failed delivery."""

    RETRY = "retry"
    DEAD = "dead"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Claim:
    """One delivery of one stream entry, leased to one consumer."""

    entry: str
    consumer: str
    deliveries: int
    run: str


@dataclass(frozen=True, slots=True)
class JobClaim(Claim):
    """A view of a group to score. `deadline_ms` is unix time; tokens are what back-pressure counts."""

    group: str
    view: str
    tokens: int
    deadline_ms: int | None = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class OrderClaim(Claim):
    """Groups to sample."""

    order: SampleOrder


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group whose every view is scored, or that failed for good.

    `scores` maps each scored view to its answer; `errors` maps each buried view to its error.
    A group with errors is incomplete and must be counted, not trained.
    """

    entry: str
    group: Group
    scores: dict[str, ScoreResponse]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return "failed" if self.errors else "scored"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Work given up: a job (group and view) or an order."""

    run: str
    group: str
    view: str
    order: str
    deliveries: int
    error: str


@dataclass(frozen=True, slots=True)
class StreamStats:
    """Counts of one stream.

    `waiting` is what nobody holds: never delivered, handed back, or with a lease that ran out. `in_flight`
    is delivered and not finished. `oldest_age` is seconds since the oldest unfinished entry was added.
    """

    length: int
    waiting: int
    in_flight: int
    consumers: int
    oldest_age: float


@dataclass(frozen=True, slots=True)
class TeacherStats:
    """The queue in front of one teacher. Waiting tokens and tokens in flight add up to the queued ones."""

    jobs: StreamStats
    queued_tokens: int
    waiting_tokens: int
    in_flight_tokens: int
    scored: int
    dead: int
    expired: int


@dataclass(frozen=True, slots=True)
class RunStats:
    """A run's own streams."""

    orders: StreamStats
    scored: StreamStats
    dead_orders: int


@dataclass(frozen=True, slots=True)
class ServerStats:
    """The server itself; a memory limit of 0 is none."""

    memory_bytes: int
    memory_limit_bytes: int
    clients: int


@dataclass(frozen=True, slots=True)
class Overview:
    """One look at everything in a namespace, by the names of teachers and runs.

    `replicas`, `samplers` and `trainers` count the processes that say that they live.
    """

    server: ServerStats
    teachers: dict[str, TeacherStats]
    runs: dict[str, RunStats]
    replicas: dict[str, int]
    samplers: dict[str, int]
    trainers: dict[str, int]
