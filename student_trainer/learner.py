"""One optimizer step: packed forward, objective, backward, clip, update. Knows nothing of queues.

With several ranks each trains its share of the micro-batches on its shard of the weights; the step is
that of one process up to rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tutelage_client.errors import TutelageError

from services import tracing
from student_trainer.batch import MicroBatch, deal, idle_batch, pack_step
from student_trainer.checkpoint import Checkpoint, load_tensors
from student_trainer.ema import Ema
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
from student_trainer.sections import TrainingSettings
from student_trainer.sharding import check_positions, shard
from student_trainer.step_result import Refusal, StepResult, Update, step_result
from student_trainer.student import Student
from student_trainer.verify import TrainingGroup

log = structlog.get_logger(__name__)


class Learner:
    """Student, optimizer and plan; a rank's part of them where there are several.

    Args:
        with_ema: keep a moving average of the student too, at the plan's rate.
    """

    def __init__(
        self,
        student: Student,
        plan: Plan,
        settings: TrainingSettings,
        ranks: Ranks = ALONE,
        *,
        with_ema: bool = False,
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
        self.ema = Ema(student, plan.ema_rate) if with_ema else None

    def step(
        self,
        groups: Sequence[TrainingGroup],
        step: int,
        *,
        traces: bool = False,
        distill_open: bool | None = None,
    ) -> StepResult:
        """Train on `groups` as 0-based `step`; traces keep per-token values for the report.

        On rank 0; the others `assist`. Several updates each train on an equal part of the groups.

        Args:
            distill_open: state of the plan's gate; None without one.
        """
        packed = self._pack(groups)
        shares = [deal(micro_batches, self._ranks.world) for micro_batches in packed]
        self._ranks.tell("step", step=step, traces=traces, updates=len(packed), distill_open=distill_open)
        own = [self._hand_out(*update) for update in zip(packed, shares, strict=True)]
        updates = []
        for share, numbers in zip(self._with_old(own), shares, strict=True):
            found, norm = self._train(share, traces, distill_open)
            outcomes = self._in_order(found, numbers)
            refused = _refusal(outcomes, norm)
            self._update(self._ranks.agree(refused is None), step)
            updates.append(Update(tuple(outcomes), norm, refused))
        return step_result(updates, packed, learning_rate(self._settings, step))

    def assist(self, step: int, *, traces: bool, updates: int, distill_open: bool | None) -> None:
        """The same step on another rank: the share of it that rank 0 hands out."""
        shares = [decode_micro_batches(self._ranks.receive()) for _ in range(updates)]
        # Rank 0 draws from the state that checkpoints keep; the others' draws follow from the step.
        seed = hashlib.sha256(f"{self._seed} {self._ranks.rank} {step}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8]) >> 1)
        for share in self._with_old(shares):
            outcomes, _ = self._train(share, traces, distill_open)
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

    def export_ema(self, directory: Path) -> None:
        """Write the student's moving average, in the same way."""
        assert self.ema is not None
        self._ranks.tell("export_ema")
        self.student.export(directory, self.ema.averages)

    def export_adapter(self, directory: Path) -> None:
        """Write the adapters alone, in the same way."""
        self._ranks.tell("export_adapter")
        self.student.export_adapter(directory)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name. Tensors are live: loading into them restores them."""
        tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in self._parameters}
        tensors |= optimizer_tensors(self._optimizer, self._parameters)
        if self.ema is not None:
            tensors |= self.ema.state_tensors()
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

    def _pack(self, groups: Sequence[TrainingGroup]) -> list[list[MicroBatch]]:
        """Micro-batches of every update, in order; one update without any where nothing can be trained on."""
        count, budget = self._settings.updates_per_step, self._settings.micro_batch_tokens
        parts = [groups[len(groups) * i // count : len(groups) * (i + 1) // count] for i in range(count)]
        packed = [pack_step(part, self.plan, budget, shares=self._ranks.world) for part in parts if part]
        return [micro_batches for micro_batches in packed if micro_batches] or [[]]

    def _with_old(self, shares: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """The same with log p_old: of a single update it is the student's own of that very pass."""
        if len(shares) < 2 or not self.plan.uses_old:
            return shares
        device = self.student.device
        drawing = [module for module in self._pass.modules() if module.training]
        self._pass.eval()
        with torch.no_grad(), tracing.span("old_logprobs"):
            found = [
                [
                    self._pass(batch.layout.to(device), batch.tokens.to(device), self.plan, task="old").old
                    for batch in share
                ]
                for share in shares
            ]
        for module in drawing:
            module.training = True
        return [
            [
                replace(batch, tokens=replace(batch.tokens, old_logprobs=None if old is None else old.cpu()))
                for batch, old in zip(share, olds, strict=True)
            ]
            for share, olds in zip(shares, found, strict=True)
        ]

    def _train(
        self, share: Sequence[MicroBatch], traces: bool, distill_open: bool | None
    ) -> tuple[list[Outcome], float]:
        """Gradients of a share, clipped by the norm over all ranks; outcomes and that norm.

        One process stops where the student has diverged; of several each makes every pass.
        """
        outcomes: list[Outcome] = []
        with tracing.span("forward_backward", attributes={"tutelage.micro_batches": len(share)}):
            for micro_batch in share:
                outcomes.append(self._backward(micro_batch, traces, distill_open))
                if outcomes[-1].diverged and self._ranks.alone:
                    return outcomes, math.nan
            return outcomes, self._clip()

    def _backward(self, micro_batch: MicroBatch, traces: bool, distill_open: bool | None) -> Outcome:
        device = self.student.device
        if not self._ranks.alone:
            check_positions(self.student.model, micro_batch.layout.max_position)
        passed = self._pass(
            micro_batch.layout.to(device),
            micro_batch.tokens.to(device),
            self.plan,
            per_token=traces,
            distill_open=distill_open,
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
                if self.ema is not None:
                    self.ema.update()
        self._optimizer.zero_grad(set_to_none=True)


def _refusal(outcomes: Sequence[Outcome], norm: float) -> Refusal | None:
    """A gradient of nothing is zero, and AdamW would still move the weights by momentum and decay."""
    for outcome in outcomes:
        if outcome.diverged:
            return Refusal(outcome.diverged, diverged=True)
    if not any(outcome.sums["positions"] for outcome in outcomes):
        return Refusal("no position of the step can be trained on", diverged=False)
    return None if math.isfinite(norm) else Refusal(f"the gradient norm is {norm}", diverged=True)
