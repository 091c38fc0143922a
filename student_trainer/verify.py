"""From what the queue delivered to what may be trained on: every shape, id and identity is checked.

A group is refused whole, with a reason that is counted, when anything about it is not what was
asked for. A rollout whose own scoring failed is left out alone.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isclose, nan

import numpy as np
import structlog
from tutelage.v1.rollout_pb2 import Group, Rollout
from tutelage_client.codec import identity_from_proto, score_from_proto, unpack_ids
from tutelage_client.errors import TutelageError
from tutelage_client.types import PAD_ID, Identity, Int32Array, SequenceScore, Signal

from services.queue import ScoredGroup
from student_trainer.ledger import TeacherPin
from student_trainer.lineage import from_proto
from student_trainer.objective.compile import Plan
from student_trainer.objective.plan import AUDIT, JUDGE
from student_trainer.sampler.settings import GUIDED
from student_trainer.training_group import RefusedGroupError, TrainingGroup, TrainingRollout, wrong_shape
from student_trainer.verify_words import (
    audited,
    first_error,
    judged,
    read_anchors,
    verify_agreement,
    verify_judgement,
)

__all__ = ["Expectations", "RefusedGroupError", "TrainingGroup", "TrainingRollout", "verify_group"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Expectations:
    """What every group of a run must look like."""

    run: str
    plan: Plan
    sampling_temperature: float
    vocab_size: int
    tokenizer_fingerprint: str
    fake_teachers: frozenset[str] = frozenset()  # they have no tokenizer to compare
    channels: Mapping[str, str] = field(default_factory=dict)  # of the teachers whose weights move
    hidden_size: int = 0  # of the student; needed with the plan's hidden
    max_positions: int | None = None  # of the student; None: no bound is known


def verify_group(
    scored: ScoredGroup, expected: Expectations, pins: MutableMapping[str, TeacherPin]
) -> TrainingGroup:
    """Check a scored group; the first score of a teacher pins its identity in `pins`.

    A rollout that some view could not score is left out. With the plan's missing_view = "renormalise" it
    goes on with its other views, and so does a group of which a whole view failed. One that is too long
    for the student under the context of the auxiliary loss is left out, too.

    Raises:
        RefusedGroupError: with the reason under which it is counted.
    """
    plan, group = expected.plan, scored.group
    asked = [view for view in plan.view_requests if view not in scored.errors]
    missing_all = not asked and bool(plan.view_requests)
    needed_all = plan.missing_view == "drop" or bool(plan.beside.keys() & scored.errors.keys())
    if scored.errors and (needed_all or missing_all):
        errors = "; ".join(f"view {view!r}: {error}" for view, error in sorted(scored.errors.items()))
        raise RefusedGroupError("failed", errors)
    try:
        prompt_ids, rollouts = _verify_rollouts(group, expected)
        scores = {view: _verify_view(view, scored, rollouts, expected, pins) for view in asked}
        if plan.judge is not None:
            rollouts = judged(rollouts, _verify_view(JUDGE, scored, rollouts, expected, pins))
        if plan.audit is not None:
            rollouts = audited(rollouts, _verify_view(AUDIT, scored, rollouts, expected, pins))
    except TutelageError as error:
        raise RefusedGroupError("shape", error.message) from error
    found = [
        {view: answers[i] for view, answers in scores.items() if answers[i].error is None}
        for i in range(len(rollouts))
    ]
    needed = len(plan.view_requests) if plan.missing_view == "drop" else min(1, len(plan.view_requests))
    long = _too_long(rollouts, expected.max_positions)
    places = tuple(i for i, views in enumerate(found) if len(views) >= needed and i not in long)
    if long or any(len(views) < len(asked) for views in found):
        why = next(iter(long.values()), "") or first_error(scores)
        if not places:
            raise RefusedGroupError("no_score", f"no rollout was scored: {why}")
        log.warning("responses lack scores", left_out=len(rollouts) - len(places), why=why)
    return TrainingGroup(
        id=group.id,
        index=group.index,
        policy_version=group.policy_version,
        prompt_ids=prompt_ids,
        prompt_text=group.prompt_text,
        sampled_by=group.sampled_by,
        rollouts=tuple(replace(rollouts[i], scores=found[i]) for i in places),
        places=places,
        rewards=tuple(rollout.reward for rollout in rollouts),
        lineage=from_proto(group.lineage),
        score_seconds=sum(response.usage.compute_ms for response in scored.scores.values()) / 1e3,
        traceparent=group.traceparent,
        view_weights=_view_weights(group, plan),
        scored_by={view: identity_from_proto(scored.scores[view].identity) for view in scores},
        missing_views=tuple(view for view in plan.view_requests if any(view not in found[i] for i in places)),
    )


def _view_weights(group: Group, plan: Plan) -> dict[str, float]:
    weights = {view: group.view_weights.get(view, nan) for view in plan.weight_fields}
    for view, weight in weights.items():
        if not 0 <= weight < inf:
            raise wrong_shape(f"view_weights[{view!r}]: got {weight}, expected a finite factor of at least 0")
    return weights


def _verify_rollouts(group: Group, expected: Expectations) -> tuple[Int32Array, list[TrainingRollout]]:
    if group.run != expected.run or group.id != f"{expected.run}-{group.index}":
        raise wrong_shape(f"group id: got {group.id!r} of run {group.run!r} for index {group.index}")
    if not isclose(group.temperature, expected.sampling_temperature, rel_tol=1e-6):
        raise wrong_shape(
            f"temperature: sampled at {group.temperature}, expected {expected.sampling_temperature}"
        )
    prompt_ids = unpack_ids(group.prompt_ids, "prompt_ids")
    _check_ids("prompt_ids", prompt_ids, expected.vocab_size)
    if not group.rollouts:
        raise wrong_shape("rollouts: there is none")
    if any(rollout.guided for rollout in group.rollouts) != (group.sampled_by == GUIDED):
        guided = [place for place, rollout in enumerate(group.rollouts) if rollout.guided]
        raise wrong_shape(f"rollouts: {guided} are guided in a group sampled by {group.sampled_by!r}")
    return prompt_ids, [_decode_rollout(i, rollout, expected) for i, rollout in enumerate(group.rollouts)]


def _decode_rollout(place: int, rollout: Rollout, expected: Expectations) -> TrainingRollout:
    name = f"rollouts[{place}]"
    response_ids = unpack_ids(rollout.response_ids, f"{name}.response_ids")
    _check_ids(f"{name}.response_ids", response_ids, expected.vocab_size)
    if len(rollout.behaviour_logprobs) != 4 * len(response_ids):
        raise wrong_shape(
            f"{name}.behaviour_logprobs: got {len(rollout.behaviour_logprobs)} bytes for "
            f"{len(response_ids)} response tokens"
        )
    return TrainingRollout(
        response_ids=response_ids,
        behaviour_logprobs=np.frombuffer(rollout.behaviour_logprobs, dtype="<f4"),
        candidate_ids=_candidates(name, rollout, len(response_ids), expected),
        reward=rollout.reward if rollout.HasField("reward") else None,
        scores={},
        marked=_marked(name, rollout, expected.plan),
        auxiliary_ids=_auxiliary(name, rollout, expected),
        guided=rollout.guided,
        anchors=read_anchors(name, rollout, len(response_ids), expected.plan),
    )


def _auxiliary(name: str, rollout: Rollout, expected: Expectations) -> Int32Array | None:
    """The context of the auxiliary loss; None without one, or where a response goes without."""
    settings = expected.plan.auxiliary
    if settings is None or (settings.missing == "same" and not rollout.auxiliary_context_ids):
        return None
    ids = unpack_ids(rollout.auxiliary_context_ids, f"{name}.auxiliary_context_ids")
    _check_ids(f"{name}.auxiliary_context_ids", ids, expected.vocab_size)
    return ids


def _too_long(rollouts: Sequence[TrainingRollout], positions: int | None) -> dict[int, str]:
    """Rollouts by place that the student cannot see under their auxiliary context, and why.

    No teacher does that pass, so nobody else refuses: a model that learned its positions would fail in the
    middle of a step, and one that computes them would go where it never was.
    """
    lengths = {
        place: len(rollout.auxiliary_ids) + rollout.length
        for place, rollout in enumerate(rollouts)
        if rollout.auxiliary_ids is not None
    }
    return {
        place: f"rollouts[{place}]: got {length} tokens with objective.auxiliary.context, "
        f"the student takes {positions}"
        for place, length in lengths.items()
        if positions is not None and length > positions
    }


def _marked(name: str, rollout: Rollout, plan: Plan) -> bool:
    """Whether every view with templates had its own context; it must have, where it may not go without."""
    own, templated = set(rollout.privileged_views), set(plan.contexts)
    strict = {view for view, missing in plan.missing.items() if missing == "error"}
    if not strict <= own <= templated:
        raise wrong_shape(
            f"{name}.privileged_views: got {sorted(own)}, expected {sorted(strict)} of {sorted(templated)}"
        )
    return own == templated


def _candidates(name: str, rollout: Rollout, length: int, expected: Expectations) -> Int32Array | None:
    wanted = expected.plan.student_candidates
    if not wanted:
        return None
    if rollout.num_candidates < 1 or rollout.num_candidates > wanted:
        raise wrong_shape(f"{name}.num_candidates: got {rollout.num_candidates}, expected 1 to {wanted}")
    ids = unpack_ids(rollout.candidate_ids, f"{name}.candidate_ids", rollout.num_candidates)
    if len(ids) != length:
        raise wrong_shape(f"{name}.candidate_ids: got {len(ids)} rows for {length} response tokens")
    if ids.min() < PAD_ID or ids.max() >= expected.vocab_size:
        raise wrong_shape(f"{name}.candidate_ids: got ids from {ids.min()} to {ids.max()}")
    return ids


def _verify_view(
    view: str,
    scored: ScoredGroup,
    rollouts: list[TrainingRollout],
    expected: Expectations,
    pins: MutableMapping[str, TeacherPin],
) -> tuple[SequenceScore, ...]:
    """One entry per rollout, in their order; identity first, so that a wrong teacher is called that."""
    response = scored.scores.get(view)
    if response is None:
        raise wrong_shape(f"view {view!r}: there is no score")
    _, signal = expected.plan.requests[view]
    score = score_from_proto(response)
    teacher = _verify_teacher(view, score.identity, scored.group.tag, expected.plan)
    if teacher not in expected.fake_teachers:
        _verify_tokenizer(view, score.identity, expected.tokenizer_fingerprint)
    if teacher not in expected.channels:  # whose weights are checked when the group is taken
        _verify_pin(teacher, score.identity, pins)
    if len(score.sequences) != len(rollouts):
        raise wrong_shape(f"view {view!r}: got {len(score.sequences)} scores for {len(rollouts)} rollouts")
    verified = []
    for place, (found, rollout) in enumerate(zip(score.sequences, rollouts, strict=True)):
        where = f"view {view!r}, rollouts[{place}]"
        if found.id != str(place):
            raise wrong_shape(f"{where}: got the score of sequence {found.id!r}")
        if found.error is None and signal.judgement:
            verify_judgement(where, found)
        elif found.error is None and signal.continuations:
            verify_agreement(where, found, rollout)
        elif found.error is None:
            _verify_arrays(where, found, rollout, signal)
            _verify_hidden(where, found, len(signal.hidden_layers), expected.hidden_size)
        usable = found.error is None and signal.top_k > 0
        verified.append(_restrict_support(where, found, expected.vocab_size) if usable else found)
    return tuple(verified)


def _verify_tokenizer(view: str, identity: Identity, fingerprint: str) -> None:
    if identity.tokenizer_fingerprint != fingerprint:
        raise RefusedGroupError(
            "identity",
            f"view {view!r}: teacher {identity.name!r} has tokenizer "
            f"{identity.tokenizer_fingerprint[:12]!r}, the student has {fingerprint[:12]!r}; token ids of "
            "one mean other text to the other",
        )


def _verify_teacher(view: str, identity: Identity, tag: str, plan: Plan) -> str:
    """Its name; of a routed view it must be the one that the example's tag routes to."""
    teacher = plan.teacher_of(view, tag)
    if teacher is None:
        allowed = ", ".join(sorted(plan.routes[view]))
        raise RefusedGroupError("identity", f"view {view!r}: no teacher for tag {tag!r}, allowed: {allowed}")
    if teacher and identity.name != teacher:
        raise RefusedGroupError(
            "identity", f"view {view!r}: scored by {identity.name!r}, asked of {teacher!r}"
        )
    return identity.name


