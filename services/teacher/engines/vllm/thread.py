"""The thread that owns a vLLM engine: requests in, steps, scores out.

Every sequence of a request is one vLLM request (with a writer one for each chunk), handed over together
with its siblings as far as there is room, so that a shared context is computed once. vLLM batches across
requests; here is what it leaves to its owner: prompts that are made when there is room for them, withdrawn
work, weights between requests, rows that did not come back, a step that failed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import structlog
from tutelage_client.errors import TutelageError
from tutelage_client.types import (
    Identity,
    Score,
    ScoreRequest,
    Sequence,
    SequenceScore,
    Signal,
    Usage,
)

from services.models.vllm_adapter import StepEngine
from services.teacher.engines.batching import Answer, Control
from services.teacher.engines.vllm.questions import Answered, Scoring
from services.teacher.engines.vllm.work import Counters, Job, Unit

IDLE_SECONDS = 0.05
# Prompt ids that vLLM is handed before others have to wait for answers: some hundred MB as lists. It is more
# than a step or the KV cache holds, so that nothing is computed later for it.
HANDED_TOKENS = 4_194_304
# A small question for every way of scoring. A tokenizer's first ids are often special and say nothing; of a
# prompt of these alone a writer without a template would have nothing to go on from.
_PROMPT = np.arange(8, dtype=np.int32)
_TOKEN = np.zeros(1, dtype=np.int32)
_PROBE = Sequence("probe", 0, _TOKEN, anchors=_TOKEN)
_PROBES = ScoreRequest((_PROMPT,), (_PROBE,), Signal(continuations=1, chunk_tokens=1))

log = structlog.get_logger(__name__)


class EngineThread:
    """Runs one StepEngine; `submit`, `submit_control` and `close` may be called from the event loop.

    Args:
        open_engine: makes the engine, in the thread.
        scoring: how sequences are asked and answered.
        identity: what scores now under a teacher's name; it only changes inside controls.
        adapter: what the engine calls the adapter of a teacher's name; None for the base.
    """

    def __init__(
        self,
        open_engine: Callable[[], StepEngine],
        scoring: Scoring,
        identity: Callable[[str], Identity],
        adapter: Callable[[str], str | None] = lambda _name: None,
    ) -> None:
        self._open_engine = open_engine
        self._scoring = scoring
        self._identity = identity
        self._adapter = adapter
        self._changed = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._controls: deque[Control] = deque()
        self._closed = False
        self._units: dict[str, Unit] = {}
        self._jobs: dict[Job, None] = {}  # in order of admission
        self._ids = itertools.count()
        self._busy_seconds = 0.0
        self.counters = Counters()

    def start(self, ready: Answer[None], ended: Answer[None]) -> threading.Thread:
        """Begin; `ready` is settled when the engine serves or cannot, `ended` when it stops to answer."""
        thread = threading.Thread(target=self._live, args=(ready, ended), name="vllm", daemon=True)
        thread.start()
        return thread

    def submit(self, job: Job) -> None:
        with self._changed:
            self._refuse_if_closed()
            self._inbox.append(job)
            self._changed.notify()

    def submit_control(self, control: Control) -> None:
        """Run something while no request is under way; requests that come later wait for it."""
        with self._changed:
            self._refuse_if_closed()
            self._controls.append(control)
            self._changed.notify()

    def close(self) -> None:
        """Take nothing more and fail what is there; the thread ends after the step it is in."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise _closed_error()

    # From here on: the thread.

    def _live(self, ready: Answer[None], ended: Answer[None]) -> None:
        try:
            self._engine = self._open_engine()
        except TutelageError as error:
            ready.fail(error)
            return
        except (Exception, SystemExit) as error:
            log.exception("engine_failed", during="loading")
            ready.fail(TutelageError("INTERNAL", f"engine: loading failed: {type(error).__name__}: {error}"))
            return
        ready.resolve(None)
        try:
            while self._wait_for_work():
                self._drop_withdrawn()
                self._admit()
                self._hand_over()
                if self._units:
                    self._step()
        except Exception:
            log.exception("engine_failed", during="serving")
        finally:
            self._end()
            ended.resolve(None)  # before closing, which can take long and, after a device's error, fail
            self._close_engine()

    def _wait_for_work(self) -> bool:
        """Block while there is nothing to do; False when closed."""
        with self._changed:
            if self._changed.wait_for(self._has_something, IDLE_SECONDS):
                return not self._closed
        self._engine.settle()  # not at once: the next request would wait for it
        with self._changed:
            self._changed.wait_for(self._has_something)
            return not self._closed

    def _has_something(self) -> bool:
        return bool(self._closed or self._jobs or self._inbox or self._controls)

    def _drop_withdrawn(self) -> None:
        for job in [job for job in self._jobs if job.answer.withdrawn]:
            self.counters.withdrawn += 1
            self._drop(job)

    def _drop(self, job: Job) -> None:
        """Take a job's sequences out of vLLM."""
        ids = list(job.open)
        job.open.clear()
        self._jobs.pop(job, None)
        for unit_id in ids:
            self._units.pop(unit_id, None)
        self._engine.abort(ids)
        if not self._units:
            self._busy_seconds = 0.0

    def _admit(self) -> None:
        """Begin everything that waits, in order; controls and second chances go in between."""
        while True:
            with self._changed:
                if self._closed or (self._controls and self._jobs):  # a control may have closed it
                    return
                control = self._controls.popleft() if self._controls else None
                job = None
                if control is None:
                    alone = any(other.alone for other in self._jobs)
                    if not self._inbox or alone or (self._inbox[0].alone and self._jobs):
                        return
                    job = self._inbox.popleft()
            if control is not None:
                _attempt(control)
            elif job is not None and job.answer.withdrawn:
                self.counters.withdrawn += 1
            elif job is not None:
                job.admitted = time.perf_counter()
                self._jobs[job] = None

    def _hand_over(self) -> None:
        """Ask vLLM, which queues it, about all that was begun, as far as there is room for the prompts.

        They are made one sequence after another: together they are many times the size of their request
        where a context, or a response, is read again and again.
        """
        room = HANDED_TOKENS - sum(job.held for job in self._jobs)
        for job in list(self._jobs):
            try:
                while job in self._jobs and job.handed < len(job.request.sequences):
                    if self._closed or job.answer.withdrawn or room <= 0:
                        return
                    job.handed += 1
                    before = job.held
                    self._add(job, job.handed - 1, read_cache=True)
                    room -= job.held - before
            except Exception as error:
                self._drop(job)
                log.exception("request_refused_by_vllm", request=job.request.request_id)
                job.answer.fail(
                    TutelageError("INTERNAL", f"engine: vLLM refused: {type(error).__name__}: {error}")
                )

    def _add(self, job: Job, index: int, *, read_cache: bool) -> None:
        sequence = job.request.sequences[index]
        asked = self._scoring.questions(job.request, sequence, read_cache=read_cache)
        if isinstance(asked, SequenceScore):
            self._store(job, index, asked)
            return
        job.waiting[index] = dict.fromkeys(range(len(asked)))
        for number, question in enumerate(asked):
            unit_id = str(next(self._ids))
            try:
                adapter = self._adapter(job.request.teacher)
                self._engine.add(unit_id, question.prompt, question.params, adapter)
            except Exception:
                self._engine.abort([unit_id])
                raise
            self._units[unit_id] = Unit(job, index, number, question, read_cache)
            job.held += question.held
            job.open.add(unit_id)

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            outputs = self._engine.step()
        except Exception as error:  # noqa: BLE001 - told to its callers and logged
            self._recover(error)
            return
        self.counters.steps += 1
        self._busy_seconds += time.perf_counter() - began
        self._record([output for output in outputs if output.finished])

    def _record(self, outputs: list[Any]) -> None:
        """Answer what is whole; compute time is shared among sequences that finish together."""
        finished = [(self._units.pop(output.request_id), output) for output in outputs]
        tokens = sum(len(unit.question.prompt) for unit, _ in finished)
        for unit, output in finished:
            job = unit.job
            job.open.discard(output.request_id)
            prompt, reused = len(unit.question.prompt), output.num_cached_tokens or 0
            job.tokens_reused += reused
            job.tokens_computed += prompt - reused
            job.compute_seconds += self._busy_seconds * prompt / tokens
            try:
                self._settle_unit(unit, output)
            except Exception as error:
                log.exception("answer_failed", request=job.request.request_id)
                self._drop(job)
                job.answer.fail(TutelageError("INTERNAL", f"engine: {type(error).__name__}: {error}"))
        if finished:
            self._busy_seconds = 0.0

    def _settle_unit(self, unit: Unit, output: Any) -> None:
        job = unit.job
        if job not in self._jobs:  # a sibling failed it
            return
        parts = job.waiting[unit.index]
        parts[unit.number] = Answered(unit.question, output)
        answered = [part for part in parts.values() if part is not None]
        if len(answered) < len(parts):
            return
        del job.waiting[unit.index]
        job.held -= sum(part.question.held for part in answered)
        score = self._scoring.answer(answered, job.request.sequences[unit.index], job.request.signal)
        if score is not None:
            self._store(job, unit.index, score)
        elif unit.read_cache:
            self.counters.rescored += 1
            log.warning("rows_missing", request=job.request.request_id, sequence=unit.index)
            self._add(job, unit.index, read_cache=False)
        else:
            self._drop(job)
            job.answer.fail(TutelageError("INTERNAL", "engine: vLLM computed fewer rows than were asked for"))

    def _store(self, job: Job, index: int, score: SequenceScore) -> None:
        job.scores[index] = score
        if len(job.scores) == len(job.request.sequences):
            self._finish(job)

    def _finish(self, job: Job) -> None:
        del self._jobs[job]
        positions = sum(len(sequence.response_ids) for sequence in job.request.sequences)
        self.counters.requests += 1
        self.counters.positions += positions
        self.counters.tokens_computed += job.tokens_computed
        self.counters.tokens_reused += job.tokens_reused
        usage = Usage(
            positions=positions,
            tokens_computed=job.tokens_computed,
            tokens_reused=job.tokens_reused,
            queue_ms=(job.admitted - job.arrived) * 1e3,
            compute_ms=job.compute_seconds * 1e3,
        )
        ordered = tuple(job.scores[index] for index in range(len(job.scores)))
        job.answer.resolve(Score(ordered, self._identity(job.request.teacher), usage, job.request.request_id))

    def _recover(self, error: Exception) -> None:
        """A step failed: a request that was alone in it is to blame, the others are tried one by one."""
        self.counters.failed_steps += 1
        affected = list(self._jobs)
        log.error("step_failed", requests=len(affected), error=f"{type(error).__name__}: {error}")
        if len(affected) == 1:
            message = f"engine: scoring failed with {type(error).__name__}: {error}"
            affected[0].answer.fail(TutelageError("INTERNAL", message))
        else:
            with self._changed:  # first: whatever happens below, `_end` finds them
                self._inbox.extendleft(reversed(affected))
        for job in affected:
            self._drop(job)
            job.alone = True
            job.handed = job.held = 0
            job.waiting.clear()
            job.scores.clear()
            job.tokens_computed = job.tokens_reused = 0
            job.compute_seconds = 0.0
        if len(affected) == 1:
            self._probe()  # what it raises ends the thread, and the replica with it

    def _probe(self) -> None:
        """Score one token; raises when the engine cannot even do that any more."""
        asked = self._scoring.questions(_PROBES, _PROBE, read_cache=False)
        if isinstance(asked, SequenceScore):
            raise RuntimeError(f"the probe was not asked: {asked.error}")
        self._engine.add("probe", asked[0].prompt, asked[0].params)
        while self._engine.has_work:
            if any(output.finished for output in self._engine.step()):
                return
        raise RuntimeError("the probe was not answered")

    def _end(self) -> None:
        """However the thread ends, nobody waits for it."""
        with self._changed:
            self._closed = True
            jobs = [*self._jobs, *self._inbox]
            controls = list(self._controls)
            self._inbox.clear()
            self._controls.clear()
        for job in jobs:
            job.answer.fail(_closed_error())
        for control in controls:
            control.answer.fail(_closed_error())
        self._jobs.clear()
        self._units.clear()

    def _close_engine(self) -> None:
        try:
            self._engine.close()
        except Exception:
            log.exception("engine_failed", during="closing")


def _attempt(control: Control) -> None:
    try:
        control.run()
    except TutelageError as error:
        control.answer.fail(error)
    except Exception as error:
        log.exception("engine_failed", during="control")
        control.answer.fail(TutelageError("INTERNAL", f"engine: {type(error).__name__}: {error}"))
    else:
        control.answer.resolve(None)


def _closed_error() -> TutelageError:
    return TutelageError("UNAVAILABLE", "engine: closed")
