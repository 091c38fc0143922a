"""The vLLM engine: continuous batching, shared prefixes, tensor parallel; scores in one pass."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import structlog
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Identity, Limits, Score, ScoreRequest

from services.models.adapters import Adapter, read_adapters
from services.models.fingerprint import directory_revision, tokenizer_fingerprint
from services.models.judge_settings import JudgeSettings
from services.models.load import load_tokenizer, model_files
from services.models.vllm_adapter import Residue, StepEngine
from services.models.vllm_settings import VllmSettings
from services.models.weights import ModelDescription, check_same_model, describe
from services.models.writer_settings import WriterSettings
from services.teacher.engines.batching import Answer, Control
from services.teacher.engines.vllm.generated import Generated
from services.teacher.engines.vllm.judged import Judged
from services.teacher.engines.vllm.pooled import Pooled
from services.teacher.engines.vllm.stock import Stock
from services.teacher.engines.vllm.thread import EngineThread
from services.teacher.engines.vllm.work import Counters, Job
from services.teacher.engines.vllm.written import Written
from services.teacher.judge import Judge
from services.teacher.text_teacher import end_tokens
from services.teacher.writer import Writer

CLOSE_SECONDS = 5.0

log = structlog.get_logger(__name__)


class VllmEngine:
    """An Engine over one vLLM engine in this process.

    Args:
        model: local directory or hub id.
        name: the teacher name of its identity.
        dtype: float32, bfloat16, float16 or "auto" (as saved).
        head_dtype: type in which logits are computed; "model" is the model's own.
        settings: everything else that vLLM is told.
        limits: narrowed to what the model and the way of scoring can do.
        adapters: directories of LoRA adapters by the names of the teachers that they make of the model;
            `name` itself is the model alone, unless an adapter has that name. All share the engine's
            batches; nothing else is shared but the weights.
        judge: says judgements instead of log-probabilities, see `services/teacher/judge.py`.
        writer: writes continuations instead, see `services/teacher/writer.py`; not beside a judge.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        name: str = "teacher",
        dtype: str = "auto",
        revision: str | None = None,
        head_dtype: str = "float32",
        settings: VllmSettings | None = None,
        limits: Limits | None = None,
        adapters: Mapping[str, Path] | None = None,
        judge: JudgeSettings | None = None,
        writer: WriterSettings | None = None,
    ) -> None:
        self._model = str(model)
        self._name = name
        self._dtype = dtype
        self._revision = revision
        self._head_dtype = head_dtype
        self._settings = settings or VllmSettings()
        self._limits = limits or Limits()
        self._scoring = self._scoring_for(judge, writer)
        self._adapters = dict(adapters or {})
        self._names = tuple(dict.fromkeys([name, *self._adapters]))
        self._line = EngineThread(self._open, self._scoring, self._identity_of, self._adapter_of)
        self._thread: threading.Thread | None = None
        self._ended: Answer[None] | None = None
        self._engine: StepEngine | None = None
        self._directory: Path | None = None  # of what is served
        self._content: str | None = None  # its hash; None for a hub model, whose files nobody replaces
        self._description: ModelDescription | None = None
        self._identities: dict[str, Identity] = {}

    @property
    def identity(self) -> Identity:
        """What scores now; raises UNAVAILABLE before `start` has returned."""
        return self.identities[0]

    @property
    def identities(self) -> tuple[Identity, ...]:
        if not self._identities:
            raise TutelageError("UNAVAILABLE", "engine: the model is not loaded", retry_after=1.0)
        return tuple(self._identities.values())

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def counters(self) -> Counters:
        return self._line.counters

    async def start(self) -> None:
        ready: Answer[None] = Answer()
        self._ended = Answer()
        self._thread = self._line.start(ready, self._ended)
        await ready.future

    async def score(self, request: ScoreRequest) -> Score:
        if not request.sequences:
            return Score((), self._identity_of(request.teacher), request_id=request.request_id)
        job = Job(request, Answer())
        self._line.submit(job)
        return await job.answer.future

    async def load_weights(self, path: Path, weights_version: int, weights_id: str = "") -> None:
        """Swap weights when no request is under way; raises TutelageError and keeps the old ones."""
        answer: Answer[None] = Answer()
        self._line.submit_control(Control(lambda: self._swap(path, weights_version, weights_id), answer))
        await answer.future

    async def ended(self) -> None:
        """Return when nothing will be answered any more: closed, or beyond recovery."""
        assert self._ended is not None
        await asyncio.shield(self._ended.future)

    async def close(self) -> None:
        """Take no more work and wait a moment for the thread; a step cannot be interrupted."""
        self._line.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)

    async def residue(self) -> Residue:
        """What vLLM still holds for requests; waits until none is under way."""
        found: list[Residue] = []
        answer: Answer[None] = Answer()
        engine = self._engine
        assert engine is not None
        self._line.submit_control(Control(lambda: found.append(engine.residue()), answer))
        await answer.future
        return found[0]

    def _scoring_for(
        self, judge: JudgeSettings | None, writer: WriterSettings | None
    ) -> Pooled | Stock | Judged | Written:
        if judge is not None:
            return Judged(lambda most: Judge(judge, self._tokenizer(), positions=most, ends=self._ends()))
        if writer is not None:
            return Written(lambda most: Writer(writer, self._tokenizer(), positions=most, ends=self._ends()))
        return Stock() if self._settings.implementation == "stock" else Pooled()

    def _tokenizer(self) -> Any:
        return load_tokenizer(self._model, self._revision)

    def _ends(self) -> list[int]:
        """Tokens that end a reply."""
        from transformers import GenerationConfig

        directory = model_files(self._model, self._revision).directory
        named = directory / "generation_config.json"
        generation = GenerationConfig.from_pretrained(directory) if named.is_file() else None
        return end_tokens(generation, self._tokenizer())

    def _identity_of(self, teacher: str) -> Identity:
        return self._identities[teacher or self._names[0]]

    def _adapter_of(self, teacher: str) -> str | None:
        name = teacher or self._names[0]
        return name if name in self._adapters else None

    # From here on: the engine's thread.

    def _open(self) -> StepEngine:
        scoring = self._scoring
        if self._revision is not None and Path(self._model).is_dir():
            raise invalid(
                f"revision: got {self._revision!r} for the local directory {self._model}; its content decides"
            )
        adapters = read_adapters(self._adapters)
        engine = StepEngine(
            self._model,
            purpose=scoring.purpose,
            settings=self._settings,
            dtype=self._dtype,
            revision=self._revision,
            head_dtype=self._head_dtype,
            make_model=scoring.make_model,
            adapters=adapters,
            seeded=isinstance(scoring, Written),
        )
        facts, files = engine.facts, model_files(self._model, self._revision)
        self._engine, self._directory = engine, files.directory
        self._content = files.revision if Path(self._model).is_dir() else None
        self._description = describe(files.directory)
        self._limits = scoring.limits(self._limits, facts)
        base = Identity(
            name=self._name,
            model=self._model,
            revision=files.revision,
            weights_version=0,
            tokenizer_fingerprint=tokenizer_fingerprint(self._tokenizer()),
            vocab_size=facts.vocab_size,
            engine=scoring.name,
            engine_version=" ".join([facts.version, *self._settings.changes_to_numbers()]),
            dtype=facts.dtype,
            head_dtype=facts.head_dtype,
        )
        if isinstance(scoring, Generated):
            base = scoring.opened.identity(base)
        self._identities = _identities(base, self._names, adapters)
        log.info("vllm_started", **asdict(facts))
        return engine

    def _swap(self, path: Path, weights_version: int, weights_id: str) -> None:
        assert self._engine is not None and self._directory is not None  # noqa: PT018
        assert self._description is not None
        if self._adapters or isinstance(self._scoring, Generated):
            raise TutelageError(
                "FAILED_PRECONDITION",
                "weights: got others for a model with adapters, a judge or a writer, which keep their own",
            )
        check_same_model(self._description, path)
        revision = directory_revision(path)
        try:
            self._engine.load_weights(path)
        except Exception as error:
            if self._settings.tensor_parallel_size > 1:  # ranks may have answered differently
                self._line.close()
                raise
            failed = TutelageError(
                "FAILED_PRECONDITION",
                f"weights: vLLM could not load {path}: {type(error).__name__}: {error}",
            )
            self._restore(failed)
            raise failed from error
        self._directory, self._content = path, revision
        self._identities = {
            self._name: replace(
                self.identity, revision=revision, weights_version=weights_version, weights_id=weights_id
            )
        }
        log.info("weights_loaded", weights_version=weights_version, revision=revision)

    def _restore(self, failed: TutelageError) -> None:
        """Load once more what was served before new weights `failed`; without it nothing may be answered.

        Raises:
            TutelageError: INTERNAL, after which the engine ends, when it cannot be had back as it was.
        """
        assert self._engine is not None and self._directory is not None  # noqa: PT018
        try:
            self._engine.load_weights(self._directory)
            # Hashed after it was read: what took its place before or meanwhile was read, too.
            if self._content is not None and (found := directory_revision(self._directory)) != self._content:
                raise ValueError(f"its content is {found[:12]} now, {self._content[:12]} was served")
        except Exception as error:
            self._line.close()
            lost = f"{self._directory}, which was served, cannot be loaded again: {error}"
            log.exception("weights_lost", error=lost)
            raise TutelageError("INTERNAL", f"{failed.message}; {lost}; this engine ends") from error


def _identities(base: Identity, names: tuple[str, ...], adapters: tuple[Adapter, ...]) -> dict[str, Identity]:
    """Each teacher's own: model and revision name the adapter, too."""
    adapted = {
        adapter.name: replace(
            base,
            name=adapter.name,
            model=adapter.model(base.model),
            revision=adapter.revision(base.revision),
        )
        for adapter in adapters
    }
    return {name: adapted.get(name, base) for name in names}
