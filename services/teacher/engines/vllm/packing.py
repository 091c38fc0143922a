"""What rides with a vLLM request, and the one array that comes back for it.

Shapes: R response positions, K top ids, C candidate ids, W columns of a packed row.
A packed row is float32: sampled, valid (1 or 0), K log-probabilities, K ids (bits of int32),
C candidate log-probabilities, entropy. What was not asked for has no columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tutelage_client.types import Int32Array, Sequence, SequenceScore, Signal

from services.models.vllm_adapter import ROWS_FROM
from services.teacher.engines.scoring_head import RowSignal


@dataclass(frozen=True)
class Columns:
    """Where each part of a packed row lies."""

    top_logprobs: slice
    top_ids: slice
    candidates: slice
    entropy: slice
    width: int

    SAMPLED = 0
    VALID = 1

    @classmethod
    def of(cls, signal: RowSignal) -> Columns:
        ids = 2 + signal.top_k
        candidates = ids + signal.top_k
        entropy = candidates + signal.candidates
        width = entropy + int(signal.entropy)
        return cls(
            slice(2, ids), slice(ids, candidates), slice(candidates, entropy), slice(entropy, width), width
        )


def row_signal(signal: Signal, sequence: Sequence) -> RowSignal:
    """What is asked of every row of a sequence."""
    candidates = 0
    if signal.candidates and sequence.candidate_ids is not None:
        candidates = sequence.candidate_ids.shape[1]
    return RowSignal(signal.top_k, candidates, signal.entropy, signal.temperature)


def to_extra(context: Int32Array, sequence: Sequence, signal: RowSignal) -> dict[str, Any]:
    """A sequence's part of PoolingParams.extra_kwargs: arrays as bytes, which cross process borders whole."""
    return {
        ROWS_FROM: len(context) - 1,
        "response": sequence.response_ids.tobytes(),
        "candidates": sequence.candidate_ids.tobytes() if signal.candidates else b"",  # type: ignore[union-attr]
        "signal": (signal.top_k, signal.candidates, signal.entropy, signal.temperature),
    }


def prompt_ids(context: Int32Array, sequence: Sequence) -> list[int]:
    """What the model reads: the last response token is predicted, never read."""
    ids: list[int] = np.concatenate([context, sequence.response_ids[:-1]]).tolist()
    return ids


@dataclass(frozen=True)
class Wanted:
    """A sequence as the pooler sees it."""

    rows_from: int
    response: npt.NDArray[np.int32]  # [R]
    candidates: npt.NDArray[np.int32] | None  # [R, C]
    signal: RowSignal

    @classmethod
    def from_extra(cls, extra: dict[str, Any]) -> Wanted:
        signal = RowSignal(*extra["signal"])
        candidates = None
        if signal.candidates:
            candidates = np.frombuffer(extra["candidates"], dtype=np.int32).reshape(-1, signal.candidates)
        return cls(extra[ROWS_FROM], np.frombuffer(extra["response"], dtype=np.int32), candidates, signal)


def unpack(packed: npt.NDArray[np.float32], sequence: Sequence, signal: Signal) -> SequenceScore:
    """The score in a packed array [R, W]."""
    asked = row_signal(signal, sequence)
    columns = Columns.of(asked)
    return SequenceScore(
        id=sequence.id,
        sampled=packed[:, columns.SAMPLED] if signal.sampled else None,
        top_ids=packed.view(np.int32)[:, columns.top_ids] if asked.top_k else None,
        top_logprobs=packed[:, columns.top_logprobs] if asked.top_k else None,
        candidate_logprobs=packed[:, columns.candidates] if asked.candidates else None,
        entropy=packed[:, columns.entropy.start] if asked.entropy else None,
        valid=packed[:, columns.VALID] == 1.0,
    )
