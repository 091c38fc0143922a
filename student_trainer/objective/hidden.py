"""The hidden-state loss of OPRD: the student's directions, layer by layer, towards the teacher's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from student_trainer.objective.batch import LossOutput, TokenBatch
from student_trainer.objective.plan import Plan


def hidden_loss(states: Mapping[int, Tensor], batch: TokenBatch, plan: Plan) -> LossOutput:
    """coefficient · Σ_t weight_t · mean_l (1/d)·‖h_s/‖h_s‖ − sg h_t/‖h_t‖‖², over the last positions.

    OPRD, as its authors' code has it; a layer of the student meets the teacher's layer of the same number.

    Args:
        states: by layer [T, H] of the student, at the batch's positions.

    Returns:
        Metrics are sums: `hidden` over the `hidden_positions` that entered.
    """
    assert plan.hidden is not None
    (view,) = batch.views.values()
    assert view.hidden is not None
    taken = batch.mask & (_from_end(batch) < plan.hidden.positions)
    index = taken.nonzero().squeeze(1)
    teacher = view.hidden[index].float()  # [N, L, H], unit vectors
    student = torch.stack([states[layer][index] for layer in plan.hidden.layers], dim=1).float()
    distance = (normalize(student, dim=-1) - teacher).square().mean(dim=-1).mean(dim=-1)  # [N]
    loss = plan.hidden.coefficient * (batch.weight[index] * distance).sum()
    return LossOutput(loss, {"hidden": float(distance.detach().sum()), "hidden_positions": float(len(index))})


def _from_end(batch: TokenBatch) -> Tensor:
    """int64 [T]: positions that come after one in its response."""
    assert batch.sequence_lengths is not None
    lengths = batch.sequence_lengths
    ends = lengths.cumsum(0).repeat_interleave(lengths)
    return ends - 1 - torch.arange(len(ends), device=ends.device)
