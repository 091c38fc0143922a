"""The file engine: answers from a score file and from nothing else, so it needs no model and no GPU.

A response is found by its ids and those of its context; the numbers are those that the teacher gave when
the file was written, and the identity is that teacher's, under the name that this replica serves. What
the file does not hold fails alone and says what was asked and what is there. K top ids may be fewer than
the file has.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
from tutelage_client.errors import TutelageError
from tutelage_client.types import (
    Identity,
    Int32Array,
    Limits,
    Score,
    ScoreRequest,
    Sequence,
    SequenceError,
    SequenceScore,
    Signal,
    Usage,
)

from services.score_file import ScoredResponse, ScoreFile, check_signal, file_limits

SHOWN_IDS = 6

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Index:
    """Where every response of the file is, by digests of 16 bytes."""

    rows: dict[bytes, int] = field(default_factory=dict)
    contexts: dict[bytes, int] = field(default_factory=dict)  # responses of each


class FileEngine:
    """An engine over one score file.

    Args:
        name: the teacher name of its identity.
        limits: narrowed to what the file can answer.
    """

    def __init__(self, path: Path, *, name: str, limits: Limits) -> None:
        self._path = path
        self._name = name
        self._limits = limits
        self._file: ScoreFile | None = None
        self._index = _Index()
        self._closed = asyncio.Event()

    @property
    def identity(self) -> Identity:
        """Of the teacher that wrote the file; raises UNAVAILABLE before `start` has returned."""
        return replace(self._open.header.identity, name=self._name)

    @property
    def identities(self) -> tuple[Identity, ...]:
        return (self.identity,)

    @property
    def limits(self) -> Limits:
        return self._limits

    async def start(self) -> None:
        """Open the file and learn which responses it holds."""
        await asyncio.to_thread(self._read)

    async def load_weights(self, path: Path, weights_version: int, weights_id: str = "") -> None:
        raise TutelageError("FAILED_PRECONDITION", f"scores: {self._path} is a file; it has no weights")

    async def ended(self) -> None:
        await self._closed.wait()

    async def close(self) -> None:
        self._closed.set()

    async def score(self, request: ScoreRequest) -> Score:
        check_signal(self._path, self._open.header, request.signal)
        scores = await asyncio.to_thread(self._answer_all, request)
        return Score(
            tuple(scores),
            self.identity,
            Usage(positions=sum(score.num_positions for score in scores)),
            request.request_id,
        )

    @property
    def _open(self) -> ScoreFile:
        if self._file is None:
            raise TutelageError("UNAVAILABLE", "engine: the score file is not open", retry_after=1.0)
        return self._file

    # From here on: a thread of asyncio's pool.

    def _read(self) -> None:
        file = ScoreFile(self._path)
        for row, (context_ids, response_ids) in enumerate(file.ids()):
            context = _digest(context_ids)
            self._index.rows.setdefault(context + _digest(response_ids), row)
            self._index.contexts[context] = self._index.contexts.get(context, 0) + 1
        self._limits = file_limits(file.header, self._limits)
        self._file = file
        log.info("score_file_open", path=str(self._path), responses=len(file))

    def _answer_all(self, request: ScoreRequest) -> list[SequenceScore]:
        contexts = [_digest(ids) for ids in request.contexts]
        return [self._answer(request, sequence, contexts[sequence.context]) for sequence in request.sequences]

    def _answer(self, request: ScoreRequest, sequence: Sequence, context: bytes) -> SequenceScore:
        row = self._index.rows.get(context + _digest(sequence.response_ids))
        if row is None:
            message = self._missing(request.contexts[sequence.context], sequence, context)
            return SequenceScore(sequence.id, SequenceError("NOT_FOUND", message))
        return _restricted(self._open.row(row), sequence.id, request.signal)

    def _missing(self, context_ids: Int32Array, sequence: Sequence, context: bytes) -> str:
        others = self._index.contexts.get(context, 0)
        here = f"{others} other responses to this context" if others else "no response to this context"
        return (
            f"scores: {self._path} does not hold this response of {len(sequence.response_ids)} tokens "
            f"({_shown(sequence.response_ids)}) to a context of {len(context_ids)} ({_shown(context_ids)}); "
            f"it holds {len(self._index.rows):,} responses to {len(self._index.contexts):,} contexts, {here}"
        )


def _restricted(row: ScoredResponse, name: str, signal: Signal) -> SequenceScore:
    """What was asked of what is there; the first K of more top ids are the K most probable."""
    score = replace(row.score, id=name)
    if score.error is not None:
        return score
    top = signal.top_k or None
    return replace(
        score,
        sampled=score.sampled if signal.sampled else None,
        top_ids=score.top_ids[:, :top] if top and score.top_ids is not None else None,
        top_logprobs=score.top_logprobs[:, :top] if top and score.top_logprobs is not None else None,
        entropy=score.entropy if signal.entropy else None,
    )


def _digest(ids: Int32Array) -> bytes:
    return hashlib.sha256(ids.astype("<i4", copy=False).tobytes()).digest()[:16]


def _shown(ids: Int32Array) -> str:
    return ", ".join(map(str, ids[:SHOWN_IDS].tolist())) + (", …" if len(ids) > SHOWN_IDS else "")
