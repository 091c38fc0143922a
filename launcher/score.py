"""`tutelage score`: the responses of a JSONL file against a teacher, written as a score file or JSONL."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Identity, Limits, Pins, Score, ScoreRequest, Sequence, Signal

from launcher.score_files import Row, open_sink, read_rows, scored
from launcher.score_journal import Journal
from launcher.score_text import Encoder, check_fingerprint
from services.logs import log_to_stderr
from services.score_file import ScoreHeader

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
    name: str = ""
    written_by: str = ""


class Scores(Protocol):
    """Where requests go: a client, or a core over an engine in this process."""

    def __call__(self, request: ScoreRequest) -> Coroutine[Any, Any, Score]: ...


@dataclass(frozen=True, slots=True)
class Scorer:
    """Who scores, within which limits, and how it is asked."""

    ask: Scores
    identity: Identity
    limits: Limits


def score_file(source: Path, options: ScoreOptions) -> int:
    """Score every line of `source`; 0 when all were scored, 1 when some were refused.

    A run that was killed, or whose teacher went away, goes on where it stood when it is started again.

    Raises:
        TutelageError: the options, the file or the teacher do not fit; no output is written then.
    """
    log_to_stderr(logging.WARNING)
    if (options.teacher is None) == (options.model is None):
        raise invalid("give exactly one of --teacher HOST:PORT and --model PATH_OR_ID")
    if options.output.suffix not in (".jsonl", ".parquet"):
        raise invalid(f"--output: got {str(options.output)!r}, must end in .jsonl or .parquet")
    encoder = Encoder(options.tokenizer or options.model)
    lines = sum(1 for _ in read_rows(source, encoder))  # also finds a bad line before any is scored
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    refused = asyncio.run(_score_all(_Source(source, digest, lines, encoder), options))
    print(
        f"{options.output}: {lines - refused} responses scored" + (f", {refused} refused" if refused else "")
    )
    return 1 if refused else 0


@dataclass(frozen=True, slots=True)
class _Source:
    """What is scored."""

    path: Path
    digest: str
    lines: int
    encoder: Encoder

    def rows(self, start: int = 0) -> Iterator[Row]:
        return islice(read_rows(self.path, self.encoder), start, None)


async def _score_all(source: _Source, options: ScoreOptions) -> int:
    async with _scorer(options, source.encoder) as scorer:
        header = ScoreHeader(scorer.identity, options.signal, options.written_by)
        belongs_to = {
            "source": source.digest,
            "tokenizer": source.encoder.fingerprint,
            "teacher": asdict(header.identity),
            "signal": asdict(header.signal),
            "written_by": header.written_by,
        }
        with Journal(options.output, belongs_to) as journal:
            if journal.done:
                print(f"{journal.path}: goes on after {journal.done} of {source.lines} responses")
            await _ask_rest(source, options, scorer, journal)
            refused = _write(source, options.output, header, journal)
            journal.remove()
    return refused


async def _ask_rest(source: _Source, options: ScoreOptions, scorer: Scorer, journal: Journal) -> None:
    """Ask for every line that the journal lacks, and put the answers there in order."""
    batch_tokens = min(options.batch_tokens, scorer.limits.max_request_tokens)
    with _progress() as progress:
        task = progress.add_task("scoring", total=source.lines, completed=journal.done)
        waiting: deque[asyncio.Task[Score]] = deque()

        async def take() -> None:
            score = await waiting.popleft()
            _check_same(score.identity, scorer.identity)
            journal.append(score)
            progress.advance(task, len(score.sequences))

        try:
            for rows in batches(source.rows(journal.done), batch_tokens, scorer.limits.max_sequences):
                request = request_of(rows, options.signal, scorer.identity)
                waiting.append(asyncio.create_task(scorer.ask(request)))
                if len(waiting) == IN_FLIGHT:
                    await take()
            while waiting:
                await take()
        finally:
            for left in waiting:
                left.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


def _check_same(got: Identity, expected: Identity) -> None:
    """A score file has one teacher; a replica that was replaced by another one ends the run."""
    different = [field for field in Identity.__slots__ if getattr(got, field) != getattr(expected, field)]
    if different:
        was, now = ({field: getattr(one, field) for field in different} for one in (expected, got))
        raise TutelageError("FAILED_PRECONDITION", f"teacher: was {was} when this began and is now {now}")


def _write(source: _Source, output: Path, header: ScoreHeader, journal: Journal) -> int:
    """The output from the source's lines and the journal's answers; how many were refused."""
    refused = 0
    with open_sink(output, header) as sink:
        for row, score in zip(source.rows(), journal.answers(), strict=True):
            refused += score.error is not None
            sink.write(scored(row, replace(score, id=row.id)))
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


def request_of(rows: list[Row], signal: Signal, identity: Identity) -> ScoreRequest:
    """One request to exactly this teacher; neighbouring rows with the same context share it."""
    contexts: list[Any] = []
    places: dict[bytes, int] = {}
    sequences = []
    for index, row in enumerate(rows):
        key = row.context_ids.tobytes()
        if key not in places:
            places[key] = len(contexts)
            contexts.append(row.context_ids)
        sequences.append(Sequence(str(index), places[key], row.response_ids))
    pins = Pins(identity.tokenizer_fingerprint, identity.revision, identity.weights_version)
    return ScoreRequest(tuple(contexts), tuple(sequences), signal, identity.name, pins)


@asynccontextmanager
async def _scorer(options: ScoreOptions, encoder: Encoder) -> AsyncIterator[Scorer]:
    """A connected teacher whose tokenizer matches, or a loaded model."""
    if options.teacher is not None:
        from tutelage_client import AsyncTeacherClient

        async with AsyncTeacherClient(options.teacher, token=options.token) as client:
            served = await client.get_teacher(options.name, timeout=10.0)
            check_fingerprint(encoder, served.identity.tokenizer_fingerprint)
            yield Scorer(client.score_request, served.identity, served.limits)
        return
    from services.api.core import ScoringCore
    from services.teacher.build import build_engine

    engine = build_engine(_engine_settings(options))
    await engine.start()
    try:
        core = ScoringCore(engine, max_queued_tokens=2**62, max_message_bytes=2**31 - 1)
        core.open()
        check_fingerprint(encoder, engine.identity.tokenizer_fingerprint)
        yield Scorer(partial(core.score, transport="queue"), engine.identity, engine.limits)
    finally:
        await engine.close()


def _engine_settings(options: ScoreOptions) -> TeacherSettings:
    from services.teacher.settings import TeacherSettings

    settings: dict[str, Any] = {"model": options.model, "engine": options.engine}
    if options.name:
        settings["name"] = options.name
    if options.engine == "transformers":
        settings["max_batch_tokens"] = options.batch_tokens
    return TeacherSettings.model_validate(settings)


def _progress() -> Progress:
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
