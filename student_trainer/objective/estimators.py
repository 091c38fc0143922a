"""Score-function estimators: advantages of the sampled token, return-to-go, off-policy corrections.

For D_f(q‖p) = E_p f(u), u = q/p, the gradient is E_p[−w_f ∇log p] with w_f = u f′(u) − f(u) (OPD+).
The constant w_f(1) is a baseline and is taken off (see `divergences`).
The behaviour policy's log μ stands in for log p inside u, as in the published implementations; both are
the same on-policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.objective.divergences import MAX_LOG_RATIO, FDivergence
from student_trainer.objective.settings import Correction, ImportanceCorrection, PpoCorrection
from student_trainer.objective.weights import position_in_sequence


def own_advantage(row: FDivergence, log_u: Tensor, *, stopped: bool = False) -> Tensor:
    """w_f(u) − w_f(1) of the sampled token, from log u = log q(y) − log μ(y).

    `stopped` gives −f(u) instead, the policy gradient of a stopped divergence, which leaves out how the
    divergence itself moves with p. It is another direction for everything but KL(p‖q).
    """
    return -row.cost(log_u) if stopped else row.weight(log_u)


def future_reward(row: FDivergence, log_u: Tensor) -> Tensor:
    """−f(u): what a later token's divergence costs the tokens before it."""
    return -row.cost(log_u)


def discounted_future(
    rewards: Tensor, sequence_lengths: Tensor, *, horizon: int | None, discount: float
) -> Tensor:
    """Σ_{j=1..horizon} discount^j · reward_{t+j} within each sequence, [T].

    Args:
        rewards: [T], packed.
        sequence_lengths: int64 [B], sums to T.
        horizon: None for all that remains of the response.
    """
    place = position_in_sequence(sequence_lengths)
    owner = torch.repeat_interleave(
        torch.arange(len(sequence_lengths), device=place.device), sequence_lengths
    )
    longest = int(sequence_lengths.max()) if len(sequence_lengths) else 0
    reach = longest if horizon is None else min(horizon, longest)
    # One padded column past the end, so that the future of a last token reads as zero.
    returns = rewards.new_zeros(len(sequence_lengths), longest + reach + 1)
    returns[owner, place] = rewards
    step = 1
    while step < returns.shape[1]:  # doubling: after it, each entry sums its next `step` rewards
        returns[:, :-step] += discount**step * returns[:, step:].clone()
        step *= 2
    beyond = discount**reach * returns[owner, place + 1 + reach] if horizon is not None else 0
    return discount * (returns[owner, place + 1] - beyond)


def surrogate(
    correction: Correction, logprob: Tensor, behaviour: Tensor | None, advantage: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per position whose gradient is the corrected policy gradient.

    Args:
        logprob: [R], log p of the sampled token, differentiable.
        behaviour: [R], log μ; None only with correction "none".
        advantage: [R], detached.

    Returns:
        loss [R], ratio p/μ [R] (ones without correction) and bool [R], where the ratio was cut. Ratios
        above e^20 are cut there.
    """
    if behaviour is None or not isinstance(correction, ImportanceCorrection | PpoCorrection):
        whole = torch.ones_like(advantage)
        return -advantage * logprob, whole, torch.zeros_like(whole, dtype=torch.bool)
    if isinstance(correction, ImportanceCorrection):
        ratio, weight = importance_weight(correction, logprob, behaviour)
        # The value is −min(p/μ, cap)·A; the weight is detached, so a capped token still learns.
        loss = -weight * advantage * (1 + logprob - logprob.detach())
        return loss, ratio, weight < ratio
    return _clipped(correction, logprob, behaviour, advantage)


def importance_weight(
    correction: ImportanceCorrection, logprob: Tensor, behaviour: Tensor
) -> tuple[Tensor, Tensor]:
    """Detached p/μ of the sampled token, and the same truncated at the cap."""
    ratio = (logprob.detach() - behaviour).clamp(max=MAX_LOG_RATIO).exp()
    return ratio, ratio if correction.cap is None else ratio.clamp(max=correction.cap)


def _clipped(
    correction: PpoCorrection, logprob: Tensor, behaviour: Tensor, advantage: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO (Schulman et al., 2017, equation 7) with the dual clip of Ye et al. (2020, equation 5)."""
    ratio = (logprob - behaviour).clamp(max=MAX_LOG_RATIO).exp()
    high = correction.clip if correction.clip_high is None else correction.clip_high
    plain = -ratio * advantage
    loss = torch.maximum(plain, -ratio.clamp(1 - correction.clip, 1 + high) * advantage)
    if correction.dual_clip is not None:
        bounded = torch.minimum(loss, -correction.dual_clip * advantage)
        loss = torch.where(advantage < 0, bounded, loss)
    return loss, ratio.detach(), (loss != plain).detach()
