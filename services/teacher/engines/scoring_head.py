"""All signals of the scored rows in one pass over the head, a chunk of rows at a time.

[positions, vocabulary] never exists: one chunk of logits does. Everything is taken relative to
the row's largest logit, so temperatures and large logits lose no precision.
Shapes: N scored rows, C candidate ids, K top ids, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tutelage_client.types import PAD_ID

from services.models.head import Head

ROWS = 256


@dataclass(frozen=True)
class RowSignal:
    """What is asked of a row; rows that agree share a pass. `candidates` is C, 0 for none."""

    top_k: int
    candidates: int
    entropy: bool
    temperature: float


@dataclass(frozen=True)
class RowScores:
    """Scores of N rows; NaN (and PAD_ID among the top ids) wherever `valid` is False."""

    sampled: npt.NDArray[np.float32]  # [N]
    valid: npt.NDArray[np.bool_]  # [N]
    top_ids: npt.NDArray[np.int32] | None = None  # [N, K]
    top_logprobs: npt.NDArray[np.float32] | None = None  # [N, K]
    candidates: npt.NDArray[np.float32] | None = None  # [N, C], NaN at pads
    entropy: npt.NDArray[np.float32] | None = None  # [N]


@dataclass(frozen=True)
class ScoringHead:
    """Turns hidden rows into scores; `head` decides the type in which logits are computed."""

    head: Head
    rows: int = ROWS

    def score(
        self, hidden: Tensor, rows: Tensor, targets: Tensor, candidates: Tensor | None, signal: RowSignal
    ) -> RowScores:
        """Score hidden[rows] (hidden [T, H], rows [N]) for targets [N] and candidates [N, C], PAD_ID pads."""
        # Results are written into arrays made beforehand: small results kept between two chunks
        # would split the holes that big ones leave in the heap, and the heap would grow.
        whole = _empty(rows.shape[0], signal, hidden.device)
        for start in range(0, rows.shape[0], self.rows):
            part = slice(start, start + self.rows)
            logits = self.head.logits(hidden.index_select(0, rows[part])).float()
            wanted = None if candidates is None else candidates[part]
            for name, scores in score_logits(logits, targets[part], wanted, signal).items():
                whole[name][part] = scores
        return RowScores(**{name: tensor.cpu().numpy() for name, tensor in whole.items()})


def _empty(rows: int, signal: RowSignal, device: torch.device) -> dict[str, Tensor]:
    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=device)

    whole = {"sampled": make(), "valid": make(dtype=torch.bool)}
    if signal.top_k:
        whole |= {"top_logprobs": make(signal.top_k), "top_ids": make(signal.top_k, dtype=torch.int32)}
    if signal.candidates:
        whole["candidates"] = make(signal.candidates)
    if signal.entropy:
        whole["entropy"] = make()
    return whole


def score_logits(
    logits: Tensor, targets: Tensor, candidates: Tensor | None, signal: RowSignal
) -> dict[str, Tensor]:
    """Signals of one chunk of float32 logits [n, V], which are overwritten.

    With z = (logits − max) / temperature: log-probability z − log Σ eᶻ, entropy log Σ eᶻ − Σ eᶻ z / Σ eᶻ.
    """
    centred = logits.sub_(logits.amax(dim=-1, keepdim=True))
    if signal.temperature != 1.0:  # after centring: large logits would lose their last digits
        centred.div_(signal.temperature)
    weights = centred.exp()
    total = weights.sum(dim=-1)
    log_total = total.log()
    scores = {"sampled": centred.gather(1, targets[:, None])[:, 0] - log_total}
    valid = torch.isfinite(scores["sampled"])
    if signal.top_k:
        top = centred.topk(signal.top_k, dim=-1)
        scores["top_logprobs"] = top.values - log_total[:, None]
        scores["top_ids"] = top.indices.to(torch.int32)
        valid &= torch.isfinite(scores["top_logprobs"]).all(-1)
    if candidates is not None:
        found = centred.gather(1, candidates.clamp(min=0)) - log_total[:, None]
        pads = candidates == PAD_ID
        valid &= (torch.isfinite(found) | pads).all(-1)
        scores["candidates"] = found.masked_fill(pads, torch.nan)
    if signal.entropy:
        # A logit of −inf has no weight; bounded, it contributes 0 instead of 0 · inf.
        mean = torch.linalg.vecdot(weights, centred.clamp_(min=-1e30)) / total
        scores["entropy"] = log_total - mean
        valid &= torch.isfinite(scores["entropy"])
    return {**_blank(scores, valid), "valid": valid}


def _blank(scores: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """NaN, or PAD_ID for ids, in the rows that are not valid."""
    bad = ~valid
    return {
        name: scores[name].masked_fill(
            bad if scores[name].ndim == 1 else bad[:, None], PAD_ID if name == "top_ids" else torch.nan
        )
        for name in scores
    }
