"""A queued job as a score request: what a view asks about the rollouts of a group."""

from __future__ import annotations

from tutelage.v1 import teacher_pb2 as pb
from tutelage.v1.rollout_pb2 import Group, Rollout, ViewRequest
from tutelage_client.errors import invalid


def job_request(group: Group, view: ViewRequest) -> pb.ScoreRequest:
    """One sequence per rollout, in the group's order, with its index as id.

    A view has one context for every rollout, or one for each; anything else is INVALID_ARGUMENT.
    """
    count, contexts = len(group.rollouts), len(view.contexts)
    if contexts not in (1, count):
        raise invalid(f"contexts: got {contexts} for {count} rollouts, allowed are 1 or {count}")
    return pb.ScoreRequest(
        request_id=group.id,
        teacher=view.teacher,
        pins=view.pins,
        contexts=view.contexts,
        sequences=[
            _sequence(index, index if contexts > 1 else 0, rollout, view.signal)
            for index, rollout in enumerate(group.rollouts)
        ],
        signal=view.signal,
    )


def _sequence(index: int, context: int, rollout: Rollout, signal: pb.Signal) -> pb.Sequence:
    sequence = pb.Sequence(id=str(index), context=context, response_ids=rollout.response_ids)
    if signal.candidates:
        sequence.candidate_ids = rollout.candidate_ids
        sequence.num_candidates = rollout.num_candidates
    if signal.continuations and rollout.HasField("anchors"):
        sequence.anchors = rollout.anchors
    return sequence
