"""The transformers engine: any causal LM that Hugging Face loads, scored in packed batches.

Torch runs in one compute thread; the event loop only submits and awaits. Requests that wait while
a batch computes share the next one, whatever their signals and temperatures. With
`deterministic`, each request has forward passes of its own and one torch thread, so that its
scores depend on nothing else, bit for bit.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog
import torch
import transformers
from tutelage_client.errors import TutelageError
from tutelage_client.types import Identity, Limits, Score, ScoreRequest, Usage

from services.models.adapters import read_adapter
from services.models.fingerprint import tokenizer_fingerprint
from services.models.judge_settings import JudgeSettings
from services.models.load import LoadedModel, load_causal_lm, load_weights
from services.models.writer_settings import WriterSettings
from services.teacher.engines.batching import Answer, Control, Job, Unit, WaitingLine
from services.teacher.engines.forward import GIVEN_UP, BatchScores, PackedScorer
from services.teacher.engines.judge import JudgeScorer
from services.teacher.engines.scoring_head import ScoringHead
from services.teacher.engines.writer import WriterScorer
from services.teacher.judge import Judge
from services.teacher.text_teacher import end_tokens
from services.teacher.writer import Writer

CLOSE_SECONDS = 1.0

log = structlog.get_logger(__name__)


@dataclass
class Counters:
    """What the engine has done since it started."""

    batches: int = 0
    requests: int = 0
    positions: int = 0
    invalid_positions: int = 0
    tokens_computed: int = 0


class TransformersEngine:
    """An Engine over one model in this process.

    Args:
        model: local directory or hub id.
        name: the teacher name of its identity.
        dtype: float32, bfloat16, float16 or "auto" (as saved).
        head_dtype: type in which logits are computed; "model" is the model's own.
        max_batch_tokens: packed tokens of one forward pass; one longer sequence still gets its own.
        limits: narrowed to what the model can do (its positions, its vocabulary).
        threads: torch threads of the compute thread; None leaves torch's default.
        adapter: directory of a LoRA adapter, which is merged into the model.
        judge: says judgements instead of log-probabilities, see `services/teacher/judge.py`.
        writer: writes continuations instead, see `services/teacher/writer.py`; not beside a judge.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        name: str = "teacher",
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        head_dtype: str = "float32",
        max_batch_tokens: int = 16_384,
        deterministic: bool = False,
        threads: int | None = None,
        limits: Limits | None = None,
        adapter: Path | None = None,
        judge: JudgeSettings | None = None,
        writer: WriterSettings | None = None,
    ) -> None:
        self._text = judge or writer  # of a teacher of words
        self._model_name = str(model)
        self._name = name
        self._load: Callable[..., LoadedModel] = partial(
            load_causal_lm,
            model,
            dtype=dtype,
            device=device,
            revision=revision,
            attention="packed" if self._text is None else "plain",
        )
        self._adapter = adapter
        self._head_dtype = head_dtype
        self._threads = 1 if deterministic else threads
        self._limits = limits or Limits()
        self._line = WaitingLine(max_batch_tokens, alone=deterministic)
        self._thread: threading.Thread | None = None
        self._ended: Answer[None] | None = None
        self._scorer: PackedScorer | JudgeScorer | WriterScorer | None = None
        self._identity: Identity | None = None
        self.counters = Counters()

    @property
    def identity(self) -> Identity:
        """What scores now; raises UNAVAILABLE before `start` has returned."""
        if self._identity is None:
            raise TutelageError("UNAVAILABLE", "engine: the model is not loaded", retry_after=1.0)
        return self._identity

    @property
    def identities(self) -> tuple[Identity, ...]:
        return (self.identity,)

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def dropped_requests(self) -> int:
        """Requests withdrawn before they were finished, whose remaining work was not done."""
        return self._line.dropped_jobs

    async def start(self) -> None:
        ready: Answer[None] = Answer()
        self._ended = Answer()
        self._thread = threading.Thread(
            target=self._live, args=(ready, self._ended), name="compute", daemon=True
        )
        self._thread.start()
        await ready.future

    async def score(self, request: ScoreRequest) -> Score:
        answer: Answer[Score] = Answer()
        if not request.sequences:
            return Score((), self.identity, request_id=request.request_id)
        self._line.submit(Job(request, answer))
        return await answer.future

    async def load_weights(self, path: Path, weights_version: int, weights_id: str = "") -> None:
        """Swap weights when no request is half scored; raises TutelageError and keeps the old ones."""
        answer: Answer[None] = Answer()
        self._line.submit_control(Control(lambda: self._swap(path, weights_version, weights_id), answer))
        await answer.future

    async def ended(self) -> None:
        """Return when the compute thread has ended, after which nothing is answered."""
        assert self._ended is not None
        await asyncio.shield(self._ended.future)

    async def close(self) -> None:
        """Take no more work and wait a moment for the compute thread.

        A load or a forward pass cannot be interrupted: a thread in one is left behind. It is a daemon
        and ends after that, or with the process.
        """
        self._line.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)
            if self._thread.is_alive():
                return
        self._scorer = None

    # From here on: the compute thread.

    def _live(self, ready: Answer[None], ended: Answer[None]) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            if not _attempt(self._open, ready, "loading"):
                return
            while (work := self._line.take()) is not None:
                if isinstance(work, Control):
                    _attempt(work.run, work.answer, "control")
                else:
                    self._outlive(work)
        finally:
            self._line.close()  # however this thread ends, nobody waits for it
            ended.resolve(None)

    def _outlive(self, batch: list[Unit]) -> None:
        """Run a batch; whatever goes wrong, its callers hear of it and the thread goes on."""
        try:
            self._run(batch)
        except Exception as error:
            _fail(list(dict.fromkeys(unit.job for unit in batch)), error)
            log.exception("engine_failed", during="batch")

    def _open(self) -> None:
        adapter = None if self._adapter is None else read_adapter(self._name, self._adapter)
        loaded = self._load(adapter=adapter)
        self._scorer = self._scorer_for(loaded)
        text = loaded.model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        limits = self._limits
        self._limits = replace(
            limits,
            max_sequence_tokens=min(limits.max_sequence_tokens, positions or limits.max_sequence_tokens),
            max_top_k=min(limits.max_top_k, loaded.vocab_size),
            hidden_layers=getattr(text, "num_hidden_layers", 0),
            hidden_size=getattr(text, "hidden_size", 0),
        )
        self._identity = Identity(
            name=self._name,
            model=self._model_name if adapter is None else adapter.model(self._model_name),
            revision=loaded.revision,
            weights_version=0,
            tokenizer_fingerprint=tokenizer_fingerprint(loaded.tokenizer),
            vocab_size=loaded.vocab_size,
            engine="transformers",
            engine_version=transformers.__version__,
            dtype=_name(loaded.model.dtype),
            head_dtype=_name(self._head_type(loaded)),
        )
        if not isinstance(self._scorer, PackedScorer):
            self._limits = self._scorer.teacher.limits(self._limits)
            self._identity = self._scorer.teacher.identity(self._identity)

    def _scorer_for(self, loaded: LoadedModel) -> PackedScorer | JudgeScorer | WriterScorer:
        if self._text is None:
            return PackedScorer(loaded, ScoringHead(loaded.head.cast(self._head_type(loaded))))
        tokenizer = loaded.tokenizer
        positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        ends = end_tokens(loaded.model.generation_config, tokenizer)
        if isinstance(self._text, JudgeSettings):
            return JudgeScorer.of(loaded, Judge(self._text, tokenizer, positions=positions, ends=ends))
        return WriterScorer.of(loaded, Writer(self._text, tokenizer, positions=positions, ends=ends))

    def _head_type(self, loaded: LoadedModel) -> torch.dtype:
        as_saved = self._head_dtype == "model" or self._text is not None
        dtype: torch.dtype = loaded.model.dtype if as_saved else getattr(torch, self._head_dtype)
        return dtype

    def _swap(self, path: Path, weights_version: int, weights_id: str) -> None:
        assert self._scorer is not None
        if self._adapter is not None or self._text is not None:
            raise TutelageError(
                "FAILED_PRECONDITION",
                "weights: got others for a model with an adapter, a judge or a writer, which keep their own",
            )
        revision = load_weights(self._scorer.loaded.model, path)
        self._scorer = self._scorer_for(self._scorer.loaded)
        self._identity = replace(
            self.identity, revision=revision, weights_version=weights_version, weights_id=weights_id
        )
        log.info("weights_loaded", weights_version=weights_version, revision=revision)

    def _run(self, batch: list[Unit]) -> None:
        """Score a batch; if it fails, score its requests one by one so that only the bad one fails."""
        assert self._scorer is not None
        began = time.perf_counter()
        jobs = list(dict.fromkeys(unit.job for unit in batch))
        for job in jobs:
            job.began = began if job.began is None else job.began
        try:
            scores = self._scorer.score(batch)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._run([unit for unit in batch if unit.job is job])
                return
            _fail(jobs, error)  # first: a log that cannot be written must not keep anyone waiting
            log.exception("batch_failed", sequences=sum(len(unit.sequences) for unit in batch))
            return
        self._record(batch, scores, time.perf_counter() - began)

    def _record(self, batch: list[Unit], scores: BatchScores, seconds: float) -> None:
        self.counters.batches += 1
        self.counters.tokens_computed += scores.tokens_computed
        whole = sum(unit.tokens for unit in batch)
        for unit, part in zip(batch, scores.units, strict=True):
            job = unit.job
            job.scores.update(part.sequences)
            job.tokens_computed += part.tokens_computed
            job.tokens_reused += part.tokens_reused
            job.compute_seconds += seconds * unit.tokens / whole
            job.open_units -= 1
            self.counters.positions += part.positions
            self.counters.invalid_positions += part.invalid_positions
            if part is GIVEN_UP:
                self._line.give_up(job)
            elif job.open_units == 0 and not job.dropped:
                self._finish(job)

    def _finish(self, job: Job) -> None:
        assert job.began is not None
        self.counters.requests += 1
        sequences = job.request.sequences
        usage = Usage(
            positions=sum(len(sequence.response_ids) for sequence in sequences),
            tokens_computed=job.tokens_computed,
            tokens_reused=job.tokens_reused,
            queue_ms=(job.began - job.arrived) * 1e3,
            compute_ms=job.compute_seconds * 1e3,
        )
        ordered = tuple(job.scores[index] for index in range(len(sequences)))
        job.answer.resolve(Score(ordered, self.identity, usage, job.request.request_id))


def _attempt(run: Callable[[], None], answer: Answer[None], what: str) -> bool:
    """Run and settle `answer` either way; the compute thread outlives a failed control."""
    try:
        run()
    except TutelageError as error:
        answer.fail(error)
        return False
    except Exception as error:
        answer.fail(TutelageError("INTERNAL", f"engine: {what} failed with {type(error).__name__}: {error}"))
        log.exception("engine_failed", during=what)
        return False
    answer.resolve(None)
    return True


def _fail(jobs: list[Job], error: Exception) -> None:
    for job in jobs:
        job.failed = True
        message = f"engine: scoring failed with {type(error).__name__}: {error}"
        job.answer.fail(TutelageError("INTERNAL", message))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
