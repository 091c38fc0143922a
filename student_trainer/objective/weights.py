"""Which positions count, and how much: selection masks, gates, factors and the normaliser of the sum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from student_trainer.objective.batch import ViewTensors
from student_trainer.objective.settings import GateSettings, Normalisation, TokenSettings

DEFAULT_WARMUP_STEPS = 5


def position_in_sequence(sequence_lengths: Tensor) -> Tensor:
    """int64 [B] lengths → int64 [T]: each packed position's index in its own response."""
    starts = torch.cumsum(sequence_lengths, 0) - sequence_lengths
    total = int(sequence_lengths.sum())
    device = sequence_lengths.device
    return torch.arange(total, device=device) - torch.repeat_interleave(starts, sequence_lengths)


def token_mask(tokens: TokenSettings, sequence_lengths: Tensor, sampled_ids: Tensor) -> Tensor:
    """bool [T]: the positions that the settings select by place and token. Other gates act in the loss."""
    place = position_in_sequence(sequence_lengths)
    selected = place >= tokens.skip_first_n
    if tokens.keep_first_n is not None:
        selected &= place < tokens.keep_first_n
    if tokens.skip_ids:
        skipped = torch.tensor(tokens.skip_ids, dtype=sampled_ids.dtype, device=sampled_ids.device)
        selected &= ~torch.isin(sampled_ids, skipped)
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


def reward_gate(tokens: TokenSettings, rewards: Tensor) -> Tensor:
    """bool [T]: positions of responses whose reward lies in the asked range; unknown rewards do not."""
    gate = torch.isfinite(rewards)
    if tokens.reward_above is not None:
        gate &= rewards > tokens.reward_above
    if tokens.reward_below is not None:
        gate &= rewards < tokens.reward_below
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


def top_rows(scores: Tensor, fraction: float) -> Tensor:
    """int64 [M], in order: the first ⌈fraction · N⌉ rows by score; one that is not a number comes first."""
    count = min(len(scores), math.ceil(fraction * len(scores)))
    return scores.nan_to_num(math.inf).topk(count).indices.sort().values


def prefix_weight(strength: float, advantage: Tensor, sequence_lengths: Tensor) -> Tensor:
    """[T]: 1 + strength · (1 − Σ_{j ≤ t}|A_j| / Σ|A|) within each sequence (IW-OPD); A is 0 where unknown."""
    size = advantage.abs()
    ends = torch.cumsum(sequence_lengths, 0)
    running = torch.cumsum(size, 0)
    total = torch.cat([running.new_zeros(1), running])
    start = torch.repeat_interleave(total[ends - sequence_lengths], sequence_lengths)
    whole = torch.repeat_interleave(total[ends], sequence_lengths) - start
    done = torch.where(whole > 0, (running - start) / whole.clamp_min(1e-30), 1)
    return 1 + strength * (1 - done)


def least_entropy_ahead(entropy: Tensor, sequence_lengths: Tensor, window: int) -> Tensor:
    """[T]: the least entropy of a position and the next `window` ones of its sequence; NaN is passed over."""
    known = torch.nan_to_num(entropy, math.inf, math.inf, math.inf)
    left = torch.repeat_interleave(sequence_lengths, sequence_lengths) - position_in_sequence(
        sequence_lengths
    )
    least = known.clone()
    for ahead in range(1, min(window, len(entropy) - 1) + 1):
        later = torch.cat([known[ahead:], known.new_full((ahead,), math.inf)])
        least = torch.where(left > ahead, torch.minimum(least, later), least)
    return least


@dataclass(frozen=True)
class HysteresisGate:
    """Whether distillation acts, as a value its owner keeps between steps (AntiSD).

    It opens at a mean entropy of `entropy_on`, closes below `off_fraction` of it, and stays as it is
    in between. Without `entropy_on` that level is the mean over the first `warmup_steps` steps, through
    which the gate is closed and after which it opens.

    Attributes:
        warmed: steps that the level was taken from so far.
        level: their mean entropy, nats.
    """

    settings: GateSettings
    open: bool = False
    warmed: int = 0
    level: float = 0.0

    @property
    def state(self) -> dict[str, Any]:
        """Everything but the settings, as JSON can say it: HysteresisGate(settings, **state) is the gate."""
        return {"open": self.open, "warmed": self.warmed, "level": self.level}

    def after(self, entropy: float) -> HysteresisGate:
        """The gate once a step's mean entropy (nats) is known; NaN changes nothing."""
        if math.isnan(entropy):
            return self
        level, steps = self.settings.entropy_on, self.settings.warmup_steps or DEFAULT_WARMUP_STEPS
        if level is None:
            if self.warmed < steps:
                warmed = self.warmed + 1
                mean = self.level + (entropy - self.level) / warmed
                return replace(self, open=warmed == steps, warmed=warmed, level=mean)
            level = self.level
        if entropy >= level:
            return replace(self, open=True)
        return replace(self, open=False) if entropy < self.settings.off_fraction * level else self
