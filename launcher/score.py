"""`tutelage score`: the responses of a JSONL file against a teacher, written as JSONL or Parquet."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Limits, Pins, Score, ScoreRequest, Sequence, Signal

from launcher.score_files import Row, open_sink, read_rows, record_of
from services.logs import log_to_stderr

if TYPE_CHECKING:
    from rich.progress import Progress

    from services.teacher.settings import TeacherSettings

IN_FLIGHT = 4  # requests on their way at once


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """The command's options; exactly one of `teacher` and `model` is given."""

    teacher: str | None
    model: str | None
    engine: str
    tokenizer: str | None
    output: Path
    signal: Signal
    batch_tokens: int
    token: str | None


class Scores(Protocol):
    """Where requests go: a client, or a core over an engine in this process."""

    async def __call__(self, request: ScoreRequest) -> Score: ...


def score_file(source: Path, options: ScoreOptions) -> int:
    """Score every line of `source`; 0 when all were scored, 1 when some were refused.

    Raises:
        TutelageError: the options, the file or the teacher do not fit; nothing is written then.
    """
    log_to_stderr(logging.WARNING)
    if (options.teacher is None) == (options.model is None):
        raise invalid("give exactly one of --teacher HOST:PORT and --model PATH_OR_ID")
    if options.output.suffix not in (".jsonl", ".parquet"):
        raise invalid(f"--output: got {str(options.output)!r}, must end in .jsonl or .parquet")
    encode = _Encoder(options.tokenizer or options.model)
    lines = sum(1 for _ in read_rows(source, encode))  # also finds a bad line before any is scored
    refused = asyncio.run(_score_all(source, lines, encode, options))
    print(f"{options.output}: {lines} responses scored" + (f", {refused} refused" if refused else ""))
    return 1 if refused else 0


async def _score_all(source: Path, lines: int, encode: _Encoder, options: ScoreOptions) -> int:
    refused = 0
    async with _scores(options, encode) as (scores, limits):
        batch_tokens = min(options.batch_tokens, limits.max_request_tokens)
        with _progress(lines) as progress, open_sink(options.output) as sink:
            task = progress.add_task("scoring", total=lines)
            waiting: deque[tuple[list[Row], asyncio.Task[Score]]] = deque()

            async def take() -> None:
                nonlocal refused
                rows, answer = waiting.popleft()
                for row, sequence in zip(rows, (await answer).sequences, strict=True):
                    refused += sequence.error is not None
                    sink.write(record_of(row, sequence))
                progress.advance(task, len(rows))

            for rows in batches(read_rows(source, encode), batch_tokens, limits.max_sequences):
                waiting.append((rows, asyncio.ensure_future(scores(request_of(rows, options.signal)))))
                if len(waiting) == IN_FLIGHT:
                    await take()
            while waiting:
                await take()
    return refused


def batches(rows: Iterator[Row], batch_tokens: int, batch_rows: int) -> Iterator[list[Row]]:
    """Consecutive rows, at most `batch_rows` with at most `batch_tokens` tokens; a longer row goes alone."""
    batch: list[Row] = []
    tokens = 0
    for row in rows:
        if batch and (len(batch) == batch_rows or tokens + row.tokens > batch_tokens):
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += row.tokens
    if batch:
        yield batch


def request_of(rows: list[Row], signal: Signal) -> ScoreRequest:
    """One request; neighbouring rows with the same context share it."""
    contexts: list[Any] = []
    places: dict[bytes, int] = {}
    sequences = []
    for index, row in enumerate(rows):
        key = row.context_ids.tobytes()
        if key not in places:
            places[key] = len(contexts)
            contexts.append(row.context_ids)
        sequences.append(Sequence(str(index), places[key], row.response_ids))
    return ScoreRequest(tuple(contexts), tuple(sequences), signal=signal, pins=Pins())


@asynccontextmanager
async def _scores(options: ScoreOptions, encode: _Encoder) -> AsyncIterator[tuple[Scores, Limits]]:
    """A connected teacher whose tokenizer matches, or a loaded model; and what it takes at once."""
    if options.teacher is not None:
        from tutelage_client import AsyncTeacherClient

        async with AsyncTeacherClient(options.teacher, token=options.token) as client:
            served = await client.get_teacher(timeout=10.0)
            _check_fingerprint(encode, served.identity.tokenizer_fingerprint)
            yield client.score_request, served.limits
        return
    from services.api.core import ScoringCore
    from services.teacher.build import build_engine

    engine = build_engine(_engine_settings(options))
    await engine.start()
    try:
        core = ScoringCore(engine, max_queued_tokens=2**62, max_message_bytes=2**31 - 1)
        core.open()
        yield partial(core.score, transport="queue"), engine.limits
    finally:
        await engine.close()


def _engine_settings(options: ScoreOptions) -> TeacherSettings:
    from services.teacher.settings import TeacherSettings

    settings: dict[str, Any] = {"model": options.model, "engine": options.engine}
    if options.engine == "transformers":
        settings["max_batch_tokens"] = options.batch_tokens
    return TeacherSettings.model_validate(settings)


class _Encoder:
    """Text to ids with one tokenizer, loaded when the first text comes."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._tokenizer: Any = None

    @property
    def used(self) -> Any:
        """The tokenizer, once it has been used."""
        return self._tokenizer

    def __call__(self, text: str) -> Any:
        if self._tokenizer is None:
            if self._name is None:
                raise invalid(
                    "the file holds text; name its --tokenizer, or give context_ids and response_ids"
                )
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._name)
            except OSError as error:
                raise invalid(f"--tokenizer: {self._name} cannot be loaded: {error}") from error
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def _check_fingerprint(encode: _Encoder, fingerprint: str) -> None:
    if encode.used is None:
        return
    from services.models.fingerprint import tokenizer_fingerprint

    own = tokenizer_fingerprint(encode.used)
    if fingerprint and own != fingerprint:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"--tokenizer: fingerprint {own[:12]}…, the teacher's is {fingerprint[:12]}…: "
            "ids would stand for other text",
        )


def _progress(total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
