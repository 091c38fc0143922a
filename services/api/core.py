"""The scoring core: everything a request goes through, whichever door it came in by.

gRPC, HTTP and the queue are thin doors over one ScoringCore over one Scorer. In order: open for
requests? request fits? which sequences can be scored? room for its tokens? still in time? engine,
guard, answer. What a caller can fix never reaches the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Literal

import structlog
from tutelage_client import codec
from tutelage_client.errors import TutelageError, invalid, shown
from tutelage_client.types import (
    Identity,
    Limits,
    Score,
    ScoreRequest,
    SequenceError,
    SequenceScore,
    Teacher,
)

from services import tracing
from services.api.admission import Admission
from services.api.guard import guard
from services.api.metrics import Metrics
from services.api.validate import check_pins, check_request, check_sequences
from services.teacher.engine import Scorer

State = Literal["loading", "ready", "draining"]
Transport = Literal["grpc", "stream", "http", "queue"]

_log = structlog.get_logger(__name__)


class ScoringCore:
    """Scores requests over one scorer; safe to call concurrently from one event loop."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        max_queued_tokens: int,
        max_message_bytes: int,
        metrics: Metrics | None = None,
    ) -> None:
        self.metrics = metrics or Metrics()
        self.admission = Admission(max_queued_tokens)
        self.state: State = "loading"
        self._scorer = scorer
        self._max_message_bytes = max_message_bytes
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = asyncio.Event()

    @property
    def identities(self) -> tuple[Identity, ...]:
        """Every teacher that answers here."""
        return self._scorer.identities

    def identity_of(self, name: str) -> Identity:
        """The teacher called `name`; an empty name means the only one here.

        Raises:
            TutelageError: NOT_FOUND for another name, INVALID_ARGUMENT for none where there are several.
        """
        identities = self.identities
        if not name and len(identities) == 1:
            return identities[0]
        for identity in identities:
            if identity.name == name:
                return identity
        here = f"{'is' if len(identities) == 1 else 'are'} {', '.join(repr(one.name) for one in identities)}"
        if not name:
            raise invalid(f"teacher: got none, must be named where several are; here {here}")
        raise TutelageError("NOT_FOUND", f"teacher: got {shown(name)}, here {here}")

    @property
    def limits(self) -> Limits:
        limits = self._scorer.limits
        return replace(limits, max_message_bytes=min(limits.max_message_bytes, self._max_message_bytes))

    def open(self) -> None:
        """The model is loaded: accept requests from now on."""
        self.state = "ready"
        # One series, also of a replica with several names: whoever joins it to others needs it to be one.
        here, names = self.identities[0], ",".join(identity.name for identity in self.identities)
        self.metrics.teacher_info.labels(names, here.model, here.engine, here.engine_version, here.dtype).set(
            1
        )
        self.metrics.ready.set(1)

    def begin_drain(self) -> None:
        """Accept nothing more; what was accepted is still answered."""
        self.state = "draining"
        self.metrics.ready.set(0)
        self.draining.set()

    async def drained(self) -> None:
        """Return once nothing accepted is left unanswered."""
        await self._idle.wait()

    def teacher(self, name: str = "") -> Teacher:
        """Who scores here under `name` (see `identity_of`); UNAVAILABLE while the model loads."""
        if self.state == "loading":
            raise TutelageError("UNAVAILABLE", "teacher: the model is still loading", retry_after=1.0)
        return Teacher(identity=self.identity_of(name), limits=self.limits, ready=self.state == "ready")

    async def score(
        self,
        request: ScoreRequest,
        *,
        transport: Transport,
        remaining_seconds: float | None = None,
        malformed: Mapping[int, SequenceError] | None = None,
    ) -> Score:
        """Answer one request.

        Args:
            transport: when the service is full, "grpc" and "http" are refused and a "stream" waits.
                Jobs of the "queue" were bounded when they were enqueued: they are counted, never
                refused, and finish during a drain.
            remaining_seconds: until the caller's deadline; None when it has none.
            malformed: sequences that could not even be decoded, by index.

        Raises TutelageError; a cancelled task withdraws its work from the engine.
        """
        deadline = None
        if remaining_seconds is not None:
            deadline = asyncio.get_running_loop().time() + remaining_seconds
        with self._counted(transport):
            if self.state != "ready" and not (transport == "queue" and self.state == "draining"):
                text = "loading its model" if self.state == "loading" else "draining"
                raise TutelageError("UNAVAILABLE", f"teacher: the service is {text}", retry_after=1.0)
            identity = self.identity_of(request.teacher)
            check_request(request, identity, self.limits)
            problems = {**check_sequences(request, identity, self.limits), **(malformed or {})}
            return await self._score_checked(request, problems, deadline, transport)

    async def _score_checked(
        self,
        request: ScoreRequest,
        problems: Mapping[int, SequenceError],
        deadline: float | None,
        transport: Transport,
    ) -> Score:
        for problem in problems.values():
            self.metrics.sequence_errors.labels(problem.code).inc()
        if len(problems) == len(request.sequences):
            failed = [SequenceScore(s.id, problems[i]) for i, s in enumerate(request.sequences)]
            identity = self.identity_of(request.teacher)
            return Score(tuple(failed), identity, request_id=request.request_id)
        work = _without(request, problems)
        score = await self._admitted(work, deadline, transport)
        check_pins(request.pins, score.identity)  # weights may have changed while it waited
        guarded = self._guarded(work, score)
        if problems:
            scored = iter(guarded)
            guarded = [
                SequenceScore(s.id, problems[i]) if i in problems else next(scored)
                for i, s in enumerate(request.sequences)
            ]
        return replace(score, sequences=tuple(guarded), request_id=request.request_id)

    async def _admitted(self, request: ScoreRequest, deadline: float | None, transport: Transport) -> Score:
        """Hold the request's tokens in the admission count while the engine has it."""
        tokens = codec.request_tokens(request)
        async with _in_time(deadline):
            await self._admit(tokens, deadline, transport)
            self.metrics.queued_tokens.set(self.admission.queued_tokens)
            answered = False
            try:
                self.metrics.engine_requests.inc()
                with tracing.span("engine") as span:
                    score = await self._scorer.score(request)
                    if tracing.enabled():
                        span.set(spent(score))
                answered = True
                return score
            finally:
                self.admission.leave(tokens, answered=answered)
                self.metrics.queued_tokens.set(self.admission.queued_tokens)
                self.metrics.throughput.set(self.admission.tokens_per_second or 0.0)

    async def _admit(self, tokens: int, deadline: float | None, transport: Transport) -> None:
        if transport == "queue":
            self.admission.enter_unchecked(tokens)
        elif transport == "stream":
            await self.admission.enter_when_free(tokens)
        else:
            now = asyncio.get_running_loop().time()
            self.admission.enter(tokens, None if deadline is None else deadline - now)

    def _guarded(self, request: ScoreRequest, score: Score) -> list[SequenceScore]:
        if len(score.sequences) != len(request.sequences):
            raise TutelageError(
                "INTERNAL",
                f"engine answered {len(score.sequences)} sequences, asked were {len(request.sequences)}",
            )
        guarded, invalid, positions = [], 0, 0
        for answer, sequence in zip(score.sequences, request.sequences, strict=True):
            checked, bad = guard(answer, sequence, request.signal)
            if checked.error is not None:
                self.metrics.sequence_errors.labels(checked.error.code).inc()
            guarded.append(checked)
            invalid += bad
            positions += checked.num_positions
        self.metrics.positions.inc(positions)
        self.metrics.tokens_computed.inc(score.usage.tokens_computed)
        self.metrics.tokens_reused.inc(score.usage.tokens_reused)
        self.metrics.engine_seconds.inc(score.usage.compute_ms / 1e3)
        if invalid:
            self.metrics.invalid_positions.inc(invalid)
            _log.warning("scores_not_finite", positions=invalid, of=positions)
        return guarded

    @contextmanager
    def _counted(self, transport: Transport) -> Iterator[None]:
        """Count the request, keep the drain waiting for it, and let only TutelageError out."""
        began = asyncio.get_running_loop().time()
        code = "INTERNAL"
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
            code = "OK"
        except TutelageError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as error:
            _log.exception("scoring_failed", transport=transport)
            message = f"engine failed with {type(error).__name__}; see the teacher's log"
            raise TutelageError("INTERNAL", message) from error
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            self.metrics.requests.labels(transport, code).inc()
            seconds = asyncio.get_running_loop().time() - began
            self.metrics.seconds.labels(transport).observe(seconds)


