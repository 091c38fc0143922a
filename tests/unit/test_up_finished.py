"""`tutelage up` on a run that is finished: what its run file says since, and how it goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from student_trainer.checkpoint import CheckpointStore
from student_trainer.config import load_run_config
from student_trainer.ledger import Ledger
from student_trainer.resume import fixed_settings

RUN_FILE = """
[run]
name = "done"
directory = "{directory}"
[teachers.big]
model = "teacher"
[student]
model = "student"
[data]
task = "addition"
[objective]
estimator = "pathwise"
support = "student_topk"
k = 16
[training]
steps = 3
"""


def up(run_file: Path) -> list[str]:
    command = [sys.executable, "-m", "launcher", "up", str(run_file)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Of a run that is finished, and trained as it says."""
    path, directory = tmp_path / "run.toml", tmp_path / "run"
    path.write_text(RUN_FILE.format(directory=directory))
    config = load_run_config(path)
    ledger = Ledger(settings=fixed_settings(config, config.plan()), step=3)
    CheckpointStore(directory / "checkpoints").save({"model.weight": torch.zeros(1)}, ledger)
    (directory / "up.json").write_text('{"ending": "finished", "steps": 3}')
    return path


def test_a_finished_run_says_how_it_goes_on(run_file: Path) -> None:
    directory = run_file.parent / "run"
    goes_on = f"with more training.steps it goes on; for a fresh one, remove {directory}"
    finished = f"run 'done' is finished: 3 steps in {directory}"
    assert up(run_file) == [finished, goes_on]
    run_file.write_text(run_file.read_text() + "learning_rate = 0.5\n")
    assert up(run_file) == [finished, goes_on]


def test_a_finished_run_names_what_its_run_file_says_otherwise(run_file: Path) -> None:
    directory = run_file.parent / "run"
    changed = run_file.read_text().replace("k = 16", "k = 8") + "prompts_per_step = 5\n"
    run_file.write_text(changed)
    said = up(run_file)
    assert said[0] == f"run 'done' is finished: 3 steps in {directory}"
    assert said[1:] == [
        "! nothing was trained with its run file as it is now",
        "    training.prompts_per_step = 128, the run file says 5",
        "    objective.k = 16, the run file says 8",
        f"no run goes on so: choose another [run] directory and name, or remove {directory}",
    ]