def _verify_pin(teacher: str, identity: Identity, pins: MutableMapping[str, TeacherPin]) -> None:
    seen = TeacherPin(
        identity.model, identity.revision, identity.weights_version, identity.tokenizer_fingerprint
    )
    pinned = pins.setdefault(teacher, seen)
    if pinned != seen:
        raise RefusedGroupError("identity", f"teacher {teacher!r}: {seen}, the run began with {pinned}")


def _restrict_support(where: str, score: SequenceScore, vocab_size: int) -> SequenceScore:
    """The teacher's most probable ids without those that the student's head has no row for.

    Heads are padded to different sizes for the same tokenizer. An id that is left out belongs to
    the tail of the support, like every id that was not among the most probable.
    """
    assert score.top_ids is not None
    assert score.valid is not None
    ids = np.where(score.valid[:, None], score.top_ids, PAD_ID)
    ordered = np.sort(ids, axis=1)
    if ordered.min() < PAD_ID or ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PAD_ID)).any():
        raise wrong_shape(f"{where}.top_ids: an id is negative or appears twice at a position")
    return replace(score, top_ids=np.where(ids < vocab_size, ids, PAD_ID))


def _verify_arrays(where: str, score: SequenceScore, rollout: TrainingRollout, signal: Signal) -> None:
    rows = rollout.length
    if score.valid is None or len(score.valid) != rows:
        raise wrong_shape(f"{where}.valid: got {score.num_positions} positions for {rows} response tokens")
    candidates = rollout.candidate_ids
    expected_shapes = {
        "sampled": (rows,) if signal.sampled else None,
        "entropy": (rows,) if signal.entropy else None,
        "top_ids": (rows, signal.top_k) if signal.top_k else None,
        "top_logprobs": (rows, signal.top_k) if signal.top_k else None,
        "candidate_logprobs": candidates.shape if signal.candidates and candidates is not None else None,
    }
    for name, shape in expected_shapes.items():
        array = getattr(score, name)
        if shape is not None and (array is None or array.shape != shape):
            raise wrong_shape(
                f"{where}.{name}: got shape {None if array is None else array.shape}, expected {shape}"
            )


def _verify_hidden(where: str, score: SequenceScore, layers: int, size: int) -> None:
    """Of the student's width: there is no projection between states of two widths."""
    if not layers:
        return
    wanted, got = (score.num_positions, layers, size), None if score.hidden is None else score.hidden.shape
    if got != wanted:
        raise wrong_shape(f"{where}.hidden: got shape {got}, the student's states are {wanted}")


def _check_ids(name: str, ids: Int32Array, vocab_size: int) -> None:
    if not len(ids):
        raise wrong_shape(f"{name}: is empty")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise wrong_shape(
            f"{name}: got ids from {ids.min()} to {ids.max()}, the student's vocabulary has {vocab_size}"
        )
