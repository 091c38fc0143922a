"""What `tutelage status` shows of one look: every figure, and what is missing."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from launcher.status_look import NEVER_ASKED, NOTHING, RunLook, StackLook, TeacherLook, as_document
from launcher.status_view import MAX_RUNS, age, render, waiting_for
from services.queue import RunStats, ServerStats, StreamStats, TeacherStats

BUSY = TeacherStats(
    jobs=StreamStats(length=9, waiting=5, in_flight=2, consumers=2, oldest_age=95.0),
    queued_tokens=7000,
    waiting_tokens=5000,
    in_flight_tokens=2000,
    scored=400,
    dead=3,
    expired=1,
)
STATS = RunStats(orders=NOTHING, scored=NOTHING, dead_orders=0)
PROGRESS = {
    "status": "training",
    "step": 42,
    "steps": 100,
    "loss": 0.22,
    "kl": 0.213,
    "accuracy_greedy": 0.772,
    "staleness_mean": 1.0,
}


def teacher(name: str = "big", *, replicas: int = 2, stats: TeacherStats = BUSY) -> TeacherLook:
    return TeacherLook(name, replicas, stats, scored_per_second=12.5, history=(0, 10, 20))


def run(name: str = "demo", *, samplers: int = 1, trainer: bool = True, **told: object) -> RunLook:
    return RunLook(name, STATS, samplers, trainer, {**PROGRESS, **told})


def look(*parts: TeacherLook | RunLook) -> StackLook:
    return StackLook(
        address="redis://queue:6379/0",
        server=ServerStats(memory_bytes=3 * 2**20, memory_limit_bytes=2**30, clients=9),
        teachers=tuple(part for part in parts if isinstance(part, TeacherLook)),
        runs=tuple(part for part in parts if isinstance(part, RunLook)),
    )


def shown(seen: StackLook, problem: str | None = None) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(render(seen, problem))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize(
    "figure",
    [
        *("redis://queue:6379/0", "3 MiB of 1.0 GiB", "9 clients"),
        *("big", "5,000", "2,000", "95.0s", "12.5", "4", "▁▅█"),
        *("demo", "42/100", "0.22", "0.213", "77.2%", "training"),
    ],
)
def test_every_figure_is_shown(figure: str) -> None:
    assert figure in shown(look(teacher(), run()))


def test_a_teacher_without_replicas_is_missing_only_while_somebody_waits_for_it() -> None:
    assert "no replica" in shown(look(teacher(replicas=0)))
    assert "no replica" not in shown(look(teacher(replicas=0, stats=NEVER_ASKED)))


def test_what_a_run_lacks_is_named_until_it_has_ended() -> None:
    assert "training; missing: trainer, sampler" in shown(look(run(samplers=0, trainer=False)))
    assert "missing" not in shown(look(run(samplers=0, trainer=False, status="finished")))
    assert "missing" not in shown(look(run()))
    waiting = "waiting for scores: no teacher:big"
    assert waiting in shown(look(run(status=waiting)))


def test_a_run_that_nobody_has_started_says_so() -> None:
    text = shown(look(RunLook("demo", STATS, 0, False, {})))
    assert "not started; missing: trainer, sampler" in text


def test_many_runs_are_cut_short_with_their_number() -> None:
    text = shown(look(*(run(f"run-{index:02d}") for index in range(MAX_RUNS + 3))))
    assert "and 3 more runs" in text
    assert f"run-{MAX_RUNS - 1:02d}" in text
    assert f"run-{MAX_RUNS:02d}" not in text


def test_an_absent_queue_is_said_with_and_without_an_earlier_look() -> None:
    assert "below is the last look: refused" in shown(look(teacher()), "refused")
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(waiting_for("redis://queue", "refused"))
    assert "queue redis://queue\nno answer, trying again: refused" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_document_holds_what_the_tables_show() -> None:
    document = json.loads(json.dumps(as_document(look(teacher(), run(samplers=0)))))
    assert document["queue"]["memory_limit_bytes"] == 2**30
    big = document["teachers"]["big"]
    assert (big["replicas"], big["waiting_tokens"], big["in_flight_tokens"]) == (2, 5000, 2000)
    assert (big["jobs"], big["scored_jobs_per_second"]) == ({"waiting": 5, "in_flight": 2}, 12.5)
    demo = document["runs"]["demo"]
    assert (demo["step"], demo["steps"], demo["kl"], demo["accuracy_sampled"]) == (42, 100, 0.213, None)
    assert demo["missing"] == ["sampler"]


def test_ages_are_short() -> None:
    assert [age(seconds) for seconds in (0, 3.21, 119, 120, 7199, 7200, 200_000)] == [
        "0.0s", "3.2s", "119.0s", "2m", "120m", "2h", "2d",
    ]  # fmt: skip
