"""An engine that remembers: what was scored before is answered from a store, the rest by the engine.

A request is cut by sequence. Sequences with the same key are computed once, also when they come in
several requests at the same time. An answer has one identity: where the weights moved between looking
and computing, the whole request goes to the engine. Errors and positions without a finite score are
never kept, and a store that fails is done without.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from tutelage_client.types import Identity, Limits, Score, ScoreRequest, SequenceScore, Usage

from services.api.guard import guard
from services.api.metrics import Metrics
from services.teacher.cache.entry import CorruptEntryError, pack, unpack
from services.teacher.cache.key import sequence_keys, teacher_digest
from services.teacher.cache.store import Store, StoreError
from services.teacher.engine import Engine

REST_SECONDS = 5.0  # that a store which failed is left alone

_log = structlog.get_logger(__name__)

_Flight = asyncio.Future[SequenceScore | None]  # None: no answer that may be shared


class CachedEngine:
    """`engine` behind a cache.

    Args:
        variant: settings of the engine that change numbers and are not in its identity.
    """

    def __init__(self, engine: Engine, store: Store, *, variant: Mapping[str, Any], metrics: Metrics) -> None:
        self._engine = engine
        self._store = store
        self.variant = variant
        self._metrics = metrics
        self._flights: dict[bytes, _Flight] = {}
        self._resting_until = 0.0

    @property
    def identity(self) -> Identity:
        return self._engine.identity

    @property
    def identities(self) -> tuple[Identity, ...]:
        return self._engine.identities

    @property
    def limits(self) -> Limits:
        return self._engine.limits

    async def start(self) -> None:
        """Open the store and load the model.

        Raises:
            OSError: the cache's directory cannot be used.
        """
        try:
            await self._store.open()
        except StoreError as error:  # a server that is away now may be there later
            self._rest(error)
        self._metrics.cache_bytes.set(self._store.held_bytes)
        await self._engine.start()

    async def load_weights(self, path: Path, weights_version: int, weights_id: str = "") -> None:
        """As the engine does it; the scores of the weights before keep their own keys."""
        await self._engine.load_weights(path, weights_version, weights_id)

    async def ended(self) -> None:
        await self._engine.ended()

    async def close(self) -> None:
        await self._engine.close()
        await self._store.close()

    async def score(self, request: ScoreRequest) -> Score:
        identity = self._identity_of(request)
        look_up = _LookUp(request, identity, sequence_keys(teacher_digest(identity, self.variant), request))
        while missing := look_up.missing():
            if self._identity_of(request) != identity or not await self._advance(look_up, missing):
                self._count(look_up, all_missed=True)
                return await self._engine.score(request)
        self._count(look_up)
        return look_up.answer()

    def _identity_of(self, request: ScoreRequest) -> Identity:
        identities = self._engine.identities
        return next((one for one in identities if one.name == request.teacher), identities[0])

    async def _advance(self, look_up: _LookUp, missing: list[bytes]) -> bool:
        """Find, compute or wait for the missing keys; False when other weights answered.

        A key that somebody else began and gave up stays missing.
        """
        others = {key: self._flights[key] for key in missing if key in self._flights}
        own = [key for key in missing if key not in others]
        self._flights.update((key, asyncio.get_running_loop().create_future()) for key in own)
        try:
            found = await self._find(own, look_up.identity)
            look_up.take("hit", found)
            self._settle(found)
            if not await self._compute(look_up, [key for key in own if key not in found]):
                return False
        finally:
            for key in own:
                flight = self._flights.pop(key)
                if not flight.done():
                    flight.set_result(None)
        for key, flight in others.items():
            score = await asyncio.shield(flight)  # cancelled, this request leaves the other's alone
            if score is not None:
                look_up.take("shared", {key: score})
        return True

    async def _compute(self, look_up: _LookUp, keys: list[bytes]) -> bool:
        """Let the engine score the sequences of `keys`; False when it has other weights by now."""
        if not keys:
            return True
        work = look_up.part(keys)
        score = await self._engine.score(work)
        if score.identity != look_up.identity:
            return False
        answers = dict(zip(keys, score.sequences, strict=True))
        look_up.take("miss", answers, score.usage)
        good = {
            key: answer
            for (key, answer), sequence in zip(answers.items(), work.sequences, strict=True)
            if answer.error is None and guard(answer, sequence, work.signal)[1] == 0
        }
        self._settle(good)
        await self._keep([(key, pack(key, answer, look_up.identity)) for key, answer in good.items()])
        return True

    def _settle(self, answers: Mapping[bytes, SequenceScore]) -> None:
        for key, answer in answers.items():
            self._flights[key].set_result(answer)

    async def _find(self, keys: Sequence[bytes], identity: Identity) -> dict[bytes, SequenceScore]:
        """What the store holds; nothing where it fails, and not what it holds damaged."""
        if not keys or time.monotonic() < self._resting_until:
            return {}
        found = {}
        try:
            for key, data in zip(keys, await self._store.get(keys), strict=True):
                if data is None:
                    continue
                try:
                    found[key] = _read(key, data, identity)
                except CorruptEntryError as error:
                    self._metrics.cache_failures.labels("corrupt").inc()
                    _log.warning("cache_entry_corrupt", key=key.hex(), error=str(error))
                    await self._store.drop(key)
        except StoreError as error:
            self._rest(error)
        return found

    async def _keep(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        if not entries or time.monotonic() < self._resting_until:
            return
        try:
            await self._store.put(entries)
            self._metrics.cache_bytes.set(self._store.held_bytes)
        except StoreError as error:
            self._rest(error)

    def _rest(self, error: StoreError) -> None:
        self._resting_until = time.monotonic() + REST_SECONDS
        self._metrics.cache_failures.labels("store").inc()
        _log.warning("cache_left_alone", seconds=REST_SECONDS, error=str(error))

    def _count(self, look_up: _LookUp, *, all_missed: bool = False) -> None:
        for outcome, count in look_up.outcomes(all_missed).items():
            self._metrics.cache_sequences.labels(outcome).inc(count)


class _LookUp:
    """One request on its way: the key of every sequence, and what is known by key so far."""

    def __init__(self, request: ScoreRequest, identity: Identity, keys: Sequence[bytes]) -> None:
        self.request = request
        self.identity = identity
        self._keys = keys
        self._first = {key: index for index, key in reversed(list(enumerate(keys)))}
        self._known: dict[bytes, SequenceScore] = {}
        self._how: dict[bytes, str] = {}
        self._usage = Usage()

    def missing(self) -> list[bytes]:
        """Keys without an answer, each once, in request order."""
        return [key for key in dict.fromkeys(self._keys) if key not in self._known]

    def take(self, how: str, answers: Mapping[bytes, SequenceScore], usage: Usage | None = None) -> None:
        """Answers by key, and whether they are a hit, a miss, or shared with another request."""
        self._known.update(answers)
        self._how.update(dict.fromkeys(answers, how))
        self._usage = usage or self._usage

    def part(self, keys: Iterable[bytes]) -> ScoreRequest:
        """A request for one sequence of each key, with no context that nobody needs."""
        return self.request.only(self.request.sequences[self._first[key]] for key in keys)

    def answer(self) -> Score:
        """Every sequence's score under its own id; only once nothing is missing."""
        sequences = self.request.sequences
        return Score(
            tuple(
                replace(self._known[key], id=one.id) for key, one in zip(self._keys, sequences, strict=True)
            ),
            self.identity,
            replace(self._usage, positions=sum(len(one.response_ids) for one in sequences)),
            self.request.request_id,
        )

    def outcomes(self, all_missed: bool) -> Counter[str]:
        """Sequences by outcome; the second of two equal ones in a request is shared."""
        if all_missed:
            return Counter({"miss": len(self._keys)})
        return Counter(
            self._how[key] if self._first[key] == index else "shared" for index, key in enumerate(self._keys)
        )


def _read(key: bytes, data: bytes, identity: Identity) -> SequenceScore:
    """The entry of `key`; what other weights scored is no such entry, whatever its key says."""
    score, scored_by = unpack(key, data)
    if replace(scored_by, name=identity.name) != identity:
        raise CorruptEntryError(f"was scored by {scored_by}")
    return score
