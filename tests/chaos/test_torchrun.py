"""`torchrun -m launcher train` with two ranks: the run of one process, also when killed and stopped."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from support.torchrun import Torchrun
from support.training_bench import Bench, training_bench
from support.training_run import TrainingRun, finish, wait_until

from services.queue.embedded import EmbeddedServer

STEPS, PER_STEP = 20, 8
TRAINING = f"""
steps = {STEPS}
checkpoint_every = 3
sample_every = 4
evaluate_every = 10
evaluation_prompts = 10
epsilon = 1e-3
rank_timeout_seconds = 60
"""
LORA = "[student.lora]\nrank = 3\n"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with training_bench(tmp_path_factory.mktemp("torchrun"), training=TRAINING) as made:
        yield made


@pytest.fixture(scope="module")
def whole(bench: Bench) -> TrainingRun:
    return bench.whole("whole")


@pytest.fixture
def started() -> Iterator[list[Torchrun]]:
    jobs: list[Torchrun] = []
    yield jobs
    for job in jobs:
        job.close()


def same_up_to_rounding(run: TrainingRun, whole: TrainingRun) -> None:
    assert run.steps() == list(range(1, STEPS + 1))
    ledger = run.ledger()
    assert ledger["applied"] == [[0, STEPS * PER_STEP]]
    assert ledger["dropped"] == []
    losses = [[r["loss"] for r in each.metrics() if "loss" in r] for each in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    expected, got = whole.weights(), run.weights()
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-3, msg=name)


def test_two_ranks_make_the_run_of_one_process(
    bench: Bench, whole: TrainingRun, started: list[Torchrun]
) -> None:
    run = bench.run("ranks")
    bench.processes.sampler(run)
    started.append(Torchrun.start(run, options=("--unfinished-status=75",)))
    assert started[0].wait() == 0, started[0].log()
    same_up_to_rounding(run, whole)
    evaluations = [r["evaluation"]["policy_version"] for r in run.metrics() if "evaluation" in r]
    assert sorted(evaluations) == [0, 10, 20]
    assert {path.name for path in (run.directory / "samples").iterdir()} == {
        f"step-{step:08d}.jsonl.gz" for step in (1, *range(4, STEPS + 1, 4))
    }


def test_killed_rank_is_started_again_and_a_stopped_run_goes_on_with_one_process(
    bench: Bench, whole: TrainingRun, started: list[Torchrun]
) -> None:
    run = bench.run("killed")
    bench.processes.sampler(run)
    started.append(job := Torchrun.start(run, restarts=1))
    wait_until(partial(job.reached, 4), 90.0, "step 4")
    killed = job.rank(1)
    os.kill(killed, signal.SIGKILL)
    told: set[str] = set()

    def resumed() -> bool:
        told.add(status(bench, run))
        return "resumed" in run.log("torchrun")

    wait_until(resumed, 90.0, "another start")
    assert not any(one.startswith("failed") for one in told), "the ranks were started again"
    assert "rank 0 of 2 lost another rank" in run.log("torchrun")
    # torchrun signals every rank; one of them, on whatever node, is enough.
    os.kill(job.rank(1), signal.SIGTERM)
    assert job.wait() == 0, job.log()
    assert run.log("torchrun").count("stopped; the same command continues the run") == 1, job.log()
    assert run.ledger()["step"] < STEPS
    finish(bench.processes.trainer(run), run)
    same_up_to_rounding(run, whole)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_adapters_survive_whatever_ends_the_job(bench: Bench, started: list[Torchrun]) -> None:
    run = bench.run("adapters", student_extra=LORA)
    bench.processes.sampler(run)

    def start(past: int) -> Torchrun:
        started.append(Torchrun.start(run))
        wait_until(partial(started[-1].reached, past), 120.0, f"step {past}")
        return started[-1]

    job = start(1)
    os.kill(job.rank(0), signal.SIGKILL)
    assert job.wait() == 1, job.log()

    job = start(5)
    job.terminate()
    job.wait()
    assert "forcefully exiting" not in run.log("torchrun")
    assert run.log("torchrun").count("ended with rank 0") == 1, job.log()
    assert run.ledger()["step"] == max(run.steps())

    job = start(10)
    ranks = [job.rank(0), job.rank(1)]
    job.process.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 30.0, "the ranks to follow")

    assert start(STEPS - 1).wait() == 0
    same_up_to_rounding(run, bench.whole("adapters-alone", student_extra=LORA))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_time_limit_ends_a_job_that_hangs_and_not_one_that_waits(
    bench: Bench, started: list[Torchrun]
) -> None:
    run = bench.run("hanging")
    run.file.write_text(run.file.read_text().replace("rank_timeout_seconds = 60", "rank_timeout_seconds = 5"))
    started.append(job := Torchrun.start(run))
    wait_until(lambda: "waiting for scores" in run.log("torchrun"), 120.0, "nothing to train on")
    time.sleep(8.0)
    assert job.process.poll() is None, job.log()
    bench.processes.sampler(run)
    wait_until(partial(job.reached, 2), 120.0, "step 2")
    os.kill(job.rank(1), signal.SIGSTOP)
    assert job.wait(60.0) == 1, job.log()  # torchrun gives the stopped rank half a minute to end
    assert "rank 0 of 2 lost another rank" in run.log("torchrun")
    assert finish_with(bench, run) == list(range(1, STEPS + 1))


def test_ranks_wait_for_a_queue_that_is_away_at_the_start(bench: Bench, started: list[Torchrun]) -> None:
    server = EmbeddedServer(bench.root / "late")
    run = TrainingRun(bench.root, server.url, bench.root, name="early", training=TRAINING)
    run.file.write_text(run.file.read_text().replace("rank_timeout_seconds = 60", "rank_timeout_seconds = 5"))
    started.append(job := Torchrun.start(run))
    wait_until(lambda: "status port" in run.log("torchrun"), 60.0, "rank 0")
    time.sleep(15.0)
    assert job.process.poll() is None, job.log()
    server.start()
    try:
        wait_until(lambda: "waiting for scores" in run.log("torchrun"), 60.0, "the start of the run")
    finally:
        job.close()
        server.stop()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_other_node_waits_for_one_that_comes_in_place_of_a_drained_one(
    bench: Bench, whole: TrainingRun, started: list[Torchrun], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in the Job: else torchrun tells a node that is new where its store is in the first round alone.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    run = bench.run("drained")
    bench.processes.sampler(run)
    start = partial(Torchrun.start, run, ranks=1, restarts=2, options=("--unfinished-status=75",))
    meeting = two_nodes()
    # Who has the ranks' meeting place would take it along; in the Job, the first pod.
    stays = start(meeting=(*meeting, "--rdzv-conf=is_host=true"))
    drained = start(meeting=(*meeting, "--rdzv-conf=is_host=false"))
    started += [stays, drained]
    wait_until(partial(stays.reached, 4), 120.0, "step 4")
    drained.terminate()
    assert drained.wait() != 0
    started.append(comes := start(meeting=(*meeting, "--rdzv-conf=is_host=false")))
    assert [job.wait() for job in (stays, comes)] == [0, 0], stays.log()
    same_up_to_rounding(run, whole)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_nodes_meet_again_when_a_rank_of_one_is_killed(
    bench: Bench, whole: TrainingRun, started: list[Torchrun]
) -> None:
    run = bench.run("nodes")
    bench.processes.sampler(run)
    meeting = two_nodes()
    started += [Torchrun.start(run, ranks=1, restarts=2, meeting=meeting) for _ in range(2)]
    wait_until(partial(started[0].reached, 4), 120.0, "step 4")
    os.kill(started[1].rank(0, "LOCAL_RANK"), signal.SIGKILL)
    assert [job.wait() for job in started] == [0, 0], started[0].log()
    assert run.log("torchrun").count("resumed") == 1
    same_up_to_rounding(run, whole)


def two_nodes() -> tuple[str, ...]:
    """How two torchruns of this machine find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    return (
        *("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=run", "--local-addr=127.0.0.1"),
        f"--rdzv-endpoint={endpoint}",
    )


def status(bench: Bench, run: TrainingRun) -> str:
    """What the run is doing, as the queue tells."""
    return str(bench.progress(run).get("status", ""))


def finish_with(bench: Bench, run: TrainingRun) -> list[int]:
    finish(bench.processes.trainer(run), run)
    assert run.ledger()["applied"] == [[0, STEPS * PER_STEP]]
    return run.steps()
