"""What an optimizer step came to: of one update, or of several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from student_trainer.batch import MicroBatch
from student_trainer.exchange import Outcome


@dataclass(frozen=True)
class Refusal:
    """Why an update left weights and optimizer as they were.

    `diverged` tells numbers that are not finite from an update that had nothing to train on.
    """

    reason: str
    diverged: bool


@dataclass(frozen=True)
class Update:
    """One update: what its micro-batches came to, and the gradient's norm before it was clipped."""

    outcomes: tuple[Outcome, ...]
    norm: float
    refused: Refusal | None


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    `sums` are the objective's sums over trained positions (see LossOutput). `refused` is None when
    the weights were updated; of several updates it is one that diverged, and the others were made.
    Where the student has diverged, loss and norm are NaN.
    """

    loss: float  # mean over the updates
    gradient_norm: float  # the largest of the updates'
    learning_rate: float
    sums: dict[str, float]
    micro_batches: tuple[MicroBatch, ...]
    per_token: tuple[dict[str, Tensor], ...]  # one per micro-batch when traces were asked for
    refused: Refusal | None
    unmoved: int = 0  # micro-batches of the first update: they met the weights as the step began

    def mean_entropy(self, whose: str) -> float:
        """Of "student" or "teacher", over the trained positions that know it, nats; NaN without one."""
        names = {"student": ("entropy", "positions"), "teacher": ("teacher_entropy", "entropy_known")}
        total, known = (self.sums.get(name, 0.0) for name in names[whose])
        return total / known if known else math.nan


def step_result(
    updates: Sequence[Update], packed: Sequence[Sequence[MicroBatch]], learning_rate: float
) -> StepResult:
    """The updates of one step, together."""
    whole = [outcome for update in updates for outcome in update.outcomes if outcome.diverged is None]
    complete = all(outcome.diverged is None for update in updates for outcome in update.outcomes)
    sums: Counter[str] = Counter()
    for outcome in whole:
        sums.update(outcome.sums)
    return StepResult(
        loss=math.fsum(outcome.loss for outcome in whole) / len(updates) if complete else math.nan,
        gradient_norm=max(update.norm for update in updates) if complete else math.nan,
        learning_rate=learning_rate,
        sums=dict(sums),
        micro_batches=tuple(batch for micro_batches in packed for batch in micro_batches),
        per_token=tuple(outcome.per_token for outcome in whole),
        refused=_refused(updates),
        unmoved=len(packed[0]),
    )


def _refused(updates: Sequence[Update]) -> Refusal | None:
    refusals = [update.refused for update in updates if update.refused is not None]
    diverged = [refusal for refusal in refusals if refusal.diverged]
    if diverged:
        return diverged[0]
    return refusals[0] if len(refusals) == len(updates) else None
