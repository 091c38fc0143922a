"""Which positions count, and how much: selection masks, gates and the normaliser of the sum."""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.objective.batch import ViewTensors
from student_trainer.objective.settings import Normalisation, TokenSettings


def position_in_sequence(sequence_lengths: Tensor) -> Tensor:
    """int64 [B] lengths → int64 [T]: each packed position's index in its own response."""
    starts = torch.cumsum(sequence_lengths, 0) - sequence_lengths
    total = int(sequence_lengths.sum())
    device = sequence_lengths.device
    return torch.arange(total, device=device) - torch.repeat_interleave(starts, sequence_lengths)


def token_mask(tokens: TokenSettings, sequence_lengths: Tensor) -> Tensor:
    """bool [T]: the positions that the settings select by place. Entropy gates act in the loss."""
    place = position_in_sequence(sequence_lengths)
    selected = place >= tokens.skip_first_n
    if tokens.keep_first_n is not None:
        selected &= place < tokens.keep_first_n
    return selected


def entropy_gate(tokens: TokenSettings, view: ViewTensors) -> Tensor | None:
    """bool [T]: positions whose teacher entropy (nats) lies in the asked range; None without a gate.

    A position without a finite entropy is closed.
    """
    if tokens.teacher_entropy_above is None and tokens.teacher_entropy_below is None:
        return None
    if view.entropy is None:
        raise ValueError("views: an entropy gate is set, but the view carries no entropy")
    gate = torch.isfinite(view.entropy)
    if tokens.teacher_entropy_above is not None:
        gate &= view.entropy > tokens.teacher_entropy_above
    if tokens.teacher_entropy_below is not None:
        gate &= view.entropy < tokens.teacher_entropy_below
    return gate


def position_weights(
    mask: Tensor,
    sequence_lengths: Tensor,
    normalisation: Normalisation,
    *,
    total_tokens: int,
    total_sequences: int,
) -> Tensor:
    """f32 [T] weights with which Σ_t weight_t · loss_t is the mean over a whole optimizer step.

    Args:
        mask: bool [T] of this micro-batch.
        sequence_lengths: int64 [B] of this micro-batch.
        normalisation: "token_mean" (every selected token alike) or "sequence_mean" (every sequence
            alike, its selected tokens sharing its weight).
        total_tokens, total_sequences: selected tokens, and sequences with at least one of them, over
            all micro-batches and ranks of the step; must be positive.
    """
    if normalisation == "token_mean":
        return mask.to(torch.float32) / total_tokens
    owner = torch.repeat_interleave(
        torch.arange(len(sequence_lengths), device=mask.device), sequence_lengths.to(mask.device)
    )
    selected = torch.zeros(len(sequence_lengths), device=mask.device).index_add_(
        0, owner, mask.to(torch.float32)
    )
    return mask.to(torch.float32) / selected[owner].clamp_min(1) / total_sequences
