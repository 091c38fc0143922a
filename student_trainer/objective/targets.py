"""Several views, one target: Σ_v c_v·log q_v (log-linear), log Σ_v c_v·q_v (mixture), or a loss for each.

A log-linear target is a distribution only up to a constant. The constant cancels for sampled tokens,
KL(p‖q) and horizon 0, where E_p ∇log p = 0; everywhere else the target is normalised over what the
divergence sees: the support, the support with its bucket, or the vocabulary. A mixture of distributions is
a distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from student_trainer.objective.answers import Answers
from student_trainer.objective.batch import PAD_ID, TokenBatch
from student_trainer.objective.plan import Plan
from student_trainer.objective.tails import normalised, with_bucket


def combined(plan: Plan, logprobs: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
    """One target of the views' log-probabilities, element by element and not normalised.

    With a view's clip, its distance from the first view enters within ± clip:
    (Σ_v c_v)·log q_1 + Σ_v c_v·clip(log q_v − log q_1).

    Args:
        logprobs: one tensor per view in the plan's order, all of one shape; a view whose coefficient is 0
            may have said anything finite.
        coefficients: one per view, of a shape that goes with them.
    """
    if plan.target == "mixture":
        shifted = [q + torch.log(c) for q, c in zip(logprobs, coefficients, strict=True)]
        return torch.logsumexp(torch.stack(shifted), dim=0)
    first = logprobs[0]
    if not plan.view_clips:
        target = coefficients[0] * first
        for q, c in zip(logprobs[1:], coefficients[1:], strict=True):
            target = target + c * q
        return target
    target = sum(coefficients, torch.zeros_like(coefficients[0])) * first
    for name, q, c in zip(list(plan.views)[1:], logprobs[1:], coefficients[1:], strict=True):
        bound = plan.view_clips.get(name)
        apart = q - first
        target = target + c * (apart if bound is None else apart.clamp(-bound, bound))
    return target


def support_target(
    plan: Plan, logprobs: Sequence[Tensor], coefficients: Sequence[Tensor], present: Tensor
) -> Tensor:
    """The target at the ids of a support that all views answered, f64 [N, K].

    A log-linear target is normalised: over the support, or with tail "bucket" over the support and each
    view's own bucket, so that the bucket that `truncated` appends is the target's.
    """
    if plan.target != "log_linear" or plan.plain_view:
        return combined(plan, logprobs, coefficients)
    if plan.tail != "bucket":
        return normalised(combined(plan, logprobs, coefficients), present)
    buckets = [with_bucket(torch.where(present, q, 0), present) for q in logprobs]
    whole = combined(plan, buckets, coefficients)
    everywhere = torch.cat([present, torch.ones_like(present[:, :1])], dim=1)
    return normalised(whole, everywhere)[:, :-1]


def sampled_targets(plan: Plan, batch: TokenBatch, answers: Answers) -> list[tuple[Tensor, Tensor]]:
    """(factor, log q(y)), f64 [T] each, of every loss of the sampled tokens: one, or one per view."""
    sampled, factors = [], list(answers.coefficients.values())
    for name, factor in answers.coefficients.items():
        values = batch.views[name].sampled
        assert values is not None
        # Without a say it said anything finite; with one, what is not finite must be seen.
        silent = (factor == 0) & ~torch.isfinite(values)
        sampled.append(torch.where(silent, 0.0, values.double()))
    if plan.target == "losses":
        return list(zip(factors, sampled, strict=True))
    return [(torch.ones_like(factors[0]), combined(plan, sampled, factors))]


def monitored_target(plan: Plan, batch: TokenBatch, answers: Answers) -> Tensor | None:
    """Target of the sampled token for metrics, f64 [T]; None where a view does not carry log q(y)."""
    if not plan.views or any(n not in batch.views or batch.views[n].sampled is None for n in plan.views):
        return None
    parts = sampled_targets(plan, batch, answers)
    total = torch.stack([factor for factor, _ in parts]).sum(dim=0)
    return torch.stack([factor * values for factor, values in parts]).sum(dim=0) / total


def common_ids(plan: Plan, batch: TokenBatch, answers: Answers) -> Tensor:
    """int64 [T, K]: the ids at which the views that answered are combined.

    Raises:
        ValueError: views that are combined id by id answered different ids.
    """
    first, *others = plan.views
    ids, there = batch.views[first].support_ids, answers.answered[first]
    assert ids is not None
    for name in others:
        own, answered = batch.views[name].support_ids, answers.answered[name]
        assert own is not None
        if own.shape != ids.shape or not bool(((own == ids).all(dim=1) | ~there | ~answered).all()):
            raise ValueError(
                f"batch.views[{name!r}].support_ids: differ from those of {first!r} (pad {PAD_ID}), but "
                f"objective.target = {plan.target!r} combines the views id by id"
            )
        ids, there = torch.where(there[:, None], ids, own), there | answered
    return ids
