"""f-divergences between student p and teacher q, D_f(q‖p) = E_p f(u) with u = q/p, as rows of one table.

A row knows four functions of one token. With s = log p and t = log q: its share p·f(u) of the divergence;
ψ, the derivative by s; the weight w with which the score function ∇log p enters; and f itself. They are
one thing: w_f = −f + u·f′ (OPD+) and ∂(p·f)/∂s = −p·w_f. Because Σ_V p ∇s = 0 and E_p ∇log p = 0, a
constant may be added to w_f; everything here is centred, w = w_f(u) − w_f(1) and ψ = −p·w, so that a token
on which both agree weighs nothing. Centring is the same as extending the divergence to measures that
need not sum to one by f̃ = f − f′(1)·(u − 1), for example Σ p log(p/q) − p + q.

Sources: GKD (Agarwal et al., 2024, equation 1) for the generalised Jensen–Shannon divergence; Cressie and
Read (1984) for the power family, of which both χ² and the Hellinger distance are members.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from student_trainer.objective.settings import Divergence

MAX_LOG_RATIO = 20.0

_OfPair: TypeAlias = Callable[[Tensor, Tensor], Tensor]
_OfRatio: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class FDivergence:
    """One row; every function works element by element.

    Attributes:
        share: (s, t) → p·f(u).
        psi: (s, t) → −p·w, zero where s = t.
        weight: log u → w = w_f(u) − w_f(1).
        cost: log u → f(u); ratios above e^20 are cut there.
        slope: f′(1), so that ∂ share/∂s = ψ − slope·p.
        tile: (s, t) → the share summed over a row, and ψ, in few temporaries; overwrites t. None: made
            of `share` and `psi`.
    """

    share: _OfPair
    psi: _OfPair
    weight: _OfRatio
    cost: _OfRatio
    slope: float = 0.0
    tile: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def f_divergence(name: Divergence, beta: float, alpha: float) -> FDivergence:
    """The row of a divergence; `beta` acts on "jsd" only, `alpha` on "alpha" only."""
    if name == "jsd":
        return _jsd(beta)
    if name == "alpha":
        return _power(alpha)
    return _ROWS[name]


def _kl_student_teacher_tile(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    psi = torch.sub(s, t, out=t).mul_(s.exp())
    return psi.sum(dim=1), psi


def _kl_teacher_student_tile(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    q = t.exp()
    share = t.sub_(s).mul_(q).sum(dim=1)
    return share, torch.exp(s, out=t).sub_(q)


def _ratio(log_u: Tensor) -> Tensor:
    return log_u.clamp(max=MAX_LOG_RATIO).exp()


def _jsd(beta: float) -> FDivergence:
    """β·KL(q‖M) + (1 − β)·KL(p‖M), M = βq + (1 − β)p: f = βu·log u − m·log m with m = βu + 1 − β."""

    def mixture(s: Tensor, t: Tensor) -> Tensor:
        return torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))

    def share(s: Tensor, t: Tensor) -> Tensor:
        log_m = mixture(s, t)
        return beta * t.exp() * (t - log_m) + (1 - beta) * s.exp() * (s - log_m)

    def cost(log_u: Tensor) -> Tensor:
        log_u = log_u.clamp(max=MAX_LOG_RATIO)
        u = log_u.exp()
        log_m = torch.log(beta * u + 1 - beta)
        return beta * u * (log_u - log_m) - (1 - beta) * log_m

    def tile(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_m = mixture(s, t)
        q = t.exp()
        from_q = beta * t.sub_(log_m).mul_(q).sum(dim=1)
        psi = torch.sub(s, log_m, out=t).mul_(torch.exp(s, out=q)).mul_(1 - beta)
        return from_q + psi.sum(dim=1), psi

    return FDivergence(
        share=share,
        psi=lambda s, t: (1 - beta) * s.exp() * (s - mixture(s, t)),
        weight=lambda log_u: (1 - beta) * torch.log(beta * _ratio(log_u) + 1 - beta),
        cost=cost,
        tile=tile,
    )


def _power(alpha: float, scale: float = 1.0) -> FDivergence:
    """scale · (Σ q^α p^(1−α) − 1) / (α(α − 1)), centred: f = (u^α − 1 − α(u − 1)) / (α(α − 1)).

    α in (0, 1) is bounded. Otherwise u^α runs away, so f goes on as a straight line where u leaves
    [e^−20, e^20]: still an f-divergence, with w constant out there.
    """
    bounded = 0 < alpha < 1
    factor = scale / (alpha * (alpha - 1))

    def held(log_u: Tensor) -> Tensor:
        return log_u.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def cost(log_u: Tensor) -> Tensor:
        log_u = held(log_u)
        return factor * (torch.expm1(alpha * log_u) - alpha * torch.expm1(log_u))

    def share(s: Tensor, t: Tensor) -> Tensor:
        p, q = s.exp(), t.exp()
        if bounded:
            return factor * (torch.exp(alpha * t + (1 - alpha) * s) - p - alpha * (q - p))
        log_u = held(t - s)
        slope = factor * alpha * torch.expm1((alpha - 1) * log_u)
        return p * cost(log_u) + slope * (q - torch.exp(s + log_u))

    def psi(s: Tensor, t: Tensor) -> Tensor:
        if bounded:
            return scale / alpha * (s.exp() - torch.exp(alpha * t + (1 - alpha) * s))
        return -scale / alpha * s.exp() * torch.expm1(alpha * held(t - s))

    return FDivergence(
        share=share,
        psi=psi,
        weight=lambda log_u: scale / alpha * torch.expm1(alpha * held(log_u)),
        cost=cost,
    )


_ROWS: dict[Divergence, FDivergence] = {
    "kl_student_teacher": FDivergence(  # f = −log u, w_f = log u − 1
        share=lambda s, t: s.exp() * (s - t),
        psi=lambda s, t: s.exp() * (s - t),
        weight=lambda log_u: log_u,
        cost=lambda log_u: -log_u,
        slope=-1.0,
        tile=_kl_student_teacher_tile,
    ),
    "kl_teacher_student": FDivergence(  # f = u·log u, w_f = u
        share=lambda s, t: t.exp() * (t - s),
        psi=lambda s, t: s.exp() - t.exp(),
        weight=lambda log_u: _ratio(log_u) - 1,
        cost=lambda log_u: _ratio(log_u) * log_u.clamp(max=MAX_LOG_RATIO),
        slope=1.0,
        tile=_kl_teacher_student_tile,
    ),
    "jeffreys": FDivergence(  # KL(p‖q) + KL(q‖p): f = (u − 1)·log u, w_f = log u + u − 1
        share=lambda s, t: (s.exp() - t.exp()) * (s - t),
        psi=lambda s, t: s.exp() * (s - t) + s.exp() - t.exp(),
        weight=lambda log_u: log_u + _ratio(log_u) - 1,
        cost=lambda log_u: (_ratio(log_u) - 1) * log_u.clamp(max=MAX_LOG_RATIO),
    ),
    "total_variation": FDivergence(  # ½·Σ|p − q|: f = ½|u − 1|, w_f = ½·sign(u − 1)
        share=lambda s, t: 0.5 * (s.exp() - t.exp()).abs(),
        psi=lambda s, t: 0.5 * s.exp() * torch.sign(s - t),
        weight=lambda log_u: 0.5 * torch.sign(log_u),
        cost=lambda log_u: 0.5 * (_ratio(log_u) - 1).abs(),
    ),
    "hellinger": _power(0.5, 0.25),  # ½·Σ(√p − √q)²
    "chi_square_teacher_student": _power(2.0, 2.0),  # Σ(q − p)²/p
    "chi_square_student_teacher": _power(-1.0, 2.0),  # Σ(p − q)²/q
}
