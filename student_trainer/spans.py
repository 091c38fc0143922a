"""The trainer's spans: in each group's own trace how it was collected and trained, and a trace per step."""

from __future__ import annotations

import time
from collections.abc import Sequence

from services import tracing
from services.queue import ScoredGroup
from services.queue.clock import added_ns
from student_trainer.ledger import DropReason
from student_trainer.verify import TrainingGroup


def record_collected(
    scored: ScoredGroup, *, dropped: tuple[DropReason, str] | None = None, duplicate: bool = False
) -> None:
    """`collect.wait`: from when every view was scored, by the queue server's clock, until this moment.

    Args:
        dropped: why the group is not trained.
        duplicate: it was delivered before, and nothing more happens to it.
    """
    if not tracing.enabled():
        return
    outcome = "dropped" if dropped else "duplicate" if duplicate else "collected"
    attributes: dict[str, str | int] = {
        "messaging.system": "redis",
        "messaging.operation.name": "receive",
        "messaging.operation.type": "receive",
        "messaging.message.id": scored.entry,
        "tutelage.group": scored.group.id,
        "tutelage.outcome": outcome,
    }
    if dropped:
        attributes["tutelage.drop_reason"] = dropped[0]
    tracing.record(
        "collect.wait",
        added_ns(scored.entry),
        time.time_ns(),
        parent=scored.group.traceparent,
        kind="consumer",
        attributes=attributes,
        error=dropped,
        event=None if outcome == "collected" else outcome,
    )


def record_trained(groups: Sequence[TrainingGroup], began_ns: int, *, step: int, refused: str | None) -> None:
    """`train`: each group's share in an optimizer step, linked to the trace of the step.

    Args:
        step: number of the step, from 1.
        refused: why the weights stayed as they were.
    """
    if not tracing.enabled():
        return
    ended, around = time.time_ns(), tracing.current()
    for group in groups:
        tracing.record(
            "train",
            began_ns,
            ended,
            parent=group.traceparent,
            attributes={
                "tutelage.group": group.id,
                "tutelage.step": step,
                "tutelage.policy_version": group.policy_version,
                "tutelage.staleness": group.distance,
                "tutelage.tokens": group.num_tokens,
                "tutelage.step_refused": refused is not None,
            },
            links=[around],
            error=None if refused is None else ("step_refused", refused),
        )
