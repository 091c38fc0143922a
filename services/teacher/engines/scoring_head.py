"""All signals of the scored rows in one pass over the head, a chunk of rows at a time.

[positions, vocabulary] never exists: one chunk of logits does, which is reduced in slices that stay
in the processor's cache. Everything is taken relative to the row's largest logit, so temperatures
and large logits lose no precision.
Shapes: N scored rows, C candidate ids, K top ids, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tutelage_client.types import PAD_ID

from services.models.head import Head
from services.teacher.engines.top_k import top_k

ROWS = 256  # with fewer, reading the head's weight costs more than using it
CHUNK = 2**18  # logits of a chunk of a small vocabulary: 1 MiB stays near the processor from head to scores
CACHED = 2**21  # logits that a CPU reduces at a time: 8 MiB, which bounds what is needed beside the chunk
SHARED = 2**23  # and a device, which has bandwidth for more and would wait for many small calls


def rows_for(vocab: int) -> int:
    """Rows in a chunk: 1 MiB of logits, so that a small vocabulary does not pay for many small chunks.

    Never fewer than ROWS: 256 rows of 151,936 logits are 148 MiB. Peak memory grows by two chunks at most.
    """
    return max(ROWS, CHUNK // vocab)


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


class VocabShard(Protocol):
    """How a vocabulary that is split over ranks comes together; every call is made by all ranks at once.

    Each rank holds the logits of neighbouring ids. All calls return the same on every rank.
    """

    @property
    def start(self) -> int:
        """The first id of this rank's columns."""

    def reduce_max(self, x: Tensor) -> Tensor:
        """Elementwise over ranks. What it makes of NaN does not matter."""

    def reduce_sum(self, x: Tensor) -> Tensor:
        """Elementwise over ranks; NaN on any rank is NaN on all."""

    def gather_last(self, x: Tensor) -> Tensor:
        """x [n, k] of every rank, in order of ranks, as [n, ranks · k]."""