@asynccontextmanager
async def _in_time(deadline: float | None) -> AsyncIterator[None]:
    """DEADLINE_EXCEEDED when the loop's clock passes `deadline`, also when it already has."""
    if deadline is not None and deadline <= asyncio.get_running_loop().time():
        raise TutelageError("DEADLINE_EXCEEDED", "deadline: passed before the request reached the engine")
    try:
        async with asyncio.timeout_at(deadline) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        message = "deadline: passed while the request waited or was with the engine"
        raise TutelageError("DEADLINE_EXCEEDED", message) from error


def spent(score: Score) -> tracing.Attributes:
    """What the engine says about an answer, for a span."""
    usage, identity = score.usage, score.identity
    return {
        "tutelage.teacher": identity.name,
        "tutelage.weights_version": identity.weights_version,
        "tutelage.engine": identity.engine,
        "tutelage.sequences": len(score.sequences),
        "tutelage.positions": usage.positions,
        "tutelage.tokens_computed": usage.tokens_computed,
        "tutelage.tokens_reused": usage.tokens_reused,
        "tutelage.engine_queue_ms": usage.queue_ms,
        "tutelage.engine_compute_ms": usage.compute_ms,
    }


def _without(request: ScoreRequest, problems: Mapping[int, SequenceError]) -> ScoreRequest:
    """The request less its bad sequences and every context that then serves nobody."""
    if not problems and len({s.context for s in request.sequences}) == len(request.contexts):
        return request
    return request.only(s for i, s in enumerate(request.sequences) if i not in problems)
