"""The last look at an engine's answer: right shapes, and no number that is not one.

A position with a score that is not finite (or too large for the asked encoding) becomes
valid=False with NaN everywhere and PAD_ID among the top ids, whatever the engine called it.
Shapes: R response positions, K top ids, C candidates, F audited chunks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tutelage_client.errors import TutelageError
from tutelage_client.types import PAD_ID, BoolArray, FloatArray, Sequence, SequenceScore, Signal

_FLOAT16_LIMIT = float(np.finfo(np.float16).max)


def guard(score: SequenceScore, sequence: Sequence, signal: Signal) -> tuple[SequenceScore, int]:
    """The score as it may leave the service, and how many of its positions are invalid.

    Raises INTERNAL when the engine's answer does not have the shape of the question: a
    misaligned number must never look like a score.
    """
    if score.error is not None:
        return score, 0
    if signal.judgement:
        _check_judgement(score, sequence)
        return score, 0
    if signal.continuations:
        _check_agreement(score, sequence)
        return score, 0
    _check_shapes(score, sequence, signal)
    assert score.valid is not None
    valid = score.valid
    if not _all_finite(score, signal):
        valid = valid & _finite_rows(score, sequence, signal)
    invalid = int(len(valid) - np.count_nonzero(valid))
    return (_blank(score, valid), invalid) if invalid else (score, 0)


def _check_judgement(score: SequenceScore, sequence: Sequence) -> None:
    """A judge's number is from 0 to 1 and comes alone."""
    if score.judgement is None or not 0.0 <= score.judgement <= 1.0 or score.valid is not None:
        raise TutelageError("INTERNAL", f"engine answered judgement {score.judgement}, must be from 0 to 1")
    _check_id(score, sequence)


def _check_agreement(score: SequenceScore, sequence: Sequence) -> None:
    """A writer's numbers are from 0 to 1, one for every anchor, and come alone."""
    found, chunks = score.agreement, 0 if sequence.anchors is None else len(sequence.anchors)
    alone = score.valid is None and score.judgement is None
    if found is None or found.shape != (chunks,) or not alone:
        got = None if found is None else list(found.shape)
        raise TutelageError(
            "INTERNAL", f"engine answered agreement with shape {got}, asked was [{chunks}] alone"
        )
    if not ((found >= 0) & (found <= 1)).all():
        raise TutelageError("INTERNAL", f"engine answered agreement {found.tolist()}, must be from 0 to 1")
    _check_id(score, sequence)


def _check_id(score: SequenceScore, sequence: Sequence) -> None:
    if score.id != sequence.id:
        raise TutelageError("INTERNAL", f"engine answered sequence {score.id!r} in place of {sequence.id!r}")


def _check_shapes(score: SequenceScore, sequence: Sequence, signal: Signal) -> None:
    rows = len(sequence.response_ids)
    columns = 0 if sequence.candidate_ids is None else sequence.candidate_ids.shape[1]
    top = (rows, signal.top_k) if signal.top_k else None
    expected: dict[str, tuple[int, ...] | None] = {
        "sampled": (rows,) if signal.sampled else None,
        "top_ids": top,
        "top_logprobs": top,
        "candidate_logprobs": (rows, columns) if signal.candidates else None,
        "entropy": (rows,) if signal.entropy else None,
        "valid": (rows,),
    }
    _check_hidden(score, rows, len(signal.hidden_layers))
    if score.judgement is not None:
        raise TutelageError("INTERNAL", "engine answered a judgement, asked was none")
    if score.agreement is not None:
        raise TutelageError("INTERNAL", "engine answered an agreement, asked was none")
    for field, shape in expected.items():
        array: npt.NDArray[Any] | None = getattr(score, field)
        got = None if array is None else array.shape
        if got != shape:
            raise TutelageError("INTERNAL", f"engine answered {field} with shape {got}, asked was {shape}")
    _check_id(score, sequence)


def _check_hidden(score: SequenceScore, rows: int, layers: int) -> None:
    got = None if score.hidden is None else score.hidden.shape
    fits = got is None if layers == 0 else got is not None and len(got) == 3 and got[:2] == (rows, layers)
    if not fits:
        raise TutelageError(
            "INTERNAL", f"engine answered hidden with shape {got}, asked was [{rows}, {layers}, H]"
        )


def _all_finite(score: SequenceScore, signal: Signal) -> bool:
    """Quick and one-sided: a finite sum has only finite terms. Candidates may hold NaN at pads."""
    if signal.encoding == "float16" or score.candidate_logprobs is not None:
        return False
    arrays = (score.sampled, score.top_logprobs, score.entropy, score.hidden)
    return all(a is None or math.isfinite(float(np.add.reduce(a, axis=None))) for a in arrays)


def _finite_rows(score: SequenceScore, sequence: Sequence, signal: Signal) -> BoolArray:
    limit = _FLOAT16_LIMIT if signal.encoding == "float16" else math.inf

    def finite(array: FloatArray) -> BoolArray:
        return np.abs(array) < limit  # NaN compares false

    rows = np.ones(len(sequence.response_ids), dtype=np.bool_)
    for array in (score.sampled, score.entropy):
        if array is not None:
            rows &= finite(array)
    if score.top_logprobs is not None:
        rows &= finite(score.top_logprobs).all(axis=1)
    if score.hidden is not None:
        rows &= np.isfinite(score.hidden).all(axis=(1, 2))
    if score.candidate_logprobs is not None and sequence.candidate_ids is not None:
        rows &= (finite(score.candidate_logprobs) | (sequence.candidate_ids == PAD_ID)).all(axis=1)
    return rows


def _blank(score: SequenceScore, valid: BoolArray) -> SequenceScore:
    """A copy with NaN, and PAD_ID for ids, wherever `valid` is False."""
    changed: dict[str, npt.NDArray[Any]] = {"valid": valid}
    for field in ("sampled", "top_logprobs", "candidate_logprobs", "entropy", "top_ids", "hidden"):
        array: npt.NDArray[Any] | None = getattr(score, field)
        if array is not None:
            changed[field] = array.copy()
            changed[field][~valid] = PAD_ID if field == "top_ids" else np.nan
    return replace(score, **changed)  # type: ignore[arg-type]
