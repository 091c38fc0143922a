"""The root span of a group's trace, and what the sampler did within it."""

from __future__ import annotations

from dataclasses import dataclass

from services import tracing
from services.queue import OrderClaim, Submitted
from student_trainer.sampler.groups import SampledGroup


@dataclass(frozen=True, slots=True)
class RolloutTimes:
    """Unix nanoseconds: sampling begins, sampling ends, the group is in the queue."""

    began: int
    sampled: int
    submitted: int


def record_rollout(sampled: SampledGroup, claim: OrderClaim, times: RolloutTimes, answer: Submitted) -> None:
    """`rollout` with `sample` and `submit`, once the queue has the group.

    Also when it had it before: an order comes again because its sampler died, perhaps before it could send
    its spans. Both times the root has the ids of the group's traceparent, so nothing below it is orphaned.
    """
    if not tracing.enabled():
        return
    group, order = sampled.group, claim.order
    attributes: dict[str, str | int] = {
        "tutelage.run": group.run,
        "tutelage.group": group.id,
        "tutelage.order": order.id,
        "tutelage.delivery": claim.deliveries,
        "tutelage.policy_version": group.policy_version,
        "tutelage.sampled_by": group.sampled_by,
        "tutelage.rollouts": len(group.rollouts),
        "tutelage.tokens": sampled.num_tokens,
        "tutelage.views": len(sampled.requests),
        "tutelage.outcome": answer.value,
    }
    tracing.record(
        "rollout",
        times.began,
        times.submitted,
        itself=group.traceparent,
        attributes=attributes,
        event=None if claim.deliveries == 1 else "redelivery",
    )
    tracing.record("sample", times.began, times.sampled, parent=group.traceparent)
    tracing.record(
        "submit",
        times.sampled,
        times.submitted,
        parent=group.traceparent,
        kind="producer",
        attributes={
            "messaging.system": "redis",
            "messaging.operation.name": "submit",
            "messaging.operation.type": "send",
            "messaging.message.id": group.id,
        },
    )
