"""A verifiable reward's advantage, and how it meets the distillation advantage."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student_trainer.objective.divergences import MAX_LOG_RATIO
from student_trainer.objective.plan import Plan

STD_EPSILON = 1e-6
LEAST_CERTAINTY = 0.1


def group_advantages(rewards: Tensor, group_sizes: Tensor, *, divide_by_std: bool) -> Tensor:
    """Rewards relative to their group, as in GRPO (Shao et al., 2024, section 4.1.2).

    Args:
        rewards: f32 [B], the rollouts of a group contiguous.
        group_sizes: int64 [G], sums to B.
        divide_by_std: also divide by the group's standard deviation (over n − 1).

    Returns:
        f32 [B]; 0 throughout a group whose rewards are all equal, or of one rollout.
    """
    groups = torch.split(rewards, group_sizes.tolist())
    return torch.cat([_advantages(group, divide_by_std) for group in groups])


def _advantages(rewards: Tensor, divide_by_std: bool) -> Tensor:
    centred = rewards - rewards.mean()
    if len(rewards) < 2 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return centred / (rewards.std() + STD_EPSILON) if divide_by_std else centred


def rewarded(plan: Plan, advantage: Tensor) -> Tensor:
    """bool [T]: with mix = "route", the positions that the reward trains; the rest are distilled."""
    return advantage > 0 if plan.route_reward == "positive" else advantage != 0


def mixed_advantage(
    plan: Plan,
    distill: Tensor | None,
    reward: Tensor | None,
    log_ratio: Tensor | None,
    certainty: Tensor | None = None,
) -> Tensor:
    """The advantage of the sampled token, f64 [T].

    Args:
        distill: the teacher's advantage, None when the score function carries no distillation.
        reward: the reward's advantage, None when the plan needs none.
        log_ratio: log q(y) − log μ(y), or between two views, used by mix = "multiply" only; None: the
            teacher has no say.
        certainty: see `entropy_certainty`, likewise.
    """
    distilled = None if distill is None else plan.distill_coefficient * distill
    if reward is None:
        if distilled is None:
            raise ValueError("neither a distillation nor a reward advantage")
        return distilled
    paid = plan.reward_coefficient * reward
    if plan.mix == "multiply":
        factor = 1.0 if log_ratio is None else _teacher_factor(plan, reward, log_ratio)
        return paid * factor * (1.0 if certainty is None else certainty)
    if plan.mix == "route":
        chosen = rewarded(plan, reward)
        return torch.where(chosen, paid, torch.zeros_like(paid) if distilled is None else distilled)
    return paid if distilled is None else paid + distilled


def _teacher_factor(plan: Plan, reward: Tensor, log_ratio: Tensor) -> Tensor:
    """(1 − c) + c · clip(w, 1 ± ratio_clip), c the distill_coefficient.

    w = (q/μ)^sign A raises what the teacher likes in good responses and spares it in bad ones (RLSD);
    its inverse raises what the student found without the teacher (RLRT); of two views, w = (q₁/q₂)^sign A
    raises what only the first likes (CEPO). Behind the gate the factor is 1.
    """
    towards = -1.0 if plan.ratio == "student_over_teacher" else 1.0
    powered = torch.exp((towards * torch.sign(reward) * log_ratio).clamp(max=MAX_LOG_RATIO))
    clipped = powered.clamp(1 - plan.ratio_clip, 1 + plan.ratio_clip)
    factor = 1 - plan.distill_coefficient + plan.distill_coefficient * clipped
    return torch.where(reward > 0, factor, 1) if plan.ratio_gate == "rewarded" else factor


def entropy_certainty(factor: float, entropy: Tensor, vocabulary: int) -> Tensor:
    """clip(1 − factor · H/log V, 0.1, 1): EGRSD's weight, small where the teacher is unsure (H in nats)."""
    return (1 - factor * entropy / math.log(vocabulary)).clamp(LEAST_CERTAINTY, 1.0)
