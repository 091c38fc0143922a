"""One micro-batch from tokens to loss, as one module: what is called, and what FSDP wraps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.models.head import head_of
from services.models.packed import PackedLayout, hidden_states
from student_trainer.objective.batch import TokenBatch
from student_trainer.objective.compile import Plan
from student_trainer.objective.loss import LossOutput, NonFiniteStudentError, objective_loss
from student_trainer.student import Student


@dataclass(frozen=True)
class PassOutput:
    """The scalar to differentiate; of a student that has diverged `diverged` says how, `output` is None."""

    loss: Tensor
    output: LossOutput | None
    diverged: str | None = None


class ObjectivePass(nn.Module):
    """The packed forward of a student and the plan's loss of it."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = student.model
        self._dtype = student.dtype

    def forward(
        self, layout: PackedLayout, tokens: TokenBatch, plan: Plan, *, per_token: bool = False
    ) -> PassOutput:
        """Loss of a micro-batch whose tensors are on the student's device.

        A student that has diverged gets a loss of zero that still depends on every weight, so that
        a rank which must take part in the backward pass can.
        """
        device = layout.input_ids.device
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden = hidden_states(self.model, layout)
        head = head_of(self.model)
        try:
            output = objective_loss(
                hidden[layout.score_rows],
                head.weight,
                head.bias,
                tokens,
                plan,
                softcap=head.softcap,
                scale=head.scale,
                per_token=per_token,
            )
        except NonFiniteStudentError as error:
            return PassOutput(0.0 * (hidden.sum() + head.weight.sum()), None, str(error))
        return PassOutput(output.loss, output)
