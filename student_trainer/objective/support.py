"""Sets of token ids per position: the union of two, and what a set must satisfy."""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.objective.batch import PAD_ID


def union(ids: Tensor, logprobs: Tensor, more_ids: Tensor, more_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Join two scored supports; an id in both is kept once.

    Args:
        ids, more_ids: int64 [T, K], [T, C], PAD_ID where there is none.
        logprobs, more_logprobs: [T, K], [T, C], scored by the same view.

    Returns:
        int64 and float [T, K + C]; a repeated id is replaced by PAD_ID.
    """
    joined = torch.cat([ids, more_ids], dim=1)
    scores = torch.cat([logprobs, more_logprobs], dim=1)
    order = joined.sort(dim=1, stable=True)
    repeated = torch.zeros_like(joined, dtype=torch.bool)
    repeated[:, 1:] = (order.values[:, 1:] == order.values[:, :-1]) & (order.values[:, 1:] != PAD_ID)
    repeated = torch.empty_like(repeated).scatter_(1, order.indices, repeated)
    return joined.masked_fill(repeated, PAD_ID), scores


def check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    """Raise ValueError where an id is outside [0, vocabulary); PAD_ID is allowed in a support."""
    lowest = PAD_ID if ids.dim() == 2 else 0
    outside = (ids < lowest) | (ids >= vocabulary)
    if bool(outside.any()):
        raise ValueError(
            f"{name}: got id {int(ids[outside][0])}, allowed: {lowest} to {vocabulary - 1} "
            f"(the student's head has {vocabulary} rows)"
        )


def check_distinct(name: str, ids: Tensor) -> None:
    """Raise ValueError where a position names an id twice: its probability would count twice."""
    ordered = ids.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PAD_ID)
    if bool(repeated.any()):
        position, column = (int(i) for i in repeated.nonzero()[0])
        raise ValueError(f"{name}: id {int(ordered[position, column])} appears twice at position {position}")
