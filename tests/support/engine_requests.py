"""Random score requests, and the plain float32 scores that an engine must reproduce."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tutelage_client.types import PAD_ID, Score, ScoreRequest, Sequence, Signal

from services.teacher.engines.transformers import TransformersEngine
from support.tiny_models import VOCAB, plain_logits, random_ids

CANDIDATES = 4


@asynccontextmanager
async def run_engine(directory: Path, **settings: Any) -> AsyncIterator[TransformersEngine]:
    """A started engine on one CPU thread."""
    engine = TransformersEngine(directory, **{"device": "cpu", "threads": 1, **settings})
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def random_request(
    seed: int,
    *,
    shape: list[tuple[int, list[int]]] | None = None,
    sequences: int = 10,
    signal: Signal | None = None,
) -> ScoreRequest:
    """A request over `shape`: for each context its length, and the lengths of its responses."""
    random = np.random.default_rng(seed)
    if shape is None:
        lengths = [int(n) for n in random.integers(1, 14, size=sequences)]
        lengths[0] = 1
        cuts = [0, 1, sequences // 2, sequences]
        shape = [(size, lengths[a:b]) for size, a, b in zip((1, 9, 4), cuts[:-1], cuts[1:], strict=True)]
    signal = signal or Signal()
    members = []
    for context, (_, lengths) in enumerate(shape):
        for length in lengths:
            candidates = None
            if signal.candidates:
                candidates = random.integers(0, VOCAB, size=(length, CANDIDATES)).astype(np.int32)
                candidates[random.random(candidates.shape) < 0.2] = PAD_ID
            members.append(Sequence(str(len(members)), context, random_ids(random, length), candidates))
    return ScoreRequest(tuple(random_ids(random, size) for size, _ in shape), tuple(members), signal)


def shuffled(request: ScoreRequest, seed: int) -> ScoreRequest:
    order = np.random.default_rng(seed).permutation(len(request.sequences))
    return replace(request, sequences=tuple(request.sequences[i] for i in order))


class Reference:
    """One plain forward of the plain model per sequence."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def logprobs(self, request: ScoreRequest, sequence: Sequence) -> npt.NDArray[np.float64]:
        """[R, V] at the request's temperature."""
        context = request.contexts[sequence.context]
        logits = plain_logits(self._model, context, sequence.response_ids).double()
        return torch.log_softmax(logits / request.signal.temperature, dim=-1).numpy()

    def sampled(self, request: ScoreRequest, sequence: Sequence) -> npt.NDArray[np.float64]:
        """[R]."""
        rows = np.arange(len(sequence.response_ids))
        taken: npt.NDArray[np.float64] = self.logprobs(request, sequence)[rows, sequence.response_ids]
        return taken


def assert_scores(score: Score, request: ScoreRequest, reference: Reference, tolerance: float) -> None:
    """Every array that was asked for is there and right; what was not asked for is None."""
    signal = request.signal
    assert [answer.id for answer in score.sequences] == [sequence.id for sequence in request.sequences]
    for answer, sequence in zip(score.sequences, request.sequences, strict=True):
        expected = reference.logprobs(request, sequence)
        assert answer.valid is not None
        assert answer.valid.all()
        assert answer.error is None
        _close(answer.sampled, reference.sampled(request, sequence) if signal.sampled else None, tolerance)
        _close(answer.entropy, -(np.exp(expected) * expected).sum(-1) if signal.entropy else None, tolerance)
        top = np.sort(expected, axis=-1)[:, ::-1][:, : signal.top_k]
        _close(answer.top_logprobs, top if signal.top_k else None, tolerance)
        if answer.top_ids is not None:
            assert answer.top_ids.dtype == np.int32
            _close(np.take_along_axis(expected, answer.top_ids.astype(np.int64), 1), top, tolerance)
        wanted = None
        if signal.candidates:
            ids = sequence.candidate_ids
            assert ids is not None
            wanted = np.take_along_axis(expected, np.maximum(ids, 0).astype(np.int64), 1)
            wanted[ids == PAD_ID] = np.nan
        _close(answer.candidate_logprobs, wanted, tolerance)


def _close(got: Any, expected: Any, tolerance: float) -> None:
    assert (got is None) == (expected is None)
    if got is not None:
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)
