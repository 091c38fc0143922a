"""Preference-based self-distillation (PBSD): a group's guided responses are preferred to its own ones.

Shapes: T packed positions, B responses, G groups of the micro-batch, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from student_trainer.objective.batch import TokenBatch
from student_trainer.objective.plan import Plan


@dataclass(frozen=True)
class Pairs:
    """What the pairs of a micro-batch come to; nothing here is differentiable.

    Attributes:
        trained: bool [T], positions of responses that are in a pair.
        advantage: f64 [T], of every position of a response, so that −Σ_t weight_t · A_t · ∇log p(y_t) is the
            gradient of `loss`; 0 where not trained.
        loss: f64 [], Σ over groups of weight · mean over the group's pairs of −log σ(m).
        sums: metrics: over `pairs` pairs preference_margin and preference_accuracy (m > 0), and how many
            groups have none, groups_unpaired.
    """

    trained: Tensor
    advantage: Tensor
    loss: Tensor
    sums: dict[str, Tensor]


def paired_positions(
    selected: Tensor, usable: Tensor, sequence_lengths: Tensor, groups: Tensor, guided: Tensor
) -> Tensor:
    """bool [T]: the selected positions of responses that are in a pair.

    A response of which a selected position is not usable is in none: part of its log-probability is no
    log-probability of it. A group left with responses of one kind has no pair.

    Args:
        selected, usable: bool [T].
        sequence_lengths, groups: int64 [B]; `groups` counts from 0.
        guided: bool [B].
    """
    owner = _owner(sequence_lengths)
    broken = _count(selected & ~usable, owner, len(sequence_lengths))
    whole = (broken == 0) & (_count(selected, owner, len(sequence_lengths)) > 0)
    size = _groups(groups)
    both = (_count(whole & guided, groups, size) > 0) & (_count(whole & ~guided, groups, size) > 0)
    return selected & (whole & both[groups])[owner]


def paired_groups(mask: Tensor, sequence_lengths: Tensor, groups: Tensor) -> int:
    """Groups of which a position is trained on; `mask` as `paired_positions` gives it."""
    return len(torch.unique(groups[_owner(sequence_lengths)[mask]]))


def read_pairs(plan: Plan, batch: TokenBatch) -> Pairs:
    """The pairs of every group: each guided response (y⁺) with each of the student's own (y⁻).

    m = β · [(log p(y⁺) − log q(y⁺)) − (log p(y⁻) − log q(y⁻))], sums over the selected positions of a
    response, p the student as it is (`batch.old_logprobs`), q the only view. The derivative of the group's
    mean of −log σ(m) by log p(y⁺) is −β · mean σ(−m), and by log p(y⁻) its opposite.

    Raises:
        ValueError: the batch says not what the pairs are, or weighs the positions of one group differently.
    """
    assert plan.preference is not None
    assert batch.old_logprobs is not None
    groups, guided, lengths = _known(batch)
    (view,) = batch.views.values()
    assert view.sampled is not None
    apart = batch.old_logprobs.double() - view.sampled.double()
    trained = paired_positions(batch.mask, torch.isfinite(apart), lengths, groups, guided)
    owner, scale = _owner(lengths), plan.preference.scale
    log_ratio = torch.zeros(len(lengths), dtype=torch.float64, device=apart.device)
    log_ratio.index_add_(0, owner[trained], apart[trained])
    inside = _count(trained, owner, len(lengths)) > 0
    preferred, other = torch.nonzero(
        (inside & guided)[:, None] & (inside & ~guided)[None, :] & (groups[:, None] == groups[None, :]),
        as_tuple=True,
    )
    margin = scale * (log_ratio[preferred] - log_ratio[other])
    group = groups[preferred]
    share = 1 / _count(torch.ones_like(group), group, _groups(groups)).clamp(min=1).double()[group]
    pull = scale * share * torch.sigmoid(-margin)
    learn = torch.zeros_like(log_ratio).index_add_(0, preferred, pull).index_add_(0, other, -pull)
    weight = _group_weights(batch.weight.double(), trained, groups[owner], _groups(groups))
    sums = {
        "pairs": torch.tensor(float(len(margin)), dtype=torch.float64),
        "preference_margin": margin.sum(),
        "preference_accuracy": (margin > 0).sum().double(),
        "groups_unpaired": (len(torch.unique(groups)) - len(torch.unique(group))) * torch.ones(()),
    }
    return Pairs(
        trained=trained,
        advantage=torch.where(trained, learn[owner], 0),
        loss=(weight[group] * share * softplus(-margin)).sum(),
        sums={name: value.double().to(apart.device) for name, value in sums.items()},
    )


def _known(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    found = {name: getattr(batch, name) for name in ("groups", "guided", "sequence_lengths")}
    for name, tensor in found.items():
        if tensor is None:
            raise ValueError(f"batch.{name}: missing, and the plan has a preference")
    groups, guided, lengths = found.values()
    if not len(groups) == len(guided) == len(lengths) or int(lengths.sum()) != len(batch.mask):
        raise ValueError(
            f"batch.groups, guided: got {len(groups)} and {len(guided)}, allowed: one for each of the "
            f"{len(lengths)} responses, whose lengths sum to {len(batch.mask)}"
        )
    return groups, guided, lengths


def _group_weights(weight: Tensor, trained: Tensor, group: Tensor, size: int) -> Tensor:
    """f64 [G]: the weight that all trained positions of a group have."""
    none = torch.zeros(size, dtype=torch.float64, device=weight.device)
    least, most = (
        none.scatter_reduce(0, group[trained], weight[trained], how, include_self=False)
        for how in ("amin", "amax")
    )
    if bool((least != most).any()):
        raise ValueError("batch.weight: differs within a group, whose pairs have one weight")
    return most


def _owner(sequence_lengths: Tensor) -> Tensor:
    """int64 [T]: which response a position is of."""
    numbers = torch.arange(len(sequence_lengths), device=sequence_lengths.device)
    return torch.repeat_interleave(numbers, sequence_lengths)


def _groups(groups: Tensor) -> int:
    return int(groups.max()) + 1 if len(groups) else 0


def _count(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """int64 [size]: Σ of `values` by owner."""
    return torch.zeros(size, dtype=torch.int64, device=owner.device).index_add_(0, owner, values.long())
