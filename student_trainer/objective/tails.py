"""A divergence over a support of token ids, and over a tile of the whole vocabulary.

Shapes: R rows, K support ids, W columns of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.objective.divergences import FDivergence
from student_trainer.objective.settings import Tail

SMALLEST_TAIL = -1e-7  # log of the largest mass a support may hold, so that a bucket is never empty
STOPPED: tuple[Tail, ...] = ("stop_gradient", "stop_gradient_mean")


def truncated(
    row: FDivergence,
    student: Tensor,
    teacher: Tensor,
    present: Tensor,
    *,
    tail: Tail,
    entry_clip: float | None = None,
) -> Tensor:
    """Divergence over a support S, differentiable in `student`.

    Tails, what becomes of the vocabulary outside S:
        raw: nothing; Σ_S alone, whose gradient does not vanish at p = q where f′(1) is not 0.
        stop_gradient: the value of raw with the gradient Σ_S ψ ∇s. For KL(p‖q) this is
            −Σ_S p · (log q − sg log p), Many Faces; for the others the same idea, derived.
        stop_gradient_mean: that divided by sg Σ_S p, the form of thunlp's OPD code.
        renormalise: both sides are normalised over S.
        renormalise_teacher: the teacher gives all its probability to S, the student keeps its own: KL(q̃‖p)
            over the whole vocabulary, because q̃ is zero outside.
        bucket: the outside is one more token on both sides.

    Args:
        student, teacher: [R, K] log-probabilities; finite where `present`.
        present: bool [R, K], at least one id per row.
        entry_clip: bound on each token's share, min(p·f(u), τ); a token at the bound has no gradient.

    Returns:
        [R], nats for the divergences that are in nats.
    """
    s = torch.where(present, student, 0)
    t = torch.where(present, teacher, 0)
    if tail == "renormalise":
        s, t = normalised(s, present), normalised(t, present)
    elif tail == "renormalise_teacher":
        t = normalised(t, present)
    elif tail == "bucket":
        s, t = with_bucket(s, present), with_bucket(t, present)
        present = torch.cat([present, torch.ones_like(present[:, :1])], dim=1)
    fixed = s.detach()
    share, slope = row.share(fixed, t), row.psi(fixed, t)
    if tail not in STOPPED:
        slope = slope - row.slope * fixed.exp()
    if entry_clip is not None:
        slope = slope.masked_fill(share > entry_clip, 0)
        share = share.clamp(max=entry_clip)
    total = torch.where(present, share + slope * (s - fixed), 0).sum(dim=1)
    return total / log_mass(fixed, present).squeeze(1).exp() if tail == "stop_gradient_mean" else total


def dense(row: FDivergence, s: Tensor, t: Tensor, entry_clip: float | None) -> tuple[Tensor, Tensor]:
    """A tile of the full-vocabulary divergence, without autograd.

    Args:
        s, t: [R, W] log-probabilities; `t` is overwritten.
        entry_clip: as in `truncated`.

    Returns:
        the tile's share of the divergence [R], and its derivative by s up to a multiple of p that is
        the same for all columns, [R, W], which may share memory with `t`.
    """
    if entry_clip is not None:
        # The multiple of p is only free when all tokens take part: here it must be the true derivative.
        share, slope = row.share(s, t), row.psi(s, t).sub_(s.exp(), alpha=row.slope)
        slope.masked_fill_(share > entry_clip, 0)
        return share.clamp_(max=entry_clip).sum(dim=1), slope
    if row.tile is not None:
        return row.tile(s, t)
    return row.share(s, t).sum(dim=1), row.psi(s, t)


def normalised(logprobs: Tensor, present: Tensor) -> Tensor:
    """log-probabilities [R, K] that sum to one over the support."""
    return logprobs - log_mass(logprobs, present)


def with_bucket(logprobs: Tensor, present: Tensor) -> Tensor:
    """[R, K + 1]: one more entry, the log of the mass outside the support."""
    inside = log_mass(logprobs, present).clamp(max=SMALLEST_TAIL)
    return torch.cat([logprobs, torch.log(-torch.expm1(inside))], dim=1)


def log_mass(logprobs: Tensor, present: Tensor) -> Tensor:
    """log Σ_S exp, [R, 1]."""
    return torch.logsumexp(logprobs.masked_fill(~present, -torch.inf), dim=1, keepdim=True)


def support_entropy(logprobs: Tensor, present: Tensor) -> Tensor:
    """Entropy of the distribution normalised over its support, [R], nats."""
    inside = normalised(torch.where(present, logprobs, 0), present)
    return -torch.where(present, inside * inside.exp(), 0).sum(dim=1)
