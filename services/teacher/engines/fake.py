"""A teacher without a model: deterministic scores from a hash, with latency and faults to inject.

The scores are a real probability distribution, exact at every temperature and for every signal.
The state of a position is a hash over all tokens before it, each mixed with its own position,
so one missing, extra or shifted token changes every score that follows: a misaligned caller
cannot get the right answer by accident, and splitting a response gives the same scores.

The state picks one of a few sorted log-probability curves and a rotation of one permutation of
the vocabulary: the token of rank r is permutation[(r + rotation) mod V]. Memory is O(V).
Shapes: P context tokens, R response positions, K top ids, C candidates, S curves, V vocabulary.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from tutelage_client.errors import TutelageError
from tutelage_client.types import (
    PAD_ID,
    FloatArray,
    Identity,
    Int32Array,
    Limits,
    Score,
    ScoreRequest,
    Sequence,
    SequenceScore,
    Signal,
    Usage,
)

UInt64Array = npt.NDArray[np.uint64]

CURVES = 16
VERSION = "1"
_YIELD_EVERY = 16_384  # positions between two chances for a cancellation to arrive


class FakeSettings(BaseModel):
    """What the fake engine pretends to be, and how it misbehaves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(default=1024, ge=2, description="rows of the pretended output head")
    seed: int = Field(default=0, ge=0, description="two engines agree when their seeds do")
    latency_seconds: float = Field(default=0.0, ge=0, description="added to every request, concurrently")
    tokens_per_second: float | None = Field(
        default=None, gt=0, description="one request at a time, at this rate; None: as fast as it goes"
    )
    load_seconds: float = Field(default=0.0, ge=0, description="how long starting takes")
    failure_rate: float = Field(default=0.0, ge=0, le=1, description="share of requests answered INTERNAL")
    disconnect_rate: float = Field(
        default=0.0, ge=0, le=1, description="share of requests answered UNAVAILABLE"
    )
    nan_rate: float = Field(
        default=0.0, ge=0, le=1, description="share of positions with NaN or infinite scores"
    )
    poison_token: int | None = Field(
        default=None, description="a request with this id in a response always fails"
    )
    exit_after: int | None = Field(default=None, ge=1, description="the process dies on this many-th request")


@dataclass(frozen=True, slots=True)
class _Curves:
    """Log-probabilities by rank at one temperature, most probable first."""

    logprobs: npt.NDArray[np.float32]  # [S, V]
    entropy: npt.NDArray[np.float32]  # [S]


