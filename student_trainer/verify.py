"""From what the queue delivered to what may be trained on: every shape, id and identity is checked.

A group is refused whole, with a reason that is counted, when anything about it is not what was
asked for. A rollout whose own scoring failed is left out alone.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from math import isclose

import numpy as np
import numpy.typing as npt
from tutelage.v1.rollout_pb2 import Group, Rollout
from tutelage.v1.teacher_pb2 import ScoreResponse
from tutelage_client.codec import score_from_proto, unpack_ids
from tutelage_client.errors import TutelageError
from tutelage_client.types import PAD_ID, Identity, Int32Array, SequenceScore, Signal

from services.queue import ScoredGroup
from student_trainer.ledger import DropReason, TeacherPin
from student_trainer.lineage import Lineage, from_proto
from student_trainer.objective.compile import Plan

Float32Array = npt.NDArray[np.float32]


class RefusedGroupError(Exception):
    """A group that must not be trained on."""

    def __init__(self, reason: DropReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class TrainingRollout:
    """One response of R tokens with the scores of every view the plan needs."""

    response_ids: Int32Array  # [R]
    behaviour_logprobs: Float32Array  # [R]
    candidate_ids: Int32Array | None  # [R, C], PAD_ID where there is none
    reward: float | None
    scores: Mapping[str, SequenceScore]

    @property
    def length(self) -> int:
        return len(self.response_ids)


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """The rollouts of one prompt that passed every check.

    `rewards` are those of all rollouts of the prompt, also of rollouts left out for want of a
    score, because a reward's advantage is relative to the whole group; `places` are the positions
    of `rollouts` among them.
    """

    id: str
    index: int
    policy_version: int
    prompt_ids: Int32Array  # [P]
    prompt_text: str
    sampled_by: str
    rollouts: tuple[TrainingRollout, ...]
    places: tuple[int, ...]
    rewards: tuple[float | None, ...]
    lineage: Lineage = ()  # of the policy version
    distance: int = 0  # updates between the weights that sampled it and those it trains; set on collection
    score_seconds: float = 0.0  # what the engines spent on it
    traceparent: str = ""  # W3C, of its rollout

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return sum(rollout.length for rollout in self.rollouts)

    @property
    def num_scores(self) -> int:
        """Response tokens times the views that scored them."""
        return sum(rollout.length * len(rollout.scores) for rollout in self.rollouts)


@dataclass(frozen=True, slots=True)
class Expectations:
    """What every group of a run must look like."""

    run: str
    plan: Plan
    sampling_temperature: float
    vocab_size: int
    tokenizer_fingerprint: str
    fake_teachers: frozenset[str] = frozenset()  # they have no tokenizer to compare


def verify_group(
    scored: ScoredGroup, expected: Expectations, pins: MutableMapping[str, TeacherPin]
) -> TrainingGroup:
    """Check a scored group; the first score of a view pins the teacher's identity in `pins`.

    Raises:
        RefusedGroupError: with the reason under which it is counted.
    """
    if scored.errors:
        errors = "; ".join(f"view {view!r}: {error}" for view, error in sorted(scored.errors.items()))
        raise RefusedGroupError("failed", errors)
    group = scored.group
    try:
        prompt_ids, rollouts = _verify_rollouts(group, expected)
        scores = {
            view: _verify_view(view, scored.scores.get(view), rollouts, expected, pins)
            for view in expected.plan.view_requests
        }
    except TutelageError as error:
        raise RefusedGroupError("shape", error.message) from error
    places = tuple(i for i in range(len(rollouts)) if all(view[i].error is None for view in scores.values()))
    if not places:
        first = next(view[0].error for view in scores.values() if view[0].error is not None)
        raise RefusedGroupError("no_score", f"no rollout was scored: {first.code}: {first.message}")
    return TrainingGroup(
        id=group.id,
        index=group.index,
        policy_version=group.policy_version,
        prompt_ids=prompt_ids,
        prompt_text=group.prompt_text,
        sampled_by=group.sampled_by,
        rollouts=tuple(
            _with_scores(rollouts[i], {view: found[i] for view, found in scores.items()}) for i in places
        ),
        places=places,
        rewards=tuple(rollout.reward for rollout in rollouts),
        lineage=from_proto(group.lineage),
        score_seconds=sum(response.usage.compute_ms for response in scored.scores.values()) / 1e3,
        traceparent=group.traceparent,
    )


def _verify_rollouts(group: Group, expected: Expectations) -> tuple[Int32Array, list[TrainingRollout]]:
    if group.run != expected.run or group.id != f"{expected.run}-{group.index}":
        raise _shape(f"group id: got {group.id!r} of run {group.run!r} for index {group.index}")
    if not isclose(group.temperature, expected.sampling_temperature, rel_tol=1e-6):
        raise _shape(f"temperature: sampled at {group.temperature}, expected {expected.sampling_temperature}")
    prompt_ids = unpack_ids(group.prompt_ids, "prompt_ids")
    _check_ids("prompt_ids", prompt_ids, expected.vocab_size)
    if not group.rollouts:
        raise _shape("rollouts: there is none")
    return prompt_ids, [_decode_rollout(i, rollout, expected) for i, rollout in enumerate(group.rollouts)]


def _decode_rollout(place: int, rollout: Rollout, expected: Expectations) -> TrainingRollout:
    name = f"rollouts[{place}]"
    response_ids = unpack_ids(rollout.response_ids, f"{name}.response_ids")
    _check_ids(f"{name}.response_ids", response_ids, expected.vocab_size)
    if len(rollout.behaviour_logprobs) != 4 * len(response_ids):
        raise _shape(
            f"{name}.behaviour_logprobs: got {len(rollout.behaviour_logprobs)} bytes for "
            f"{len(response_ids)} response tokens"
        )
    return TrainingRollout(
        response_ids=response_ids,
        behaviour_logprobs=np.frombuffer(rollout.behaviour_logprobs, dtype="<f4"),
        candidate_ids=_candidates(name, rollout, len(response_ids), expected),
        reward=rollout.reward if rollout.HasField("reward") else None,
        scores={},
    )


def _candidates(name: str, rollout: Rollout, length: int, expected: Expectations) -> Int32Array | None:
    wanted = expected.plan.student_candidates
    if not wanted:
        return None
    if rollout.num_candidates < 1 or rollout.num_candidates > wanted:
        raise _shape(f"{name}.num_candidates: got {rollout.num_candidates}, expected 1 to {wanted}")
    ids = unpack_ids(rollout.candidate_ids, f"{name}.candidate_ids", rollout.num_candidates)
    if len(ids) != length:
        raise _shape(f"{name}.candidate_ids: got {len(ids)} rows for {length} response tokens")
    if ids.min() < PAD_ID or ids.max() >= expected.vocab_size:
        raise _shape(f"{name}.candidate_ids: got ids from {ids.min()} to {ids.max()}")
    return ids


def _verify_view(
    view: str,
    response: ScoreResponse | None,
    rollouts: list[TrainingRollout],
    expected: Expectations,
    pins: MutableMapping[str, TeacherPin],
) -> tuple[SequenceScore, ...]:
    """One entry per rollout, in their order; identity first, so that a wrong teacher is called that."""
    if response is None:
        raise _shape(f"view {view!r}: there is no score")
    teacher, signal = expected.plan.view_requests[view]
    score = score_from_proto(response)
    if teacher not in expected.fake_teachers:
        _verify_tokenizer(view, score.identity, expected.tokenizer_fingerprint)
    _verify_pin(view, score.identity, pins)
    if len(score.sequences) != len(rollouts):
        raise _shape(f"view {view!r}: got {len(score.sequences)} scores for {len(rollouts)} rollouts")
    verified = []
    for place, (found, rollout) in enumerate(zip(score.sequences, rollouts, strict=True)):
        where = f"view {view!r}, rollouts[{place}]"
        if found.id != str(place):
            raise _shape(f"{where}: got the score of sequence {found.id!r}")
        if found.error is None:
            _verify_arrays(where, found, rollout, signal)
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


def _verify_pin(view: str, identity: Identity, pins: MutableMapping[str, TeacherPin]) -> None:
    seen = TeacherPin(
        identity.model, identity.revision, identity.weights_version, identity.tokenizer_fingerprint
    )
    pinned = pins.setdefault(view, seen)
    if pinned != seen:
        raise RefusedGroupError("identity", f"view {view!r}: scored by {seen}, the run began with {pinned}")


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
        raise _shape(f"{where}.top_ids: an id is negative or appears twice at a position")
    return replace(score, top_ids=np.where(ids < vocab_size, ids, PAD_ID))


def _verify_arrays(where: str, score: SequenceScore, rollout: TrainingRollout, signal: Signal) -> None:
    rows = rollout.length
    if score.valid is None or len(score.valid) != rows:
        raise _shape(f"{where}.valid: got {score.num_positions} positions for {rows} response tokens")
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
            raise _shape(
                f"{where}.{name}: got shape {None if array is None else array.shape}, expected {shape}"
            )


def _with_scores(rollout: TrainingRollout, scores: Mapping[str, SequenceScore]) -> TrainingRollout:
    return TrainingRollout(
        rollout.response_ids, rollout.behaviour_logprobs, rollout.candidate_ids, rollout.reward, scores
    )


def _check_ids(name: str, ids: Int32Array, vocab_size: int) -> None:
    if not len(ids):
        raise _shape(f"{name}: is empty")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise _shape(
            f"{name}: got ids from {ids.min()} to {ids.max()}, the student's vocabulary has {vocab_size}"
        )


def _shape(message: str) -> RefusedGroupError:
    return RefusedGroupError("shape", message)
