"""What goes into the loss and what comes out of it, as tensors.

Shapes: T packed response positions of a micro-batch, K support ids, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    hidden: Tensor | None = None  # f16 [T, L, H], unit vectors of the plan's layers

    def changed(self, change: Callable[[Tensor], Tensor]) -> ViewTensors:
        """The same scores with `change` made to every tensor."""
        return ViewTensors(**{f.name: _changed(getattr(self, f.name), change) for f in fields(self)})


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
    view_factors: Mapping[str, Tensor] = field(default_factory=dict)  # f32 [T] by view with a weight_field
    reward_advantage: Tensor | None = None  # f32 [T]
    sequence_lengths: Tensor | None = None  # int64 [B], sums to T; needed for what looks along a response
    marked: Tensor | None = None  # bool [T], for tokens.marked_only
    old_logprobs: Tensor | None = None  # f32 [T], log p_old; None: the student as it is now
    auxiliary_index: Tensor | None = None  # int64 [A], positions that are also computed under another context
    groups: Tensor | None = None  # int64 [B], the response's group, counted from 0; for preferences
    guided: Tensor | None = None  # bool [B], sampled under [sampling] context; likewise
    rewards: Tensor | None = None  # f32 [T], of the response as it was paid, NaN without; for reward gates
    audit_anchor: Tensor | None = None  # int64 [T], first position of its audited chunk; −1: in no chunk
    agreement: Tensor | None = None  # f32 [T], of that chunk, NaN where the writer said nothing

    def changed(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        """The same batch with `change` made to every tensor."""
        return TokenBatch(**{f.name: _changed(getattr(self, f.name), change) for f in fields(self)})

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        return self.changed(lambda tensor: tensor.to(device))


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
    plan has them, groups_unpaired, pairs and over these preference_margin and preference_accuracy; as the
    plan has them, dropped_evidence, gated_reward, advantage, ratio, ratio_clipped, rollout_weight; with an
    audit dropped_audit, and over the `audited` positions agreement and audit_weight; over the
    `entropy_known` positions, where views carry an entropy, teacher_entropy; over the `distilled`
    positions of a pathwise plan divergence, student_mass, teacher_mass; over the `monitored` positions,
    where views carry log q(y), teacher_logprob and sampled_kl (log p(y) − log q(y)).
    `per_token`, when asked for, holds f32 [T] arrays, NaN where a position was not trained on;
    "student_logprob" is always among them.
    """

    loss: Tensor
    metrics: dict[str, float]
    per_token: dict[str, Tensor] | None = None


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: _changed(item, change) for name, item in value.items()}
    return value.changed(change) if isinstance(value, ViewTensors) else change(value)
