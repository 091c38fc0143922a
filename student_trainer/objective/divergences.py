"""Divergences between student p and teacher q, over a truncated support or the whole vocabulary.

Both are written for log-probabilities s = log p and t = log q. Sources: GKD (Agarwal et al., 2024,
equation 1) for the generalised Jensen–Shannon divergence; the tails are described in `truncated`.
Because Σ_V p ∇s = 0, any multiple of p may be added to the derivative ∂/∂s of a full divergence. The
choice made here, ψ, vanishes where p = q; it is the derivative of the divergence extended to
unnormalised measures, Σ p log(p/q) − p + q.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student_trainer.objective.settings import Divergence, Tail

SMALLEST_TAIL = -1e-7  # log of the largest mass a support may hold, so that a bucket is never empty


def truncated(
    divergence: Divergence, beta: float, student: Tensor, teacher: Tensor, present: Tensor, *, tail: Tail
) -> Tensor:
    """Divergence over a support S, differentiable in `student`.

    Tails, what becomes of the vocabulary outside S:
        raw: nothing; Σ_S alone, whose gradient does not vanish at p = q for the two KLs.
        stop_gradient: the value of raw with the gradient Σ_S ψ ∇s. For KL(p‖q) this is
            −Σ_S p · (log q − sg log p), Many Faces; for the others the same idea, derived.
        renormalise: both sides are normalised over S.
        bucket: the outside is one more token on both sides.

    Args:
        student, teacher: [R, K] log-probabilities; finite where `present`.
        present: bool [R, K], at least one id per row.

    Returns:
        [R], nats.
    """
    s = torch.where(present, student, 0)
    t = torch.where(present, teacher, 0)
    if tail == "renormalise":
        s = s - _log_mass(s, present)
        t = t - _log_mass(t, present)
    elif tail == "bucket":
        s = torch.cat([s, _outside(s, present)], dim=1)
        t = torch.cat([t, _outside(t, present)], dim=1)
        present = torch.cat([present, torch.ones_like(present[:, :1])], dim=1)
    terms = _terms(divergence, beta, s, t)
    if tail == "stop_gradient":
        terms = terms.detach() + derivative(divergence, beta, s.detach(), t) * (s - s.detach())
    return torch.where(present, terms, 0).sum(dim=1)


def derivative(divergence: Divergence, beta: float, s: Tensor, t: Tensor) -> Tensor:
    """ψ, element by element: the derivative by s up to a multiple of p, zero where s = t."""
    if divergence == "kl_student_teacher":
        return s.exp() * (s - t)
    if divergence == "kl_teacher_student":
        return s.exp() - t.exp()
    return (1 - beta) * s.exp() * (s - _log_mixture(beta, s, t))


def dense(divergence: Divergence, beta: float, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A tile of the full-vocabulary divergence, without autograd and with few temporaries.

    Args:
        s, t: [R, W] log-probabilities; `t` is overwritten.

    Returns:
        the tile's share of the divergence [R], and ψ [R, W], which may share memory with `t`.
    """
    if divergence == "kl_student_teacher":
        psi = torch.sub(s, t, out=t).mul_(s.exp())
        return psi.sum(dim=1), psi
    if divergence == "kl_teacher_student":
        q = t.exp()
        share = t.sub_(s).mul_(q).sum(dim=1)
        return share, torch.exp(s, out=t).sub_(q)
    mixture = _log_mixture(beta, s, t)
    q = t.exp()
    share = beta * t.sub_(mixture).mul_(q).sum(dim=1)
    psi = torch.sub(s, mixture, out=t).mul_(torch.exp(s, out=q)).mul_(1 - beta)
    return share + psi.sum(dim=1), psi


def _terms(divergence: Divergence, beta: float, s: Tensor, t: Tensor) -> Tensor:
    if divergence == "kl_student_teacher":
        return s.exp() * (s - t)
    if divergence == "kl_teacher_student":
        return t.exp() * (t - s)
    mixture = _log_mixture(beta, s, t)
    return beta * t.exp() * (t - mixture) + (1 - beta) * s.exp() * (s - mixture)


def _log_mixture(beta: float, s: Tensor, t: Tensor) -> Tensor:
    """log(β q + (1 − β) p)."""
    return torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))


def _log_mass(logprobs: Tensor, present: Tensor) -> Tensor:
    return torch.logsumexp(logprobs.masked_fill(~present, -torch.inf), dim=1, keepdim=True)


def _outside(logprobs: Tensor, present: Tensor) -> Tensor:
    """log of the mass outside the support, [R, 1]."""
    inside = _log_mass(logprobs, present).clamp(max=SMALLEST_TAIL)
    return torch.log(-torch.expm1(inside))
