"""A queued job as a score request: what a view asks about the rollouts of a group."""

from __future__ import annotations

from tutelage.v1.rollout_pb2 import Group, ViewRequest
from tutelage_client import codec
from tutelage_client.errors import invalid
from tutelage_client.types import ScoreRequest, Sequence


def job_request(group: Group, view: ViewRequest) -> ScoreRequest:
    """One sequence per rollout, in the group's order, with its index as id.

    A view has one context for every rollout, or one for each; anything else is INVALID_ARGUMENT.
    """
    count, contexts = len(group.rollouts), len(view.contexts)
    if contexts not in (1, count):
        raise invalid(f"contexts: got {contexts} for {count} rollouts, allowed are 1 or {count}")
    signal = codec.signal_from_proto(view.signal)
    sequences = []
    for index, rollout in enumerate(group.rollouts):
        name = f"rollouts[{index}]"
        candidates = None
        if signal.candidates:
            candidates = codec.unpack_ids(
                rollout.candidate_ids, f"{name}.candidate_ids", rollout.num_candidates
            )
        response = codec.unpack_ids(rollout.response_ids, f"{name}.response_ids")
        sequences.append(Sequence(str(index), index if contexts > 1 else 0, response, candidates))
    return ScoreRequest(
        contexts=tuple(
            codec.unpack_ids(context.ids, f"contexts[{i}].ids") for i, context in enumerate(view.contexts)
        ),
        sequences=tuple(sequences),
        signal=signal,
        teacher=view.teacher,
        pins=codec.pins_from_proto(view.pins),
        request_id=group.id,
    )
