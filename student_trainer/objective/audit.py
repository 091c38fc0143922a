"""Audited chunks: what a writer's agreement with a piece of the student's text makes of its tokens (OmniOPD).

Shapes: T packed response positions; F chunks of C positions each, which do not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.objective.batch import TokenBatch
from student_trainer.objective.extension_settings import AuditSettings

LEAST = torch.finfo(torch.float64).tiny  # a weight of 0 would send an audited position to the divergence


@dataclass(frozen=True)
class Audit:
    """What the audit says of each position.

    Attributes:
        chunk: bool [T], positions of an audited chunk, whatever came of it.
        known: bool [T], those of them whose chunk has a weight.
        weight: f64 [T], π̂ of the position's chunk, above 0; 0 where there is none.
        agreement: f64 [T], k̄ of the position's chunk; 0 where there is none.
    """

    chunk: Tensor
    known: Tensor
    weight: Tensor
    agreement: Tensor

    def sums(self, kept: Tensor) -> dict[str, Tensor]:
        """Metrics over the audited positions among `kept`, bool [T]."""
        audited = kept & self.known
        return {
            "audited": audited.sum().to(torch.float64),
            "agreement": self.agreement[audited].sum(),
            "audit_weight": self.weight[audited].sum(),
        }


def read_audit(settings: AuditSettings, batch: TokenBatch) -> Audit:
    """π̂ = (N·k̄ + α·π̄)/(N + α) of every chunk, held fixed (Zhou et al., 2026, arXiv:2606.01476).

    k̄ is the writer's agreement, of N continuations; π̄ = exp(mean over the chunk of log p(y_t)), p the student
    as the step starts: the mean of a Dirichlet's posterior whose prior mean, of α continuations' worth, is
    what the student itself makes of its text. A chunk without an answer, or with a position outside the
    batch's mask, has none.

    Raises:
        ValueError: a field is missing, or points outside the batch.
    """
    anchor, agreement, own = batch.audit_anchor, batch.agreement, batch.old_logprobs
    if anchor is None or agreement is None or own is None:
        raise ValueError("batch.audit_anchor, agreement and old_logprobs: the plan has objective.audit")
    positions = len(anchor)
    if bool(((anchor < -1) | (anchor > torch.arange(positions, device=anchor.device))).any()):
        raise ValueError("batch.audit_anchor: a chunk begins after one of its positions, or is no chunk")
    chunk = anchor >= 0
    heard = chunk & batch.mask & torch.isfinite(own) & torch.isfinite(agreement)
    owner = anchor.clamp(min=0)

    def over_chunk(values: Tensor) -> Tensor:
        """Sum over each chunk, at its positions, f64 [T]."""
        sums = torch.zeros(positions, dtype=torch.float64, device=anchor.device)
        return sums.index_add(0, owner, torch.where(chunk, values.double(), 0.0))[owner]

    size = over_chunk(chunk)
    known = chunk & (over_chunk(heard) == size)
    mean = over_chunk(torch.where(heard, own, 0.0)) / size.clamp(min=1)
    k = torch.where(known, agreement.double(), 0.0)
    count, prior = settings.continuations, settings.prior
    weight = ((count * k + prior * mean.exp()) / (count + prior)).clamp(min=LEAST)
    return Audit(chunk, known, torch.where(known, weight, 0.0).detach(), k)
