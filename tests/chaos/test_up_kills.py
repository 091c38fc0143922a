"""`tutelage up` with two teacher replicas while its processes are killed, stopped and interrupted."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.training_run import wait_until, write_model
from support.up_run import STEPS, UpRun, all_gone

EVERYBODY = {"big-0", "big-1", "trainer", "sampler-0", "queue"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("up")
    write_model(root / "student", seed=1)
    write_model(root / "teacher", seed=2)
    return root


@pytest.fixture
def run(root: Path, request: pytest.FixtureRequest) -> Iterator[UpRun]:
    run = UpRun.write(root, root, request.node.name)
    yield run
    run.end()


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> Iterator[UpRun]:
    run = UpRun.write(root, root, "uninterrupted")
    run.start()
    assert run.finish() == 0, run.output()
    yield run
    run.end()


def same_weights(run: UpRun, other: UpRun) -> None:
    expected, got = other.weights(), run.weights()
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_a_run_ends_by_itself_and_the_same_command_says_that_it_is_finished(uninterrupted: UpRun) -> None:
    assert uninterrupted.step() == STEPS
    assert f"finished: {STEPS} steps" in uninterrupted.output()
    for name in ("trainer", "sampler-0", "big-0", "big-1"):
        assert (uninterrupted.directory / "logs" / f"{name}.log").stat().st_size > 0
    uninterrupted.start()
    assert uninterrupted.finish() == 0
    assert f"run 'up' is finished: {STEPS} steps" in uninterrupted.output()


@pytest.mark.timeout(300)
def test_every_process_killed_in_turn_is_reported_and_the_run_ends_with_the_same_weights(
    run: UpRun, uninterrupted: UpRun
) -> None:
    run.start()
    victims = ("trainer", "sampler-0", "queue", "big-0", "big-1")
    for number, name in enumerate(victims):
        run.wait_for_step(3 + 4 * number)
        old = run.children()[name]
        killed_at = time.monotonic()
        run.kill_child(name)
        said = "the embedded queue died" if name == "queue" else f"{name} died (killed by SIGKILL)"
        wait_until(lambda said=said: said in run.output(), 30.0, said)  # type: ignore[misc]
        assert time.monotonic() - killed_at < 5.0
        assert "finished" not in run.output()
        if not name.startswith("big"):
            run.wait_for_restart(name, old)
    assert run.finish() == 0, run.output()
    same_weights(run, uninterrupted)


@pytest.mark.timeout(300)
def test_ctrl_c_stops_everything_in_order_and_the_same_command_continues(
    run: UpRun, uninterrupted: UpRun
) -> None:
    run.start()
    run.wait_for_step(8)
    pids = list(run.children().values())
    assert set(run.children()) == EVERYBODY
    assert run.process is not None
    run.process.send_signal(signal.SIGINT)
    assert run.finish(60.0) == 130
    assert all_gone(pids) == []
    stopped_at = run.step()
    # The trainer saved a checkpoint on the way out: not even the steps since the last one are lost.
    assert (run.directory / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
    output = run.output()
    assert "stopping: sampler, trainer" in output
    assert "died" not in output
    assert "finished" not in output
    run.start()
    wait_until(lambda: "trainer" in run.children() or not run.alive(), 30.0)
    # A trainer that somebody else stops exits with status 0; that is no finished run.
    run.wait_for_step(stopped_at + 3)
    run.kill_child("trainer", signal.SIGTERM)
    assert run.finish() == 0, run.output()
    assert "trainer died (exit status 0)" in run.output()
    same_weights(run, uninterrupted)


def test_nothing_outlives_a_killed_up(run: UpRun) -> None:
    run.start()
    wait_until(lambda: set(run.children()) == EVERYBODY, 30.0, run.output())
    pids = list(run.children().values())
    assert run.process is not None
    run.process.kill()
    run.process.wait()
    assert all_gone(pids) == []


def test_a_second_ctrl_c_ends_everything_at_once(run: UpRun) -> None:
    run.start()
    wait_until(lambda: set(run.children()) == EVERYBODY, 30.0, run.output())
    pids = list(run.children().values())
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(10.0) == 130
    assert all_gone(pids) == []


def test_a_second_up_on_the_same_run_is_refused(run: UpRun) -> None:
    run.start()
    wait_until(lambda: bool(run.children()), 30.0, run.output())
    second = UpRun(run.directory, run.file)
    second.start()
    assert second.finish(30.0) == 2
    assert "another `tutelage up` is working on this run" in run.output()
    assert run.alive()
