"""The published formula of every preset that mixes distillation with a reward, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support.preset_formulas import LOG_U, clipped, jsd, kl, per_response, top, with_rest
from support.preset_problem import (
    FIRST,
    IN_FIRST,
    LENGTHS,
    LOG_MU,
    LOG_OLD,
    LOG_P,
    REWARD,
    Loss,
    T,
    at_sampled,
)
from support.tabular import V

ENTROPY = -(FIRST.exp() * FIRST).sum(-1)


def modulated(share: float, factor: Tensor) -> Tensor:
    """The reward's advantage, a share of it times the factor, [T]."""
    return REWARD * (1 - share + share * factor)


def towards_teacher(bound: float) -> Tensor:
    """clip((q/μ)^sign A, 1 ± bound), [T]."""
    return (LOG_U * REWARD.sign()).exp().clamp(1 - bound, 1 + bound)


def surrogate(advantage: Tensor, high: float = 0.2) -> Loss:
    return lambda log_p: clipped(advantage, log_p, LOG_MU, high).mean()


def rlrt() -> Tensor:
    away = (-LOG_U).exp().clamp(0, 2)
    return torch.where(IN_FIRST, modulated(0.5, away), REWARD)


def egrsd(entropy: Tensor) -> Tensor:
    return REWARD * towards_teacher(0.2) * (1 - entropy / math.log(V)).clamp(0.1, 1)


def least_ahead(window: int) -> Tensor:
    """The least entropy of a token and the next ones of its response, [T]."""
    rows = ENTROPY.split(LENGTHS.tolist())
    return torch.stack([row[t : t + window + 1].min() for row in rows for t in range(len(row))])


def antisd() -> Tensor:
    return REWARD - 0.5 * (torch.nn.functional.softplus(LOG_U) - math.log(2)) / 2


def kepo(log_p: Tensor) -> Tensor:
    distance = jsd(with_rest(log_p, top(FIRST)), with_rest(FIRST, top(FIRST)))
    return per_response(clipped(REWARD, log_p, LOG_MU) + torch.where(IN_FIRST, distance, 0))


def pi_play(log_p: Tensor) -> Tensor:
    distance = kl(with_rest(log_p, top(LOG_P)), with_rest(FIRST, top(LOG_P)))
    return per_response(clipped(REWARD, log_p, LOG_MU) + distance)


def edge_opd(log_p: Tensor) -> Tensor:
    supported = at_sampled(FIRST) > at_sampled(LOG_P)
    advantage = at_sampled(FIRST) - LOG_OLD
    return -(advantage * at_sampled(log_p))[supported].sum() / T


FORMULAS: dict[str, Loss] = {
    "rlsd": surrogate(modulated(0.5, towards_teacher(0.2)), high=0.28),
    "rlrt": surrogate(rlrt()),
    "egrsd": surrogate(egrsd(ENTROPY)),
    "cl-egrsd": surrogate(egrsd(least_ahead(4))),
    "antisd": surrogate(antisd()),
    "kepo": kepo,
    "pi-play": pi_play,
    "edge-opd": edge_opd,
}
