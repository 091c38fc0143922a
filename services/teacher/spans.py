"""Spans of a job from the queue: how long it waited there, and how it was scored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from services import tracing
from services.queue import JobClaim
from services.queue.clock import added_ns


def record_wait(claim: JobClaim, stream: str) -> None:
    """`queue.wait`: from when the job was added to `stream`, by the queue server's clock, until its claim."""
    if not tracing.enabled():
        return
    tracing.record(
        "queue.wait",
        added_ns(claim.entry),
        time.time_ns(),
        parent=claim.traceparent,
        kind="consumer",
        attributes=_attributes(claim, stream, "receive"),
        event=None if claim.deliveries == 1 else "redelivery",
    )


@contextmanager
def score_span(claim: JobClaim, stream: str) -> Iterator[tracing.Span]:
    """`score`: one delivery of the job, from its claim to its end."""
    if not tracing.enabled():
        yield tracing.NOTHING
        return
    attributes = _attributes(claim, stream, "process")
    with tracing.span("score", parent=claim.traceparent, kind="consumer", attributes=attributes) as span:
        if claim.deliveries > 1:
            span.event("redelivery")
        yield span


def _attributes(claim: JobClaim, stream: str, operation: str) -> dict[str, str | int]:
    return {
        "messaging.system": "redis",
        "messaging.destination.name": stream,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.message.id": claim.entry,
        "messaging.client.id": claim.consumer,
        "tutelage.run": claim.run,
        "tutelage.group": claim.group,
        "tutelage.view": claim.view,
        "tutelage.delivery": claim.deliveries,
        "tutelage.tokens": claim.tokens,
    }
