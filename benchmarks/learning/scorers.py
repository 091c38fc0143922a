"""Who scores in an arm: a model behind the transformers engine's packed forward, or a rule.

All answer the score requests that a job of the queue would become.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tutelage_client.types import Identity, Score, ScoreRequest, SequenceScore, Signal

from benchmarks.learning.arms import Pick
from services.models.load import LoadedModel, load_causal_lm
from services.teacher.engines.batching import Answer, Job, Unit
from services.teacher.engines.forward import PackedScorer
from services.teacher.engines.scoring_head import ScoringHead

ANSWERS, PENALTY = "answers", "penalty"
CERTAIN = -1e-6  # log-probability of the token of a worked answer
UNLIKELY = 0.5  # the student's probability below which a token is punished
PUNISHMENT = 1.0


class InProcess(Protocol):
    """A scorer that is called directly."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One answer per request, in order."""
        ...


class PackedTeacher:
    """A model, scored as the transformers engine scores: one packed forward for all requests."""

    def __init__(self, loaded: LoadedModel, name: str, fingerprint: str) -> None:
        self.loaded = loaded
        self.identity = _identity(name, loaded.revision, fingerprint, loaded.vocab_size)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        units = [unit for request in requests for unit in _units(request)]
        # The head's weight may have been trained since the last call.
        scorer = PackedScorer(self.loaded, ScoringHead(self.loaded.head))
        found = iter(scorer.score(units).units)
        scores = []
        for request in requests:
            sequences: dict[int, SequenceScore] = {}
            for _ in range(len(request.contexts)):
                sequences |= next(found).sequences
            ordered = tuple(sequences[index] for index in range(len(request.sequences)))
            scores.append(Score(ordered, self.identity, request_id=request.request_id))
        return scores


def open_teacher(path: Path, name: str, fingerprint: str) -> PackedTeacher:
    """The model of a directory; nothing changes it."""
    return PackedTeacher(load_causal_lm(path, device="cpu"), name, fingerprint)


@dataclass(frozen=True)
class CertainOfAnswers:
    """One token per position has all the probability: the one that was written.

    KL(teacher‖student) from it is the student's cross-entropy: supervised training.
    """

    identity: Identity

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [
            Score(
                tuple(
                    SequenceScore(
                        id=sequence.id,
                        sampled=np.full(len(sequence.response_ids), CERTAIN, np.float32),
                        top_ids=sequence.response_ids[:, None],
                        top_logprobs=np.full((len(sequence.response_ids), 1), CERTAIN, np.float32),
                        valid=np.ones(len(sequence.response_ids), np.bool_),
                    )
                    for sequence in request.sequences
                ),
                self.identity,
                request_id=request.request_id,
            )
            for request in requests
        ]


@dataclass(frozen=True)
class PenaltyOnUnlikely:
    """The teacher-free control: an advantage of −1 where the student gave less than even odds, else 0.

    It answers log p(y) + advantage with the student's own p, so that the sampled reverse KL has just
    that advantage. It knows nothing that the student does not.
    """

    student: PackedTeacher

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        own = await self.student.score(requests)
        return [_changed(score, self._punished) for score in own]

    def _punished(self, sequence: SequenceScore) -> SequenceScore:
        assert sequence.sampled is not None
        unlikely = np.exp(sequence.sampled) < UNLIKELY
        return replace(sequence, sampled=(sequence.sampled - PUNISHMENT * unlikely).astype(np.float32))


@dataclass(frozen=True)
class Selecting:
    """A teacher of which only a fraction of a step's positions is let through; the others are not scored."""

    teacher: InProcess
    fraction: float
    pick: Pick
    random: np.random.Generator

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        asked = [replace(r, signal=_with_entropy(r.signal)) for r in requests]
        scores = await self.teacher.score(asked)
        sizes = [sequence.num_positions for score in scores for sequence in score.sequences]
        ranked = self._ranking([sequence for score in scores for sequence in score.sequences])
        kept = np.zeros(len(ranked), np.bool_)
        kept[np.argsort(-ranked, kind="stable")[: max(1, round(self.fraction * len(ranked)))]] = True
        parts = iter(np.split(kept, np.cumsum(sizes)[:-1]))
        return [_changed(score, lambda sequence: _hidden(sequence, ~next(parts))) for score in scores]

    def _ranking(self, sequences: Sequence[SequenceScore]) -> npt.NDArray[np.float64]:
        if self.pick == "random":
            return self.random.random(sum(sequence.num_positions for sequence in sequences))
        entropies = [sequence.entropy for sequence in sequences if sequence.entropy is not None]
        return np.concatenate(entropies).astype(np.float64)


def rule_identity(name: str, fingerprint: str, vocab_size: int) -> Identity:
    """Who answers where there is no model."""
    return _identity(name, "rule", fingerprint, vocab_size)


def copy_model(model: Any) -> Any:
    """A model with the same weights, its own from here on; what an average of weights is kept in."""
    import copy

    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def copy_weights(source: Any, target: Any) -> None:
    """Put the parameters of one model into another of the same shape."""
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(theirs[name])


@torch.no_grad()
def average_weights(source: Any, target: Any, rate: float) -> None:
    """target ← (1 − rate) · target + rate · source."""
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.lerp_(theirs[name], rate)


def _units(request: ScoreRequest) -> list[Unit]:
    """One unit per context, as the engine's waiting line cuts a small request."""
    job = Job(request, Answer())
    members: dict[int, list[int]] = {context: [] for context in range(len(request.contexts))}
    for index, sequence in enumerate(request.sequences):
        members[sequence.context].append(index)
    return [
        Unit(
            job, context, tuple(indices),
            len(request.contexts[context]) + sum(len(request.sequences[i].response_ids) for i in indices),
        )
        for context, indices in members.items()
    ]  # fmt: skip


def _with_entropy(signal: Signal) -> Signal:
    return replace(signal, entropy=True)


def _changed(score: Score, change: Any) -> Score:
    return replace(score, sequences=tuple(change(sequence) for sequence in score.sequences))


def _hidden(sequence: SequenceScore, where: npt.NDArray[np.bool_]) -> SequenceScore:
    assert sequence.valid is not None
    return replace(sequence, valid=sequence.valid & ~where)


def _identity(name: str, revision: str, fingerprint: str, vocab_size: int) -> Identity:
    return Identity(
        name=name, model=name, revision=revision, weights_version=0, tokenizer_fingerprint=fingerprint,
        vocab_size=vocab_size, engine="in-process", engine_version="0", dtype="float32", head_dtype="float32",
    )  # fmt: skip
