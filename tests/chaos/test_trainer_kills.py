"""kill -9 on the trainer, at any moment: the run continues and ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import ForkServerProcess
from operator import itemgetter

import pytest
import torch
from support.training_bench import Bench, training_bench
from support.training_run import TrainingRun, finish, kill, wait_until

STEPS, PER_STEP = 10, 8
TRAINING = (
    f"steps = {STEPS}\ncheckpoint_every = 3\nsample_every = 4\nevaluate_every = 5\nevaluation_prompts = 10"
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with training_bench(tmp_path_factory.mktemp("kills"), training=TRAINING) as made:
        yield made


@pytest.fixture(scope="module")
def uninterrupted(bench: Bench) -> TrainingRun:
    return bench.whole("whole")


def same_as_uninterrupted(run: TrainingRun, whole: TrainingRun) -> None:
    expected, got = whole.weights(), run.weights()
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    assert run.steps() == list(range(1, STEPS + 1))
    losses = [[r["loss"] for r in each.metrics() if "loss" in r] for each in (whole, run)]
    assert losses[0] == losses[1]
    # Logged as they are answered, and a killed sampler's order is answered late.
    evaluations = [
        sorted(
            (r["evaluation"] for r in each.metrics() if "evaluation" in r), key=itemgetter("policy_version")
        )
        for each in (whole, run)
    ]
    assert evaluations[0] == evaluations[1]
    ledger = run.ledger()
    assert ledger["applied"] == [[0, STEPS * PER_STEP]]
    assert ledger["dropped"] == []


def got_past(run: TrainingRun, trainer: ForkServerProcess, step: int) -> bool:
    return len(run.steps()) > step or not trainer.is_alive()


def kill_while_training(bench: Bench, run: TrainingRun, kills: int, seed: int) -> None:
    """Kill the trainer `kills` times, at random moments after random steps, and let it finish."""
    chance = random.Random(seed)
    for number in range(kills):
        trainer = bench.processes.trainer(run)
        target = chance.randint(number * STEPS // kills, (number + 1) * STEPS // kills - 1)
        wait_until(partial(got_past, run, trainer, target), what=f"step {target}")
        time.sleep(chance.uniform(0.0, 0.1))
        assert trainer.is_alive() or trainer.exitcode == 0, run.log("trainer")[-3000:]
        kill(trainer)
    finish(bench.processes.trainer(run), run)


def test_killed_trainer_ends_with_the_weights_of_an_uninterrupted_run(
    bench: Bench, uninterrupted: TrainingRun
) -> None:
    run = bench.run("killed")
    bench.processes.sampler(run)
    kill_while_training(bench, run, kills=4, seed=0)
    same_as_uninterrupted(run, uninterrupted)


def test_trainer_killed_together_with_its_sampler_still_agrees(
    bench: Bench, uninterrupted: TrainingRun
) -> None:
    run = bench.run("both")
    for target in (1, 5):
        trainer, sampler = bench.processes.trainer(run), bench.processes.sampler(run, f"sampler-{target}")
        wait_until(partial(got_past, run, trainer, target))
        kill(sampler)
        kill(trainer)
    bench.processes.sampler(run, "sampler-last")
    finish(bench.processes.trainer(run), run)
    same_as_uninterrupted(run, uninterrupted)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_trainer_killed_thirty_times_ends_with_the_same_weights(
    bench: Bench, uninterrupted: TrainingRun
) -> None:
    for seed in range(1, 6):
        run = bench.run(f"long{seed}")
        sampler = bench.processes.sampler(run)
        kill_while_training(bench, run, kills=6, seed=seed)
        kill(sampler)
        same_as_uninterrupted(run, uninterrupted)
