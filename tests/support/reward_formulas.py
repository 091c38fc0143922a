"""The published formula of every preset that mixes distillation with a reward, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from support.preset_formulas import clipped, evidence, jsd, moved, per_response, reverse, with_rest
from support.preset_problem import Formula, Problem


def surrogate(advantage: Callable[[Problem], Tensor], high: float = 0.2) -> Formula:
    return lambda x, log_p: clipped(x, advantage(x), log_p, x.behaviour, high=high).mean()


def towards_teacher(x: Problem, bound: float) -> Tensor:
    """clip((q/μ)^sign A, 1 ± bound), [T]."""
    return (evidence(x) * x.advantage.sign()).exp().clamp(1 - bound, 1 + bound)


def rlsd(x: Problem) -> Tensor:
    return x.advantage * (0.5 + 0.5 * towards_teacher(x, 0.2))


def rlrt(x: Problem) -> Tensor:
    away = (-evidence(x)).exp().clamp(0, 2)
    return torch.where(x.advantage > 0, x.advantage * (0.5 + 0.5 * away), x.advantage)


def cepo(x: Problem) -> Tensor:
    apart = (x.of(x.first) - x.of(x.second)) * x.advantage.sign()
    return x.advantage * (0.5 + 0.5 * apart.exp().clamp(0.8, 1.2))


def entropy(x: Problem) -> Tensor:
    return -(x.first.exp() * x.first).sum(-1)


def least_ahead(x: Problem, window: int) -> Tensor:
    """The least entropy of a token and the next ones of its response, [T]."""
    rows = entropy(x).split(x.lengths.tolist())
    return torch.stack([row[t : t + window + 1].min() for row in rows for t in range(len(row))])


def egrsd(unsure: Callable[[Problem], Tensor]) -> Callable[[Problem], Tensor]:
    def advantage(x: Problem) -> Tensor:
        sure = (1 - unsure(x) / math.log(x.first.shape[1])).clamp(0.1, 1)
        return x.advantage * towards_teacher(x, 0.2) * sure

    return advantage


def antisd(x: Problem) -> Tensor:
    return x.advantage - 0.5 * (softplus(evidence(x)) - math.log(2)) / 2


def kepo(x: Problem, log_p: Tensor) -> Tensor:
    ids = x.top(x.first)
    distance = jsd(with_rest(log_p, ids), with_rest(x.first, ids))
    paid = clipped(x, x.advantage, log_p, x.behaviour)
    return per_response(x, paid + torch.where(x.paid > 0.5, distance, 0))


def pi_play(x: Problem, log_p: Tensor) -> Tensor:
    return per_response(x, clipped(x, x.advantage, log_p, x.behaviour) + reverse(x, log_p))


def edge_opd(x: Problem, log_p: Tensor) -> Tensor:
    supported = x.of(x.first) > x.of(x.student)
    learns = moved(x, x.behaviour, 2.0) * (1 + x.of(log_p) - x.of(x.student))
    return -torch.where(supported, (x.of(x.first) - x.old) * learns, 0).mean()


FORMULAS: dict[str, Formula] = {
    "rlsd": surrogate(rlsd, high=0.28),
    "rlrt": surrogate(rlrt),
    "cepo": surrogate(cepo, high=0.28),
    "egrsd": surrogate(egrsd(entropy)),
    "cl-egrsd": surrogate(egrsd(lambda x: least_ahead(x, 4))),
    "antisd": surrogate(antisd),
    "kepo": kepo,
    "pi-play": pi_play,
    "edge-opd": edge_opd,
}
