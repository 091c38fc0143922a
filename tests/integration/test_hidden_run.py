"""A run with the hidden-state loss: teacher, queue, sampler and trainer as processes, on tiny models."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from support.training_run import PATHWISE, Processes, TrainingRun, finish, start_server, write_model

STEPS = 20


def test_the_students_states_turn_towards_the_teachers(tmp_path: Path) -> None:
    write_model(tmp_path / "student", seed=1)
    write_model(tmp_path / "teacher", seed=2)
    server = start_server(tmp_path / "queue")
    run = TrainingRun(
        tmp_path,
        server.url,
        tmp_path,
        name="hidden",
        objective=PATHWISE + "hidden = { layers = [1, 2], coefficient = 30.0 }\n",
        training=f"steps = {STEPS}",
    )
    with Processes() as processes:
        processes.teacher(server.url, tmp_path / "teacher", tmp_path / "teacher.log")
        processes.sampler(run)
        finish(processes.trainer(run), run)
    server.stop()
    found = [record["hidden"] for record in run.metrics() if "hidden" in record]
    assert len(found) == STEPS, run.metrics()[:2]
    assert all(0 < distance < 4 / 32 for distance in found), "of unit vectors of 32 numbers"
    assert fmean(found[-4:]) < 0.8 * fmean(found[:4]), found
