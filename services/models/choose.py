"""One token per row from next-token logits: sampled or greedy, with its exact log-probability.

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tutelage_client.errors import TutelageError

# Rows are taken in blocks of about this many logits, which bounds the float64 sums (32 MB).
_BLOCK_ELEMENTS = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for each row."""

    ids: Tensor  # int64 [B]
    logprobs: Tensor  # float32 [B], at the sampling temperature (at 1 when greedy)
    candidate_ids: Tensor | None  # int32 [B, K], most probable first


def choose(logits: Tensor, uniforms: Tensor, *, temperature: float, candidates: int = 0) -> Choice:
    """Inverse-CDF sampling: the token whose slice of the cumulative distribution holds the uniform.

    Args:
        logits: float [B, V].
        uniforms: float64 [B] in [0, 1), one per row.
        temperature: 0 takes the most probable token, its log-probability at temperature 1.
        candidates: K, ids of the K largest logits; 0 for none.

    Raises:
        TutelageError: INTERNAL when a row's logits hold NaN or +inf.
    """
    rows = max(1, _BLOCK_ELEMENTS // logits.shape[1])
    blocks = [
        _choose_block(block, draw, temperature, candidates)
        for block, draw in zip(torch.split(logits, rows), torch.split(uniforms, rows), strict=True)
    ]
    choice = blocks[0] if len(blocks) == 1 else _concatenate(blocks)
    if not bool(torch.isfinite(choice.logprobs).all()):
        raise TutelageError("INTERNAL", "the sampling model's logits are not finite (NaN or +inf)")
    return choice


def _choose_block(logits: Tensor, uniforms: Tensor, temperature: float, candidates: int) -> Choice:
    scaled = logits.float()
    if temperature not in (0.0, 1.0):
        scaled = scaled / temperature
    maximum, most_probable = scaled.max(dim=-1, keepdim=True)
    weights = torch.exp(scaled - maximum)
    if temperature == 0.0:
        total = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
        ids = most_probable
    else:
        # In float64: with a vocabulary of 150k a float32 running sum loses whole tokens.
        cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
        total = cumulative[:, -1:].contiguous()
        # right=True never returns a token of zero weight: its slice is empty.
        ids = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
        ids = ids.clamp_(max=logits.shape[1] - 1)
    logprobs = (scaled - maximum).gather(1, ids).double() - total.log()
    top = scaled.topk(candidates, dim=-1).indices.int() if candidates else None
    return Choice(ids[:, 0], logprobs[:, 0].float(), top)


def _concatenate(blocks: list[Choice]) -> Choice:
    tops = [block.candidate_ids for block in blocks if block.candidate_ids is not None]
    return Choice(
        torch.cat([block.ids for block in blocks]),
        torch.cat([block.logprobs for block in blocks]),
        torch.cat(tops) if tops else None,
    )
