"""A run whose reward is a judge's: sampler, queue, judge and trainer as processes, on tiny models."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
from support.judges import LIKES_LARGE, SETTINGS, run_judge, save_judge
from support.training_run import Processes, TrainingRun, finish, start_server, write_model

from student_trainer.tasks.addition import CHARACTERS

STEPS = 40
TRAINING = """
steps = {steps}
[teachers.referee]
model = "{judge}"
[teachers.referee.judge]
user = "{settings.user}"
reply = "{settings.reply}"
"""


@pytest.fixture
def judged_run(tmp_path: Path) -> Iterator[tuple[TrainingRun, Processes]]:
    write_model(tmp_path / "student", seed=1)
    write_model(tmp_path / "teacher", seed=2)
    judge = save_judge(tmp_path / "judge", LIKES_LARGE, CHARACTERS)
    server = start_server(tmp_path / "queue")
    run = TrainingRun(
        tmp_path,
        server.url,
        tmp_path,
        name="judged",
        deterministic=False,
        objective='preset = "grpo"\njudge = "referee"',
        training=TRAINING.format(steps=STEPS, judge=judge, settings=SETTINGS),
    )
    assert run.config.plan().judge == "referee"
    settings = SETTINGS.model_copy(update={"tokenizer": str(tmp_path / "student")})
    with Processes() as processes:
        arguments = (server.url, str(judge), settings.model_dump_json(), str(run.logs / "referee.log"))
        processes._start(run_judge, arguments)
        yield run, processes
    server.stop()
    assert not [child for child in multiprocessing.active_children() if child.name == "referee"]


def test_the_student_learns_what_the_judge_likes(judged_run: tuple[TrainingRun, Processes]) -> None:
    run, processes = judged_run
    processes.sampler(run)
    finish(processes.trainer(run), run)
    rewards = [record["reward_mean"] for record in run.metrics() if "reward_mean" in record]
    assert len(rewards) == STEPS
    assert all(0 <= reward <= 1 for reward in rewards)
    first, last = fmean(rewards[:8]), fmean(rewards[-8:])
    assert last > first + 0.2, (first, last)
    (pin,) = run.ledger()["pins"].values()
    assert "referee" in run.ledger()["pins"], pin
