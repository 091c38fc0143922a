"""Self-teachers whose weights move, while processes are killed: no score of other weights is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess

import pytest
import torch
from safetensors.torch import load_file
from support.training_bench import Bench, training_bench
from support.training_run import PATHWISE, TrainingRun, finish, kill, wait_until

from services.models.channel import Channel

STEPS, PER_STEP, RATE = 7, 8, 0.3
OBJECTIVE = f"""{PATHWISE}
target = "losses"
ema_rate = {RATE}
[objective.views.big]
weights = "teacher:big"
[objective.views.ema]
weights = "ema"
[objective.views.live]
weights = "live"
coefficient = 0.5
"""
# All checkpoints are kept, and so all versions: the average is computed anew from them.
TRAINING = f"steps = {STEPS}\ncheckpoint_every = 3\nkeep_checkpoints = 100\nsample_every = 0"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with training_bench(tmp_path_factory.mktemp("moving"), training=TRAINING, objective=OBJECTIVE) as made:
        yield made


@pytest.fixture(scope="module")
def uninterrupted(bench: Bench) -> TrainingRun:
    run = bench.run("whole")
    others = [bench.processes.sampler(run), *start_teachers(bench, run).values()]
    finish(bench.processes.trainer(run), run)
    for process in others:
        kill(process)
    return run


def start_teachers(bench: Bench, run: TrainingRun) -> dict[str, ForkServerProcess]:
    return {channel: bench.processes.self_teacher(run, channel) for channel in ("ema", "live")}


def published(run: TrainingRun, channel: str, least: int, process: ForkServerProcess) -> Callable[[], bool]:
    directory = Channel(run.directory / channel)
    return lambda: (directory.versions() or [-1])[-1] >= least or not process.is_alive()


def weights_of(run: TrainingRun, channel: str, version: int) -> dict[str, torch.Tensor]:
    found = Channel(run.directory / channel).get(version)
    assert found is not None
    return load_file(found.path / "model.safetensors")


def assert_average_follows_from_policies(run: TrainingRun) -> None:
    """In float64, from nothing but what was published."""
    expected = {name: tensor.double() for name, tensor in weights_of(run, "policy", 0).items()}
    for version in range(STEPS + 1):
        if version:
            for name, tensor in weights_of(run, "policy", version).items():
                expected[name] = (1 - RATE) * expected[name] + RATE * tensor.double()
        for name, tensor in weights_of(run, "ema", version).items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    trained, average = weights_of(run, "policy", STEPS), weights_of(run, "ema", STEPS)
    assert any((trained[name] - average[name]).abs().max() > 1e-3 for name in trained), "nothing has moved"


def test_the_published_average_is_that_of_the_published_policies(uninterrupted: TrainingRun) -> None:
    assert_average_follows_from_policies(uninterrupted)


def test_killed_trainer_and_self_teachers_end_with_the_weights_of_an_uninterrupted_run(
    bench: Bench, uninterrupted: TrainingRun
) -> None:
    """The trainer dies right after publications that no checkpoint covers; teachers die at their work."""
    run = bench.run("killed")
    bench.processes.sampler(run)
    teachers = start_teachers(bench, run)
    for least, victim in ((1, "ema"), (4, "live"), (5, "ema")):
        trainer = bench.processes.trainer(run)
        wait_until(published(run, "ema", least, trainer), what=f"version {least}")
        assert trainer.is_alive(), run.log("trainer")[-3000:]
        kill(trainer)
        kill(teachers[victim])
        teachers[victim] = bench.processes.self_teacher(run, victim)
    finish(bench.processes.trainer(run), run)
    expected, got = uninterrupted.weights(), run.weights()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    losses = [[r["loss"] for r in each.metrics() if "loss" in r] for each in (uninterrupted, run)]
    assert losses[0] == losses[1]
    assert run.ledger()["applied"] == [[0, STEPS * PER_STEP]]
    assert run.ledger()["dropped"] == []
    assert_average_follows_from_policies(run)


def test_a_trainer_that_is_its_own_teacher_trains_the_same_also_when_killed(
    bench: Bench, uninterrupted: TrainingRun
) -> None:
    run = bench.run("own", student_extra="[self_teacher]\nin_process = true")
    bench.processes.sampler(run)
    trainer = bench.processes.trainer(run)
    wait_until(published(run, "ema", 4, trainer), what="version 4")
    assert trainer.is_alive(), run.log("trainer")[-3000:]
    kill(trainer)
    finish(bench.processes.trainer(run), run)
    expected, got = uninterrupted.weights(), run.weights()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    assert "scoring_in_process" in run.log("trainer")


def test_a_trainer_whose_own_teacher_fails_says_so_and_ends(bench: Bench) -> None:
    empty = bench.root / "empty"
    empty.mkdir()
    views = f'[objective.views.lost]\nweights = "checkpoint:{empty}"\n'
    run = bench.run("lost", student_extra="[self_teacher]\nin_process = true", objective=PATHWISE + views)
    trainer = bench.processes.trainer(run)
    trainer.join(60)
    assert trainer.exitcode == 1, run.log("trainer")[-3000:]
    assert "self_teachers_failed" in run.log("trainer")
    assert f"could not load '{empty}'" in run.log("trainer")
    assert len(list((run.directory / "checkpoints").glob("step-*"))) == 1


def test_scores_of_publications_that_no_checkpoint_covers_are_refused_and_counted(bench: Bench) -> None:
    """What a dead trainer published goes on to score; then the same numbers name other weights."""
    run = bench.run(
        "uncovered", deterministic=False, training=TRAINING.replace("every = 3", f"every = {STEPS}")
    )
    bench.processes.sampler(run)
    teachers = start_teachers(bench, run)
    trainer = bench.processes.trainer(run)
    wait_until(published(run, "policy", 3, trainer), what="version 3")
    kill(trainer)
    assert [path.name for path in (run.directory / "checkpoints").iterdir()] == ["step-00000000"]
    kill(teachers["live"])
    bench.processes.self_teacher(run, "live")
    finish(bench.processes.trainer(run), run)
    # How many there are is a matter of timing: groups that lost weights sampled are stale before that.
    refused = [line for line in run.log("trainer").splitlines() if "reason=weights" in line]
    assert all("of that version this run knows" in line for line in refused)
    ledger = run.ledger()
    assert ledger["drop_counts"].get("weights", 0) == len(refused)
    assert ledger["drop_counts"], "the trainer's death has left no trace"
    assert set(ledger["drop_counts"]) <= {"weights", "stale"}
    assert ledger["replacements"] == sum(ledger["drop_counts"].values())
    assert sum(stop - start for start, stop in ledger["applied"]) == STEPS * PER_STEP


def test_scores_of_a_teacher_that_follows_other_weights_are_refused_and_counted(
    bench: Bench, uninterrupted: TrainingRun
) -> None:
    """It has the right name, and the numbers of its versions are those of this run: another run's average.

    A trainer killed beside it changes nothing: the run comes to its end on right scores alone.
    """
    run = bench.run("foreign", deterministic=False)
    bench.processes.sampler(run)
    start_teachers(bench, run)
    foreign = bench.processes.self_teacher(run, "ema", follow=uninterrupted.directory / "ema")
    trainer = bench.processes.trainer(run)
    wait_until(lambda: dropped(run) > 0 or not trainer.is_alive(), what="a refused score")
    kill(trainer)
    before = dropped(run)
    trainer = bench.processes.trainer(run)
    wait_until(lambda: dropped(run) > before or not trainer.is_alive(), what="one more, after resuming")
    kill(foreign)
    finish(trainer, run)
    ledger = run.ledger()
    assert ledger["drop_counts"].get("weights", 0) > 0
    assert set(ledger["drop_counts"]) <= {"weights", "stale"}
    assert ledger["replacements"] == sum(ledger["drop_counts"].values())
    assert run.steps() == list(range(1, STEPS + 1))
    applied = sum(stop - start for start, stop in ledger["applied"])
    assert applied == STEPS * PER_STEP
    assert "scored by ema version" in run.log("trainer")


def dropped(run: TrainingRun) -> int:
    return run.log("trainer").count("reason=weights")
