"""The largest k of each row, exactly, several times faster than torch.topk where rows are long.

torch.topk spends nanoseconds on every element, a maximum over blocks a fraction of one. Whatever is
not in one of the k blocks with the largest maxima is exceeded or equalled by k elements, so those
blocks hold k largest; which blocks they are is the same question about fewer numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Measured on a CPU, k from 1 to 256 and rows of 512 to 151,936, a megabyte of them at a time.
BLOCK = 8
WORTHWHILE = 2 * BLOCK  # k blocks must leave out enough of the row to pay for gathering them


def top_k(x: Tensor, k: int, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """Values and places [n, k] of the largest of x [n, V], descending if `ordered`; NaN counts as largest.

    Equal values come in any order. Memory beyond the result is a fraction of x.
    """
    n, width = x.shape
    if width < WORTHWHILE * k:
        found = x.topk(k, dim=-1, sorted=ordered)
        return found.values, found.indices
    # Block b is every count-th element from b on, so that maxima are taken of whole vectors; the few
    # elements after the last full block always take part.
    count = width // BLOCK
    maxima = x[:, : count * BLOCK].view(n, BLOCK, count).amax(dim=1)
    _, blocks = top_k(maxima, k, ordered=False)
    steps = torch.arange(0, count * BLOCK, count, device=x.device)
    rest = torch.arange(count * BLOCK, width, device=x.device).expand(n, -1)
    places = torch.cat([(blocks[:, None, :] + steps[:, None]).flatten(1), rest], dim=1)
    found = x.gather(1, places).topk(k, dim=-1, sorted=ordered)
    return found.values, places.gather(1, found.indices)
