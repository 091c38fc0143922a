"""What may be trained on: a verified group and its rollouts, and the refusal of one that may not be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from tutelage_client.types import Identity, Int32Array, SequenceScore

from student_trainer.ledger import DropReason
from student_trainer.lineage import Lineage
from student_trainer.sampler.settings import GUIDED, STUDENT

Float32Array = npt.NDArray[np.float32]


class RefusedGroupError(Exception):
    """A group that must not be trained on."""

    def __init__(self, reason: DropReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class TrainingRollout:
    """One response of R tokens with the scores of its views: all that the plan needs, or all there are.

    `marked` says whether every view with templates had a context of its own for it, `guided` whether the
    student sampled it under [sampling] context.
    """

    response_ids: Int32Array  # [R]
    behaviour_logprobs: Float32Array  # [R]
    candidate_ids: Int32Array | None  # [R, C], PAD_ID where there is none
    reward: float | None
    scores: Mapping[str, SequenceScore]
    marked: bool = True
    auxiliary_ids: Int32Array | None = None  # [P'], context of the plan's auxiliary loss
    guided: bool = False
    anchors: Int32Array | None = None  # [F], where each audited chunk begins, ascending
    agreement: Float32Array | None = None  # [F], the writer's; None where it said nothing

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
    view_weights: Mapping[str, float] = field(default_factory=dict)  # factors of coefficients; 1 where absent
    missing_views: tuple[str, ...] = ()  # those that did not score every rollout
    scored_by: Mapping[str, Identity] = field(default_factory=dict)  # by view

    def sampled_as_trained(self, rollout: TrainingRollout) -> bool:
        """Whether one of its rollouts is the student's own, under the prompt that it is trained on."""
        return self.sampled_by in (STUDENT, GUIDED) and not rollout.guided

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return sum(rollout.length for rollout in self.rollouts)

    @property
    def num_scores(self) -> int:
        """Response tokens times the views that scored them."""
        return sum(rollout.length * len(rollout.scores) for rollout in self.rollouts)


def wrong_shape(message: str) -> RefusedGroupError:
    """A refusal of a group that is not what was asked for."""
    return RefusedGroupError("shape", message)
