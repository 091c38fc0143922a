"""One optimizer step: packed forward, objective, backward, clip, update. Knows nothing of queues.

With several ranks each trains its share of the micro-batches on its shard of the weights; the step is
that of one process up to rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tutelage_client.errors import TutelageError

from services import tracing
from student_trainer.batch import MicroBatch, deal, idle_batch, pack_step
from student_trainer.checkpoint import Checkpoint, load_tensors
from student_trainer.config import TrainingSettings
from student_trainer.exchange import (
    Outcome,
    decode_micro_batches,
    decode_outcomes,
    encode_micro_batches,
    encode_outcomes,
)
from student_trainer.objective.compile import Plan
from student_trainer.objective_pass import ObjectivePass
from student_trainer.optimizer import build_optimizer, learning_rate, optimizer_tensors, set_learning_rate
from student_trainer.ranks import ALONE, Ranks
from student_trainer.sharding import check_positions, shard
from student_trainer.student import Student
from student_trainer.verify import TrainingGroup

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Refusal:
    """Why a step left weights and optimizer as they were.

    `diverged` tells numbers that are not finite from a step that had nothing to train on.
    """

    reason: str
    diverged: bool


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    `sums` are the objective's sums over trained positions (see LossOutput). `refused` is None when
    the weights were updated. Where the student has diverged, loss and norm are NaN.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    sums: dict[str, float]
    micro_batches: tuple[MicroBatch, ...]
    per_token: tuple[dict[str, Tensor], ...]  # one per micro-batch when traces were asked for
    refused: Refusal | None


class Learner:
    """Student, optimizer and plan; a rank's part of them where there are several."""

    def __init__(
        self, student: Student, plan: Plan, settings: TrainingSettings, ranks: Ranks = ALONE
    ) -> None:
        self.student = student
        self.plan = plan
        self._settings = settings
        self._ranks = ranks
        self._seed = torch.initial_seed()
        self._pass = ObjectivePass(student)
        shard(self._pass, student.model, student.dtype, ranks)
        self._parameters = student.trained()
        self._optimizer = build_optimizer(self._parameters, settings)

    def step(self, groups: Sequence[TrainingGroup], step: int, *, traces: bool = False) -> StepResult:
        """Train on `groups` as 0-based `step`; traces keep per-token values for the report.

        On rank 0; the others `assist`.
        """
        world = self._ranks.world
        micro_batches = pack_step(groups, self.plan, self._settings.micro_batch_tokens, shares=world)
        shares = deal(micro_batches, world)
        self._ranks.tell("step", step=step, traces=traces)
        own, norm = self._train(self._hand_out(micro_batches, shares), traces)
        outcomes = self._in_order(own, shares)
        refused = _refusal(outcomes, norm)
        self._update(self._ranks.agree(refused is None), step)
        whole = [outcome for outcome in outcomes if outcome.diverged is None]
        complete = len(whole) == len(outcomes)
        sums: Counter[str] = Counter()
        for outcome in whole:
            sums.update(outcome.sums)
        return StepResult(
            loss=math.fsum(outcome.loss for outcome in whole) if complete else math.nan,
            gradient_norm=norm if complete else math.nan,
            learning_rate=learning_rate(self._settings, step),
            sums=dict(sums),
            micro_batches=tuple(micro_batches),
            per_token=tuple(outcome.per_token for outcome in whole),
            refused=refused,
        )

    def assist(self, step: int, *, traces: bool) -> None:
        """The same step on another rank: the share of it that rank 0 hands out."""
        share = decode_micro_batches(self._ranks.receive())
        # Rank 0 draws from the state that checkpoints keep; the others' draws follow from the step.
        seed = hashlib.sha256(f"{self._seed} {self._ranks.rank} {step}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8]) >> 1)
        outcomes, _ = self._train(share, traces)
        self._ranks.collect(encode_outcomes(outcomes))
        self._update(self._ranks.agree(False), step)

    def load(self, checkpoint: Checkpoint) -> None:
        """Put weights, optimizer and random state where `checkpoint` left them; on every rank.

        Raises:
            TutelageError: FAILED_PRECONDITION when the checkpoint belongs to another model.
        """
        self._ranks.tell("load", path=str(checkpoint.path))
        tensors = self.state_tensors()
        try:
            load_tensors(checkpoint, tensors)
        except ValueError as error:
            raise TutelageError("FAILED_PRECONDITION", str(error)) from error
        self.restore_random_state(tensors)

    def export(self, directory: Path) -> None:
        """Write the student as a Hugging Face directory; on rank 0, of whatever all ranks hold."""
        self._ranks.tell("export")
        self.student.export(directory)

    def export_adapter(self, directory: Path) -> None:
        """Write the adapters alone, in the same way."""
        self._ranks.tell("export_adapter")
        self.student.export_adapter(directory)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name. Tensors are live: loading into them restores them."""
        tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in self._parameters}
        tensors |= optimizer_tensors(self._optimizer, self._parameters)
        tensors["random.cpu"] = torch.get_rng_state()
        if self.student.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.student.device)
        return tensors

    def restore_random_state(self, tensors: dict[str, Tensor]) -> None:
        """Random states are copies, so after loading them they must be put back."""
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.student.device)

    def _hand_out(
        self, micro_batches: Sequence[MicroBatch], shares: Sequence[Sequence[int]]
    ) -> list[MicroBatch]:
        """Send every rank its share and return one's own. All get equally many: some an idle one."""
        rounds = max(len(share) for share in shares)
        filled = [
            [micro_batches[number] for number in share]
            + [idle_batch(micro_batches[0]) for _ in range(rounds - len(share))]
            for share in shares
        ]
        self._ranks.hand_out([encode_micro_batches(share) for share in filled[1:]])
        return filled[0]

    def _train(self, share: Sequence[MicroBatch], traces: bool) -> tuple[list[Outcome], float]:
        """Gradients of a share, clipped by the norm over all ranks; outcomes and that norm.

        One process stops where the student has diverged; of several each makes every pass.
        """
        outcomes: list[Outcome] = []
        with tracing.span("forward_backward", attributes={"tutelage.micro_batches": len(share)}):
            for micro_batch in share:
                outcomes.append(self._backward(micro_batch, traces))
                if outcomes[-1].diverged and self._ranks.alone:
                    return outcomes, math.nan
            return outcomes, self._clip()

    def _backward(self, micro_batch: MicroBatch, traces: bool) -> Outcome:
        device = self.student.device
        if not self._ranks.alone:
            check_positions(self.student.model, micro_batch.layout.max_position)
        passed = self._pass(
            micro_batch.layout.to(device), micro_batch.tokens.to(device), self.plan, per_token=traces
        )
        if passed.diverged is None or not self._ranks.alone:
            passed.loss.backward()
        if passed.output is None:
            return Outcome(0.0, {}, {}, passed.diverged)
        return Outcome(float(passed.loss.detach()), passed.output.metrics, passed.output.per_token or {})

    def _in_order(self, own: list[Outcome], shares: Sequence[Sequence[int]]) -> list[Outcome]:
        """Outcomes of the step's micro-batches, in their order; one that diverged alone."""
        encoded = self._ranks.collect(encode_outcomes(own) if not self._ranks.alone else b"")
        by_rank = [own, *(decode_outcomes(data) for data in encoded[1:])]
        for outcomes in by_rank:
            for outcome in outcomes:
                if outcome.diverged:
                    return [outcome]
        numbered = {
            number: outcome
            for share, outcomes in zip(shares, by_rank, strict=True)
            for number, outcome in zip(share, outcomes, strict=False)  # idle ones come last
        }
        return [numbered[number] for number in sorted(numbered)]

    def _clip(self) -> float:
        parameters = [parameter for _, parameter in self._parameters]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._settings.gradient_clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _update(self, wanted: bool, step: int) -> None:
        if wanted:
            with tracing.span("optimizer"):
                set_learning_rate(self._optimizer, learning_rate(self._settings, step))
                self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _refusal(outcomes: Sequence[Outcome], norm: float) -> Refusal | None:
    """A gradient of nothing is zero, and AdamW would still move the weights by momentum and decay."""
    for outcome in outcomes:
        if outcome.diverged:
            return Refusal(outcome.diverged, diverged=True)
    if not any(outcome.sums["positions"] for outcome in outcomes):
        return Refusal("no position of the step can be trained on", diverged=False)
    return None if math.isfinite(norm) else Refusal(f"the gradient norm is {norm}", diverged=True)
