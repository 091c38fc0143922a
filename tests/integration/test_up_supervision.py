"""Supervision with real, cheap children: restarts are limited, reasons are told, order is kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.up_run import all_gone

from launcher.children import ChildSpec, RestartPolicy
from launcher.supervisor import Ending, Supervisor

QUICK = RestartPolicy(max_restarts=2, first_delay=0.05, longest_delay=0.1)


@dataclass
class Heard:
    """A screen that remembers."""

    lines: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    def say(self, message: str, detail: Sequence[str] = (), *, problem: bool = False) -> None:
        self.lines.append(message)
        self.details += detail


def fake_teacher(name: str, *arguments: str, role: str = "teacher", grace: float = 40.0) -> ChildSpec:
    ports = ("--grpc-port", "0", "--http-port", "0")
    return ChildSpec(name, role, ("teacher", "--engine", "fake", *ports, *arguments), grace)


async def never() -> bool | None:
    return False


def run(supervisor: Supervisor, stop_after: float | None = None) -> Ending:
    async def both() -> Ending:
        running = asyncio.create_task(supervisor.run(never))
        if stop_after is not None:
            await asyncio.sleep(stop_after)
            supervisor.request_stop()
        return await running

    return asyncio.run(both())


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_child_that_keeps_dying_ends_the_run_with_its_name_and_its_last_words(
    tmp_path: Path, taken_port: int
) -> None:
    heard = Heard()
    broken = fake_teacher("broken", "--http-port", str(taken_port))
    healthy = fake_teacher("healthy")
    supervisor = Supervisor([healthy, broken], tmp_path, heard, policy=QUICK)
    assert run(supervisor) == "failed"
    assert supervisor.reason == f"broken died 3 times (exit status 1); see {tmp_path / 'broken.log'}"
    assert [line for line in heard.lines if line.startswith("broken")] == [
        "broken died (exit status 1); restart 1 of 2 in 0.05 s",
        "broken died (exit status 1); restart 2 of 2 in 0.1 s",
        "broken died again (exit status 1); giving up",
    ]
    assert any("Address already in use" in line for line in heard.details)
    assert all_gone([child.process.pid for child in supervisor.children if child.process]) == []


def test_a_child_that_refuses_its_input_is_not_started_again(tmp_path: Path) -> None:
    heard = Heard()
    supervisor = Supervisor([ChildSpec("trainer", "trainer", ("train", "nowhere.toml"))], tmp_path, heard)
    assert run(supervisor) == "failed"
    assert heard.lines == ["trainer refused its input"]
    assert heard.details == ["tutelage: nowhere.toml: there is no such file"]


def test_a_trainer_that_ends_without_having_finished_is_not_a_finished_run(tmp_path: Path) -> None:
    heard = Heard()
    ends_well = ChildSpec("trainer", "trainer", ("--help",))
    supervisor = Supervisor([ends_well], tmp_path, heard, policy=QUICK)
    assert run(supervisor) == "failed"
    assert heard.lines[-1] == "trainer died again (exit status 0); giving up"


def test_a_child_that_ignores_the_request_to_stop_is_killed_and_named(tmp_path: Path) -> None:
    heard = Heard()
    slow = fake_teacher("slow", "--set", "fake.load_seconds=60", grace=0.0)
    supervisor = Supervisor([slow], tmp_path, heard)
    assert run(supervisor, stop_after=0.3) == "stopped"
    assert "slow did not stop within 0 s; killed" in heard.lines
    assert all_gone([child.process.pid for child in supervisor.children if child.process]) == []


def test_a_child_waiting_for_its_restart_is_not_started_after_the_request_to_stop(
    tmp_path: Path, taken_port: int
) -> None:
    class StopsAtTheFirstDeath(Heard):
        def say(self, message: str, detail: Sequence[str] = (), *, problem: bool = False) -> None:
            super().say(message, detail, problem=problem)
            if "died" in message:
                supervisor.request_stop()

    broken = fake_teacher("broken", "--http-port", str(taken_port))
    policy = RestartPolicy(first_delay=60.0)
    supervisor = Supervisor([broken], tmp_path, StopsAtTheFirstDeath(), policy=policy)
    assert run(supervisor) == "stopped"
    assert [child.total_restarts for child in supervisor.children] == [1]
    assert not any(child.running for child in supervisor.children)


def test_delays_double_up_to_a_limit_and_a_healthy_child_counts_anew() -> None:
    policy = RestartPolicy(first_delay=1.0, longest_delay=5.0)
    assert [policy.delay(restart) for restart in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 5.0]
