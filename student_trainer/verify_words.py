"""What teachers say in text of whole responses or of pieces of them: judgements, and a writer's agreement.

Everything here raises RefusedGroupError for what is not as it was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import structlog
from tutelage.v1.rollout_pb2 import Rollout
from tutelage_client.codec import unpack_ids
from tutelage_client.types import Int32Array, SequenceScore

from student_trainer.objective.compile import Plan
from student_trainer.objective.plan import AUDIT, JUDGE
from student_trainer.training_group import RefusedGroupError, TrainingRollout, wrong_shape

log = structlog.get_logger(__name__)


def read_anchors(name: str, rollout: Rollout, length: int, plan: Plan) -> Int32Array | None:
    """int32 [F] where chunks are audited, none past the end or over another; None without an audit."""
    if plan.audit is None:
        return None
    if not rollout.HasField("anchors"):
        raise wrong_shape(f"{name}.anchors: missing, and the objective audits responses")
    anchors, size = unpack_ids(rollout.anchors, f"{name}.anchors"), plan.audit.chunk_tokens
    apart = np.diff(anchors, prepend=-size, append=length)
    if len(anchors) > plan.audit.chunks or (len(anchors) and apart.min() < size):
        raise wrong_shape(
            f"{name}.anchors: got {anchors.tolist()}, expected at most {plan.audit.chunks}, ascending, "
            f"{size} tokens apart and from the end of {length}"
        )
    return anchors


def verify_judgement(where: str, score: SequenceScore) -> None:
    """Whether a judge's answer is a number from 0 to 1 and nothing else."""
    if score.judgement is None or not 0 <= score.judgement <= 1 or score.valid is not None:
        raise wrong_shape(f"{where}.judgement: got {score.judgement}, expected a number from 0 to 1, alone")


def verify_agreement(where: str, score: SequenceScore, rollout: TrainingRollout) -> None:
    """Whether a writer's answer is a number from 0 to 1 for every chunk [F] and nothing else."""
    found, chunks = score.agreement, 0 if rollout.anchors is None else len(rollout.anchors)
    if found is None or found.shape != (chunks,) or score.valid is not None:
        got = None if found is None else found.shape
        raise wrong_shape(f"{where}.agreement: got shape {got}, expected ({chunks},), alone")
    if not ((found >= 0) & (found <= 1)).all():
        raise wrong_shape(f"{where}.agreement: got {found.tolist()}, expected numbers from 0 to 1")


def judged(rollouts: list[TrainingRollout], answers: tuple[SequenceScore, ...]) -> list[TrainingRollout]:
    """The rollouts with their judgements for rewards; none where the judge said nothing that can be read."""
    if all(answer.error is not None for answer in answers):
        raise RefusedGroupError("no_score", f"no rollout was judged: {first_error({JUDGE: answers})}")
    silent = sum(answer.error is not None for answer in answers)
    if silent:
        log.warning("responses without a judgement", count=silent, why=first_error({JUDGE: answers}))
    return [
        replace(rollout, reward=answer.judgement) for rollout, answer in zip(rollouts, answers, strict=True)
    ]


def audited(rollouts: list[TrainingRollout], answers: tuple[SequenceScore, ...]) -> list[TrainingRollout]:
    """The rollouts with the writer's agreement; where it said nothing their chunks are not trained on."""
    asked = [
        answer
        for rollout, answer in zip(rollouts, answers, strict=True)
        if rollout.anchors is not None and len(rollout.anchors)
    ]
    silent = tuple(answer for answer in asked if answer.error is not None)
    if silent and len(silent) == len(asked):
        raise RefusedGroupError("no_score", f"no rollout was audited: {first_error({AUDIT: silent})}")
    if silent:
        log.warning("responses without an audit", count=len(silent), why=first_error({AUDIT: silent}))
    return [
        replace(rollout, agreement=answer.agreement)
        for rollout, answer in zip(rollouts, answers, strict=True)
    ]


def first_error(scores: Mapping[str, tuple[SequenceScore, ...]]) -> str:
    """In words, the first error among the answers of views; there is one."""
    return next(
        f"view {view!r}: {answer.error.code}: {answer.error.message}"
        for view, answers in scores.items()
        for answer in answers
        if answer.error is not None
    )
