"""What goes into the loss and what comes out of it, as tensors.

Shapes: T packed response positions of a micro-batch, K support ids, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

PAD_ID = -1


@dataclass(frozen=True)
class ViewTensors:
    """The scores of one view. Where the teacher had no score, values are NaN."""

    sampled: Tensor | None = None  # f32 [T], log q of the sampled token
    support_ids: Tensor | None = None  # int64 [T, K], PAD_ID where there is none, no id twice in a row
    support_logprobs: Tensor | None = None  # f32 [T, K]; anything at pads
    entropy: Tensor | None = None  # f32 [T]

    def to(self, device: torch.device | str) -> ViewTensors:
        """The same scores on another device."""
        return ViewTensors(**{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})


@dataclass(frozen=True)
class TokenBatch:
    """T packed response positions; the positions of a sequence are contiguous and in order.

    `weight` already carries the normaliser of the whole optimizer step (see
    `weights.position_weights`), so that the loss is Σ_t weight_t · loss_t.
    """

    sampled_ids: Tensor  # int64 [T]
    behaviour_logprobs: Tensor  # f32 [T], log μ at the sampling temperature
    mask: Tensor  # bool [T], valid and selected
    weight: Tensor  # f32 [T]
    views: Mapping[str, ViewTensors] = field(default_factory=dict)
    reward_advantage: Tensor | None = None  # f32 [T]
    sequence_lengths: Tensor | None = None  # int64 [B], sums to T; needed for what looks along a response
    marked: Tensor | None = None  # bool [T], for tokens.marked_only
    old_logprobs: Tensor | None = None  # f32 [T], log p_old; None: the student as it is now

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        moved = {f.name: _moved(getattr(self, f.name), device) for f in fields(self) if f.name != "views"}
        views = {name: view.to(device) for name, view in self.views.items()}
        return TokenBatch(views=views, **moved)


@dataclass(frozen=True)
class Head:
    """An output head: z = scale · (h Wᵀ + b), then softcap · tanh(z / softcap) where there is one."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class LossOutput:
    """The scalar to differentiate, and detached sums over the positions that were trained on.

    `metrics` are sums (divide by `metrics["positions"]`), so that micro-batches and ranks add up:
    positions, dropped_teacher, dropped_behaviour, dropped_reward, student_logprob, entropy and, as the
    plan has them, advantage, ratio, ratio_clipped, rollout_weight; over the `distilled` positions of a
    pathwise plan divergence, student_mass, teacher_mass; over the `monitored` positions, where views
    carry log q(y), teacher_logprob and sampled_kl (log p(y) − log q(y)).
    `per_token`, when asked for, holds f32 [T] arrays, NaN where a position was not trained on;
    "student_logprob" is always among them.
    """

    loss: Tensor
    metrics: dict[str, float]
    per_token: dict[str, Tensor] | None = None


def _moved(tensor: Any, device: torch.device | str) -> Any:
    return None if tensor is None else tensor.to(device)
