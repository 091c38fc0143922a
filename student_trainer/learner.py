"""One optimizer step: packed forward, objective, backward, clip, update. Knows nothing of queues."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from services import tracing
from services.models.head import head_of
from services.models.packed import hidden_states
from student_trainer.batch import MicroBatch, pack_step
from student_trainer.config import TrainingSettings
from student_trainer.objective.compile import Plan
from student_trainer.objective.loss import LossOutput, NonFiniteStudentError, objective_loss
from student_trainer.optimizer import build_optimizer, learning_rate, optimizer_tensors, set_learning_rate
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
    the weights were updated.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    sums: dict[str, float]
    micro_batches: tuple[MicroBatch, ...]
    per_token: tuple[dict[str, Tensor], ...]  # one per micro-batch when traces were asked for
    refused: Refusal | None


class Learner:
    """Student, optimizer and plan."""

    def __init__(self, student: Student, plan: Plan, settings: TrainingSettings) -> None:
        self.student = student
        self.plan = plan
        self._settings = settings
        self._parameters = student.trained()
        self._optimizer = build_optimizer(self._parameters, settings)

    def step(self, groups: Sequence[TrainingGroup], step: int, *, traces: bool = False) -> StepResult:
        """Train on `groups` as 0-based `step`; traces keep per-token values for the report."""
        micro_batches = pack_step(groups, self.plan, self._settings.micro_batch_tokens)
        rate = learning_rate(self._settings, step)
        outputs: list[LossOutput] = []
        norm = math.nan
        try:
            with tracing.span("forward_backward", attributes={"tutelage.micro_batches": len(micro_batches)}):
                outputs = [self._backward(micro_batch, traces) for micro_batch in micro_batches]
                norm = self._clip()
            refused = _refusal(outputs, norm)
        except NonFiniteStudentError as error:
            refused = Refusal(str(error), diverged=True)
        if refused is None:
            with tracing.span("optimizer"):
                set_learning_rate(self._optimizer, rate)
                self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        sums: Counter[str] = Counter()
        for output in outputs:
            sums.update(output.metrics)
        return StepResult(
            loss=math.fsum(float(output.loss.detach()) for output in outputs),
            gradient_norm=norm,
            learning_rate=rate,
            sums=dict(sums),
            micro_batches=tuple(micro_batches),
            per_token=tuple(output.per_token or {} for output in outputs),
            refused=refused,
        )

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

    def _backward(self, micro_batch: MicroBatch, traces: bool) -> LossOutput:
        device = self.student.device
        layout = micro_batch.layout.to(device)
        with torch.autocast(device.type, self.student.dtype, enabled=self.student.dtype != torch.float32):
            hidden = hidden_states(self.student.model, layout)
        head = head_of(self.student.model)
        output = objective_loss(
            hidden[layout.score_rows],
            head.weight,
            head.bias,
            micro_batch.tokens.to(device),
            self.plan,
            softcap=head.softcap,
            scale=head.scale,
            per_token=traces,
        )
        output.loss.backward()  # type: ignore[no-untyped-call]
        return output

    def _clip(self) -> float:
        parameters = [parameter for _, parameter in self._parameters]
        return float(torch.nn.utils.clip_grad_norm_(parameters, self._settings.gradient_clip))


def _refusal(outputs: Sequence[LossOutput], norm: float) -> Refusal | None:
    """A gradient of nothing is zero, and AdamW would still move the weights by momentum and decay."""
    if not any(output.metrics["positions"] for output in outputs):
        return Refusal("no position of the step can be trained on", diverged=False)
    return None if math.isfinite(norm) else Refusal(f"the gradient norm is {norm}", diverged=True)