class FakeEngine:
    """The fake engine; see the module's first lines for what its numbers mean."""

    def __init__(
        self,
        settings: FakeSettings | None = None,
        *,
        name: str = "fake",
        limits: Limits | None = None,
        tokenizer_fingerprint: str | None = None,
        revision: str = "0",
    ) -> None:
        self.settings = settings or FakeSettings()
        self._limits = limits or Limits()
        fingerprint = tokenizer_fingerprint or _fingerprint(self.settings.vocab_size)
        self._identity = Identity(
            name=name,
            model=f"fake-{self.settings.vocab_size}",
            revision=revision,
            weights_version=0,
            tokenizer_fingerprint=fingerprint,
            vocab_size=self.settings.vocab_size,
            engine="fake",
            engine_version=VERSION,
            dtype="float32",
            head_dtype="float32",
        )
        self._requests = 0
        self._turn = asyncio.Lock()
        self._computing = asyncio.Lock()
        self._closed = asyncio.Event()
        self._busy_until = 0.0
        self._build_tables()

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def identities(self) -> tuple[Identity, ...]:
        return (self._identity,)

    @property
    def limits(self) -> Limits:
        return self._limits

    async def start(self) -> None:
        await asyncio.sleep(self.settings.load_seconds)

    async def load_weights(self, path: Path, weights_version: int, weights_id: str = "") -> None:
        """Other weights, other numbers: version and id are part of the hash. `path` is not read."""
        async with self._computing:
            self._identity = replace(self._identity, weights_version=weights_version, weights_id=weights_id)
            self._build_tables()

    async def ended(self) -> None:
        await self._closed.wait()

    async def close(self) -> None:
        self._closed.set()

    async def score(self, request: ScoreRequest) -> Score:
        self._requests += 1
        self._misbehave(request)
        arrived = time.perf_counter()
        if self.settings.latency_seconds:
            await asyncio.sleep(self.settings.latency_seconds)
        tokens = sum(map(len, request.contexts)) + sum(len(s.response_ids) for s in request.sequences)
        if self.settings.tokens_per_second is not None:
            await self._wait_turn(tokens / self.settings.tokens_per_second)
        began = time.perf_counter()
        async with self._computing:  # it yields: nobody may change the weights meanwhile
            scores, identity = await self._compute(request), self._identity
        return Score(
            sequences=tuple(scores),
            identity=identity,
            usage=Usage(
                positions=sum(len(s.response_ids) for s in request.sequences),
                tokens_computed=tokens,
                queue_ms=(began - arrived) * 1e3,
                compute_ms=(time.perf_counter() - began) * 1e3,
            ),
            request_id=request.request_id,
        )

    async def _wait_turn(self, seconds: float) -> None:
        """Serve one request at a time; a cancelled one gives back what it has not used."""
        async with self._turn:
            loop = asyncio.get_running_loop()
            # The clock runs on from the previous request, so late wake-ups do not add up.
            self._busy_until = max(self._busy_until, loop.time() - 0.05) + seconds
            try:
                await asyncio.sleep(self._busy_until - loop.time())
            except asyncio.CancelledError:
                self._busy_until = loop.time()
                raise

    async def _compute(self, request: ScoreRequest) -> list[SequenceScore]:
        prefixes = [self._prefix_hash(ids, 0, self._seed)[-1] for ids in request.contexts]
        curves = self._curves(request.signal.temperature)
        scores, since_yield = [], 0
        for sequence in request.sequences:
            since_yield += len(sequence.response_ids)
            if since_yield > _YIELD_EVERY:
                since_yield = 0
                await asyncio.sleep(0)
            start = len(request.contexts[sequence.context])
            scores.append(
                self._score_sequence(sequence, request.signal, prefixes[sequence.context], start, curves)
            )
        return scores

    def _score_sequence(
        self, sequence: Sequence, signal: Signal, prefix: np.uint64, start: int, curves: _Curves
    ) -> SequenceScore:
        ids = sequence.response_ids
        hashes = np.empty(len(ids), dtype=np.uint64)
        hashes[0] = prefix
        hashes[1:] = self._prefix_hash(ids[:-1], start, prefix)
        state = _mix(hashes)
        curve = (state & np.uint64(CURVES - 1)).astype(np.intp)
        rotation = ((state >> np.uint64(20)) % np.uint64(self.settings.vocab_size)).astype(np.int32)
        vocab = self.settings.vocab_size
        sampled = top_ids = top_logprobs = candidates = entropy = None
        if signal.sampled:
            sampled = curves.logprobs[curve, (self._rank[ids] - rotation) % vocab]
        if signal.top_k:
            top_ids, top_logprobs = self._top(curve, rotation, signal.top_k, curves)
        if signal.candidates and sequence.candidate_ids is not None:
            candidates = self._candidates(sequence.candidate_ids, curve, rotation, curves)
        if signal.entropy:
            entropy = curves.entropy[curve]
        score = SequenceScore(
            id=sequence.id,
            sampled=sampled,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            candidate_logprobs=candidates,
            entropy=entropy,
            valid=np.ones(len(ids), dtype=np.bool_),
        )
        return self._spoil(score, state) if self.settings.nan_rate else score

    def _prefix_hash(self, ids: Int32Array, start: int, seed: np.uint64) -> UInt64Array:
        """Running hash [N] of `ids` at positions start, start+1, …, continuing from `seed`."""
        # An odd factor for each position: no token hash is lost, and swapped tokens differ.
        positions = np.arange(2 * start + 1, 2 * (start + len(ids)), 2, dtype=np.uint64)
        positions *= self._token_hash[ids]
        running = np.cumsum(positions, dtype=np.uint64)
        running += seed
        return running

    def _top(
        self, curve: npt.NDArray[np.intp], rotation: Int32Array, top_k: int, curves: _Curves
    ) -> tuple[Int32Array, FloatArray]:
        if top_k not in self._windows:
            self._windows[top_k] = np.lib.stride_tricks.sliding_window_view(self._unrolled, top_k)
        return self._windows[top_k][rotation], np.ascontiguousarray(curves.logprobs[:, :top_k]).take(
            curve, axis=0
        )

    def _candidates(
        self, ids: Int32Array, curve: npt.NDArray[np.intp], rotation: Int32Array, curves: _Curves
    ) -> FloatArray:
        ranks = (self._rank[np.maximum(ids, 0)] - rotation[:, None]) % self.settings.vocab_size
        logprobs: npt.NDArray[np.float32] = curves.logprobs[curve[:, None], ranks]
        logprobs[ids == PAD_ID] = np.nan
        return logprobs

    def _spoil(self, score: SequenceScore, state: UInt64Array) -> SequenceScore:
        """What a broken kernel does: not a number here, an infinity there, and `valid` unaware."""
        draw = (state >> np.uint64(40)).astype(np.float64) / 2.0**24
        for array in (score.sampled, score.top_logprobs, score.candidate_logprobs, score.entropy):
            if array is not None:
                array[draw < self.settings.nan_rate] = np.nan
                array[draw < self.settings.nan_rate / 2] = -np.inf
        return score

    def _misbehave(self, request: ScoreRequest) -> None:
        settings = self.settings
        if settings.exit_after is not None and self._requests >= settings.exit_after:
            os._exit(9)
        if settings.poison_token is not None and any(
            bool((s.response_ids == settings.poison_token).any()) for s in request.sequences
        ):
            raise TutelageError("INTERNAL", f"injected: a response has token {settings.poison_token}")
        draw = int(_mix(np.array([self._requests + settings.seed], dtype=np.uint64))[0]) / 2.0**64
        if draw < settings.failure_rate:
            raise TutelageError("INTERNAL", "injected failure")
        if draw >= 1 - settings.disconnect_rate:
            raise TutelageError("UNAVAILABLE", "injected disconnect")

    def _build_tables(self) -> None:
        vocab = self.settings.vocab_size
        weights = [self._identity.weights_version, *self._identity.weights_id.encode()]
        rng = np.random.default_rng([self.settings.seed, *weights])
        self._seed = np.uint64(rng.integers(1, 2**63, dtype=np.uint64))
        self._token_hash = rng.integers(0, 2**64, vocab, dtype=np.uint64)
        permutation = rng.permutation(vocab).astype(np.int32)
        # Long enough that the window of any rotation is one contiguous slice.
        self._unrolled = np.concatenate([permutation, permutation])
        self._rank = np.argsort(permutation).astype(np.int32)
        # Zipf-like curves from nearly flat to nearly certain, each with its own small steps.
        sharpness = np.geomspace(0.2, 4.0, CURVES)[:, None]
        steps = rng.exponential(0.02, size=(CURVES, vocab)).cumsum(axis=1) / np.sqrt(vocab)
        self._logits = -sharpness * np.log1p(np.arange(vocab))[None, :] - steps
        self._by_temperature: dict[float, _Curves] = {}
        self._windows: dict[int, Int32Array] = {}  # K → [V + V - K + 1, K], a view

    def _curves(self, temperature: float) -> _Curves:
        found = self._by_temperature.get(temperature)
        if found is None:
            scaled = self._logits / temperature
            scaled -= scaled.max(axis=1, keepdims=True)
            logprobs = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
            entropy = -(np.exp(logprobs) * logprobs).sum(axis=1)
            found = _Curves(logprobs.astype(np.float32), entropy.astype(np.float32))
            if len(self._by_temperature) >= 8:
                self._by_temperature.clear()
            self._by_temperature[temperature] = found
        return found


def _mix(values: UInt64Array) -> UInt64Array:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _fingerprint(vocab_size: int) -> str:
    return hashlib.sha256(f"fake vocabulary of {vocab_size}".encode()).hexdigest()
