"""One micro-batch from tokens to loss, as one module: what is called, and what FSDP wraps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from tutelage_client.errors import invalid

from services.models.head import head_of
from services.models.packed import PackedLayout, layer_states
from student_trainer.objective.batch import Head, TokenBatch
from student_trainer.objective.compile import Plan
from student_trainer.objective.consistency import consistency_loss
from student_trainer.objective.hidden import hidden_loss
from student_trainer.objective.loss import LossOutput, NonFiniteStudentError, objective_loss, student_logprobs
from student_trainer.objective.settings import ObjectiveError
from student_trainer.student import Student


def _with(output: LossOutput, extra: LossOutput) -> LossOutput:
    """The objective's loss and the auxiliary one's; the latter's divergence is called consistency."""
    found = {"consistency": "divergence", "consistent": "positions"}
    more = {name: extra.metrics.get(there, 0.0) for name, there in found.items()}
    return replace(output, loss=output.loss + extra.loss, metrics=output.metrics | more)


@dataclass(frozen=True)
class PassOutput:
    """The scalar to differentiate; of a student that has diverged `diverged` says how, `output` is None."""

    loss: Tensor
    output: LossOutput | None
    diverged: str | None = None
    old: Tensor | None = None  # f64 [T], of task "old", NaN where not trained on; None of a diverged student


class ObjectivePass(nn.Module):
    """The packed forward of a student and the plan's loss of it."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = student.model
        self._dtype = student.dtype

    def forward(
        self,
        layout: PackedLayout,
        tokens: TokenBatch,
        plan: Plan,
        *,
        task: Literal["loss", "old"] = "loss",
        per_token: bool = False,
        distill_open: bool | None = None,
    ) -> PassOutput:
        """Loss of a micro-batch whose tensors are on the student's device.

        Task "old" answers with the sampled tokens' log-probabilities alone. A student that has diverged
        gets a loss of zero that still depends on every weight, so that a rank which must take part in the
        backward pass can.
        """
        device = layout.input_ids.device
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden, layers = layer_states(
                self.model, layout, () if plan.hidden is None or task == "old" else plan.hidden.layers
            )
        head = head_of(self.model)
        # The auxiliary loss's rows come after those of the batch's positions.
        rows, positions = hidden[layout.score_rows], len(tokens.sampled_ids)
        scored, others = rows[:positions], rows[positions:]
        try:
            if task == "old":
                old = student_logprobs(
                    scored, head.weight, head.bias, tokens, plan, softcap=head.softcap, scale=head.scale
                )
                return PassOutput(old.sum(), None, old=old)
            output = objective_loss(
                scored,
                head.weight,
                head.bias,
                tokens,
                plan,
                softcap=head.softcap,
                scale=head.scale,
                per_token=per_token,
                distill_open=distill_open,
            )
            if plan.auxiliary is not None and len(others):
                own = Head(head.weight, head.bias, head.softcap, head.scale)
                output = _with(output, consistency_loss(scored, others, own, tokens, plan))
            if plan.hidden is not None:
                places = layout.score_rows[:positions]
                states = {layer: found[places] for layer, found in layers.items()}
                beside = hidden_loss(states, tokens, plan)
                output = replace(
                    output, loss=output.loss + beside.loss, metrics=output.metrics | beside.metrics
                )
        except ObjectiveError as error:  # of what a function of the user's returned
            raise invalid(str(error)) from error
        except NonFiniteStudentError as error:
            return PassOutput(0.0 * (hidden.sum() + head.weight.sum()), None, str(error))
        return PassOutput(output.loss, output)
