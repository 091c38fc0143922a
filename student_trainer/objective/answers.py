"""Which views of a batch answered where, and the coefficient with which each enters the target there.

A view's coefficient c_v may carry a factor of the example (`TokenBatch.view_factors`). With
missing_view = "renormalise" the coefficients of the views that answered are scaled to the sum that all
views would have had; otherwise a position needs every view. A mixture's coefficients always sum to one.

Shapes: T positions of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.objective.batch import PAD_ID, TokenBatch, ViewTensors
from student_trainer.objective.plan import Plan


@dataclass(frozen=True)
class Answers:
    """The views of a batch as the target uses them.

    Attributes:
        answered: bool [T] by view, where everything that the plan needs of it is finite.
        coefficients: f64 [T] by view, 0 where it has no say.
        usable: bool [T], where there is a target.
        rescaled: bool [T], where there is one without some of the views.
    """

    answered: Mapping[str, Tensor]
    coefficients: Mapping[str, Tensor]
    usable: Tensor
    rescaled: Tensor


def read_answers(plan: Plan, batch: TokenBatch) -> Answers:
    """Raises ValueError for a factor that is missing, not asked for, negative or not finite."""
    answered = {name: _answered(plan, batch.views[name]) for name in plan.view_requests}
    everywhere = torch.ones_like(batch.mask)
    whole = {name: c * _factor(plan, batch, name) for name, c in plan.views.items()}
    usable = everywhere
    for there in answered.values():
        usable = usable & there
    rescaled = torch.zeros_like(usable)
    if plan.missing_view == "renormalise" and answered:
        kept = {name: torch.where(answered[name], c, 0) for name, c in whole.items()}
        total, left = _total(whole), _total(kept)
        rescaled = ~usable & (left > 0)
        whole = {
            name: torch.where(rescaled, c * total / left.clamp_min(1e-30), c) for name, c in kept.items()
        }
        usable = usable | rescaled
    if plan.weight_fields or bool(rescaled.any()):
        total = _total(whole)
        if plan.target != "log_linear":
            usable = usable & (total > 0)
        if plan.target == "mixture":
            # Where there is no target, a stand-in: what only the reward trains must stay finite.
            whole = {name: torch.where(total > 0, c / total.clamp_min(1e-30), 1) for name, c in whole.items()}
    return Answers(answered, whole, usable, rescaled & usable)


def _factor(plan: Plan, batch: TokenBatch, name: str) -> Tensor:
    factor = batch.view_factors.get(name)
    if (factor is None) != (name not in plan.weight_fields):
        wanted = "missing" if factor is None else "given"
        raise ValueError(
            f"batch.view_factors[{name!r}]: {wanted}, the plan has weight fields for "
            f"{sorted(plan.weight_fields)}"
        )
    if factor is None:
        return torch.ones(len(batch.mask), dtype=torch.float64, device=batch.mask.device)
    if factor.shape != batch.mask.shape or not bool((torch.isfinite(factor) & (factor >= 0)).all()):
        raise ValueError(
            f"batch.view_factors[{name!r}]: got shape {tuple(factor.shape)}, allowed: "
            f"{tuple(batch.mask.shape)} numbers that are finite and not negative"
        )
    return factor.double()


def _answered(plan: Plan, view: ViewTensors) -> Tensor:
    if plan.support == "sampled":
        assert view.sampled is not None
        answered = torch.isfinite(view.sampled)
        if plan.entropy_factor is not None and view.entropy is not None:
            answered = answered & torch.isfinite(view.entropy)
        return answered
    assert view.support_ids is not None
    assert view.support_logprobs is not None
    pad = view.support_ids == PAD_ID
    return (torch.isfinite(view.support_logprobs) | pad).all(dim=1) & ~pad.all(dim=1)


def _total(coefficients: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(coefficients.values())).sum(dim=0)
