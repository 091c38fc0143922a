"""The published formula of every preset with teachers or rewards, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support.preset_problem import (
    FIRST,
    LENGTHS,
    LOG_MU,
    LOG_OLD,
    LOG_P,
    REWARD,
    SECOND,
    SHARES,
    K,
    Loss,
    T,
    at_sampled,
)

LOG_U = at_sampled(FIRST) - LOG_MU


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p/q), [T]."""
    return (p * (p / q).log()).sum(-1)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    """Jensen–Shannon divergence, [T]."""
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def with_rest(log_x: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the ids, and of everything else together."""
    inside = log_x.gather(1, ids).exp()
    return torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], dim=1)


def among(log_x: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the ids, normalised among themselves."""
    inside = log_x.gather(1, ids).exp()
    return inside / inside.sum(-1, keepdim=True)


def top(log_x: Tensor) -> Tensor:
    """The K most probable ids."""
    return log_x.topk(K).indices


def importance(advantage: Tensor, cap: float = math.inf) -> Loss:
    """−min(p/μ, cap)·A·(…): the weight is fixed, the sampled log-probability learns."""

    def loss(log_p: Tensor) -> Tensor:
        weight = (at_sampled(LOG_P) - LOG_MU).exp().clamp(max=cap)
        return -(weight * advantage * (1 + at_sampled(log_p) - at_sampled(LOG_P))).mean()

    return loss


def clipped(
    advantage: Tensor, log_p: Tensor, log_old: Tensor, high: float = 0.2, dual: float = math.inf
) -> Tensor:
    """PPO's surrogate with the dual clip, [T]."""
    ratio = (at_sampled(log_p) - log_old).exp()
    worst = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1 + high) * advantage)
    return torch.where(advantage < 0, torch.minimum(worst, -dual * advantage), worst)


def per_response(losses: Tensor) -> Tensor:
    """Every response alike: the mean of the responses' means."""
    return torch.stack([part.mean() for part in losses.split(LENGTHS.tolist())]).mean()


def grpo(log_p: Tensor) -> Tensor:
    return per_response(clipped(REWARD, log_p, LOG_MU))


def g_opd(target: Tensor) -> Loss:
    """A = target − log p_old, between p_old and p; from μ to p_old a weight of at most 5."""
    weight = (LOG_OLD - LOG_MU).exp().clamp(max=5.0)
    return lambda log_p: (weight * clipped(target - LOG_OLD, log_p, LOG_OLD, dual=3.0)).mean()


def gkd(log_p: Tensor) -> Tensor:
    return jsd(with_rest(log_p, top(FIRST)), with_rest(FIRST, top(FIRST))).mean()


def typhoon_s(log_p: Tensor) -> Tensor:
    return kl(with_rest(FIRST, top(FIRST)), with_rest(log_p, top(FIRST))).mean()


def qwen3(log_p: Tensor) -> Tensor:
    return kl(with_rest(log_p, top(LOG_P)), with_rest(FIRST, top(LOG_P))).mean()


def stopped(log_p: Tensor) -> Tensor:
    """−Σ_S p (log q − sg log p), [T]."""
    s, t = (x.gather(1, top(LOG_P)) for x in (log_p, FIRST))
    return -(s.exp() * (t - s.detach())).sum(-1)


def ta_opd(log_p: Tensor) -> Tensor:
    score = stopped(LOG_P) * FIRST.gather(1, top(LOG_P)).exp().sum(-1)
    kept = score.topk(math.ceil(0.05 * T)).indices
    return stopped(log_p)[kept].sum() / T


def iw_weight() -> Tensor:
    rows = []
    for sizes in LOG_U.abs().split(LENGTHS.tolist()):
        rows.append(1 + 0.5 * (1 - sizes.cumsum(0) / sizes.sum()))
    return torch.cat(rows)


def mad_opd(log_p: Tensor) -> Tensor:
    each = [jsd(with_rest(log_p, top(q)), with_rest(q, top(q))) for q in (FIRST, SECOND)]
    return (SHARES * each[0] + (1 - SHARES) * each[1]).mean()


EXTRAPOLATED = 1.25 * at_sampled(FIRST) - 0.25 * at_sampled(SECOND)
FORMULAS: dict[str, Loss] = {
    "thinking-machines": importance(LOG_U),
    "qwen3-strong-to-weak": qwen3,
    "gkd": gkd,
    "typhoon-s": typhoon_s,
    "many-faces": lambda log_p: stopped(log_p).mean(),
    "grpo": grpo,
    "opd-plus": importance(0.5 * ((1 + LOG_U.exp()) / 2).log()),
    "g-opd": g_opd(at_sampled(FIRST)),
    "exopd": g_opd(EXTRAPOLATED),
    "ta-opd": ta_opd,
    "iw-opd": importance(iw_weight() * LOG_U),
    "lightning": lambda log_p: -((at_sampled(FIRST) - LOG_OLD) * at_sampled(log_p)).mean(),
    "mad-opd": mad_opd,
}