@dataclass(frozen=True)
class ScoringHead:
    """Turns hidden rows into scores; `head` decides the type in which logits are computed."""

    head: Head

    def score(
        self, hidden: Tensor, rows: Tensor, targets: Tensor, candidates: Tensor | None, signal: RowSignal
    ) -> RowScores:
        """Score hidden[rows] (hidden [T, H], rows [N]) for targets [N] and candidates [N, C], PAD_ID pads."""
        # Results are written into arrays made beforehand: small results kept between two chunks
        # would split the holes that big ones leave in the heap, and the heap would grow.
        # The chunks share one array of logits too: new pages cost more than the pass over them.
        whole = _empty(rows.shape[0], signal, hidden.device)
        weight = self.head.weight
        size = max(1, min(rows_for(self.head.vocab_size), rows.shape[0]))
        logits = torch.empty(size, self.head.vocab_size, dtype=weight.dtype, device=weight.device)
        for start in range(0, rows.shape[0], size):
            part = slice(start, start + size)
            taken = hidden.index_select(0, rows[part])
            self.head.logits(taken, out=logits[: len(taken)])
            wanted = None if candidates is None else candidates[part]
            for name, scores in score_logits(logits[: len(taken)], targets[part], wanted, signal).items():
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
    logits: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    signal: RowSignal,
    shard: VocabShard | None = None,
) -> dict[str, Tensor]:
    """Signals of one chunk of logits [n, V] of any float type, which may be overwritten.

    With z = (logits − max) / temperature: log-probability z − log Σ eᶻ, entropy log Σ eᶻ − Σ eᶻ z / Σ eᶻ.
    With a `shard`, logits are this rank's columns, ids stay global, and every rank gets the same scores.
    """
    wanted = targets[:, None] if candidates is None else torch.cat([targets[:, None], candidates], dim=1)
    step = max(1, (CACHED if logits.device.type == "cpu" else SHARED) // max(1, logits.shape[1]))
    start = None if shard is None else shard.start
    sums = _join([
        _reduce(logits[row : row + step].float(), wanted[row : row + step], signal, start)
        for row in range(0, max(1, len(logits)), step)
    ])  # fmt: skip
    if shard is not None:
        sums = _combine(sums, shard, signal)

    def logprobs(chosen: Tensor) -> Tensor:
        # Centred before dividing: large logits would lose their last digits otherwise.
        return (chosen - sums.largest[:, None]) / signal.temperature - sums.total.log()[:, None]

    chosen = logprobs(sums.chosen)
    valid = (torch.isfinite(chosen) | (wanted == PAD_ID)).all(-1)
    scores = {"sampled": chosen[:, 0]}
    if sums.top_ids is not None and sums.top_logits is not None:
        scores["top_ids"], scores["top_logprobs"] = sums.top_ids, logprobs(sums.top_logits)
        valid &= torch.isfinite(scores["top_logprobs"]).all(-1)
    if candidates is not None:
        scores["candidates"] = chosen[:, 1:].masked_fill(candidates == PAD_ID, torch.nan)
    if sums.moment is not None:
        scores["entropy"] = sums.total.log() - sums.moment / sums.total
        valid &= torch.isfinite(scores["entropy"])
    return {**_blank(scores, valid), "valid": valid}


@dataclass(frozen=True)
class _Sums:
    """What rows of logits come down to; of the columns of one rank, or of the whole vocabulary."""

    largest: Tensor  # [n] largest logit
    total: Tensor  # [n] Σ eᶻ, z = (logit − largest) / temperature
    moment: Tensor | None  # [n] Σ eᶻ z; None unless entropy is asked
    chosen: Tensor  # [n, 1 + C] logits of the target and the candidates; −inf for an id of another rank
    top_logits: Tensor | None  # [n, K] or fewer, where this rank has fewer columns
    top_ids: Tensor | None  # like top_logits, int32


def _reduce(logits: Tensor, wanted: Tensor, signal: RowSignal, start: int | None) -> _Sums:
    """Of all columns at hand, which are overwritten; `start` is their first id, None without other ranks."""
    top_logits = top_ids = moment = None
    if start is None:
        chosen = logits.gather(1, wanted.clamp(min=0))
    else:
        if not logits.shape[1]:  # a rank that holds nothing but padding of the vocabulary
            logits = logits.new_full((logits.shape[0], 1), -torch.inf)
        place = wanted - start
        elsewhere = (place < 0) | (place >= logits.shape[1])
        chosen = logits.gather(1, place.masked_fill(elsewhere, 0)).masked_fill(elsewhere, -torch.inf)
    if signal.top_k:
        k = signal.top_k if start is None else min(signal.top_k, logits.shape[1])
        top_logits, places = top_k(logits, k)
        top_ids = (places + (start or 0)).to(torch.int32)
        largest = top_logits[:, 0]
    else:
        largest = logits.amax(dim=-1)
    # Relative to 0 where no logit is possible at all: −inf − −inf has no value.
    centre = largest if start is None else largest.masked_fill(largest == -torch.inf, 0.0)
    # In powers of two, which are a third of the price; divided after centring, where large logits
    # have not lost their last digits.
    centred = logits.sub_(centre[:, None]).mul_(1 / (signal.temperature * math.log(2)))
    if signal.entropy:
        weights = centred.exp2()
        # A logit of −inf has no weight; bounded, it contributes 0 instead of 0 · inf.
        moment = torch.linalg.vecdot(weights, centred.clamp_(min=-1e30)).mul_(math.log(2))
    else:
        weights = centred.exp2_()
    return _Sums(largest, weights.sum(dim=-1), moment, chosen, top_logits, top_ids)


def _join(parts: list[_Sums]) -> _Sums:
    """Of all rows, from those of one slice after another."""

    def whole(name: str) -> Any:
        column = [getattr(part, name) for part in parts]
        return None if column[0] is None else torch.cat(column)

    return (
        parts[0] if len(parts) == 1 else _Sums(**{field.name: whole(field.name) for field in fields(_Sums)})
    )


def _combine(own: _Sums, shard: VocabShard, signal: RowSignal) -> _Sums:
    """Of all ranks: one maximum, one sum and, for top ids, one gather, whatever the logits are.

    A rank's sums are relative to its own largest logit; with z = z' + d, Σ eᶻ = eᵈ Σ eᶻ' and
    Σ eᶻ z = eᵈ (Σ eᶻ' z' + d Σ eᶻ'). NaN stays in the sums, which every reduction passes on.
    """
    both = shard.reduce_max(torch.cat([own.largest[:, None], own.chosen], dim=1))
    largest, chosen = both[:, 0], both[:, 1:]
    gap = (own.largest - largest) / signal.temperature
    gap = gap.clamp(min=-1e30)  # as in _reduce; a rank without a possible token has sums of 0
    rescale = gap.exp()
    parts = [own.total * rescale]
    if own.moment is not None:
        parts.append((own.moment + gap * own.total) * rescale)
    sums = shard.reduce_sum(torch.stack(parts, dim=1))
    moment = None if own.moment is None else sums[:, 1]
    if own.top_logits is None or own.top_ids is None:
        return _Sums(largest, sums[:, 0], moment, chosen, None, None)
    top_logits, top_ids = _merge(own.top_logits, own.top_ids, signal.top_k, shard)
    return _Sums(largest, sums[:, 0], moment, chosen, top_logits, top_ids)


def _merge(logits: Tensor, ids: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The largest k of what the ranks found; logits and ids [n, K] or fewer travel as one tensor."""
    pads = k - logits.shape[1]
    logits = torch.nn.functional.pad(logits, (0, pads), value=-torch.inf)
    # An id below 2²⁴ is exact in float32.
    packed = torch.cat([logits, torch.nn.functional.pad(ids, (0, pads)).float()], dim=1)
    found = shard.gather_last(packed).view(logits.shape[0], -1, 2, k)
    top, place = found[:, :, 0].flatten(1).topk(k, dim=-1)
    return top, found[:, :, 1].flatten(1).gather(1, place).to(torch.int32)


def _blank(scores: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """NaN, or PAD_ID for ids, in the rows that are not valid."""
    bad = ~valid
    return {
        name: scores[name].masked_fill(
            bad if scores[name].ndim == 1 else bad[:, None], PAD_ID if name == "top_ids" else torch.nan
        )
        for name in scores
    }
