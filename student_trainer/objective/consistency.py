"""The consistency loss: KL(sg p(·|x) ‖ p(·|c, x)), between the student without and with a context."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from student_trainer.objective.batch import Head, LossOutput, TokenBatch
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.loss import objective_loss
from student_trainer.objective.settings import ObjectiveSettings

_FULL = ObjectiveSettings(divergence="kl_teacher_student", support="full", estimator="pathwise")


def consistency_loss(without: Tensor, under: Tensor, head: Head, batch: TokenBatch, plan: Plan) -> LossOutput:
    """coefficient · Σ_t weight_t · KL_t over the batch's auxiliary positions, the full vocabulary in chunks.

    Args:
        without: [T, H], the student's rows without the context, held fixed here.
        under: [A, H], its rows under the context, of `batch.auxiliary_index`; these are trained.
        head: of the student, trained too: as the head of what it says under the context.

    Raises:
        NonFiniteStudentError: the student has diverged.
    """
    assert plan.auxiliary is not None
    assert batch.auxiliary_index is not None
    index = batch.auxiliary_index
    full = replace(
        compile_plan(_FULL, student_temperature=plan.temperature), sampling_temperature=plan.temperature
    )
    fixed = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
    rows = TokenBatch(
        sampled_ids=batch.sampled_ids[index],
        behaviour_logprobs=torch.zeros_like(batch.behaviour_logprobs[index]),
        mask=batch.mask[index],
        weight=plan.auxiliary.coefficient * batch.weight[index],
    )
    return objective_loss(
        under,
        head.weight,
        head.bias,
        rows,
        full,
        softcap=head.softcap,
        scale=head.scale,
        teacher_hidden=without[index].detach(),
        teacher_head=fixed,
    )
