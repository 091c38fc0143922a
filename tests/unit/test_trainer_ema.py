"""The moving average of the student: of the weights that are published, in float32, through checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.rank_jobs import Job, groups_of, make_learner, save_models
from torch import Tensor

from student_trainer.checkpoint import CheckpointStore
from student_trainer.ema import Ema
from student_trainer.learner import Learner
from student_trainer.ledger import Ledger
from student_trainer.sections import LoraSettings

RATE = 0.3
FULL = Job("full weights", ema=True, groups=1)
TIED = Job("tied head", model="tied", ema=True, groups=1)
ADAPTERS = Job("adapters", ema=True, groups=1, lora=LoraSettings(rank=2))
JOBS = [FULL, TIED, ADAPTERS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


def published(learner: Learner, directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student and its average, as a reader of the channels finds them."""
    learner.export(directory / "live")
    learner.export_ema(directory / "ema")
    return load_file(directory / "live/model.safetensors"), load_file(directory / "ema/model.safetensors")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_average_is_what_follows_from_the_published_policies(
    job: Job, models: Path, tmp_path: Path
) -> None:
    learner = make_learner(job, models)
    learner.ema = Ema(learner.student, RATE)
    live, ema = published(learner, tmp_path / "0")
    assert ema.keys() == live.keys()
    expected = {name: tensor.double() for name, tensor in live.items()}
    for step in range(4):
        assert learner.step(groups_of(job, step), step).refused is None
        live, ema = published(learner, tmp_path / str(step + 1))
        for name, tensor in live.items():
            expected[name] = (1 - RATE) * expected[name] + RATE * tensor.double()
            torch.testing.assert_close(ema[name].double(), expected[name], rtol=1e-6, atol=1e-7, msg=name)
    assert any((ema[name] - live[name]).abs().max() > 1e-3 for name in live), "nothing has moved"


def test_an_average_of_half_precision_weights_is_kept_in_full(models: Path, tmp_path: Path) -> None:
    """Steps below half a unit of bfloat16 would be lost there, one by one."""
    for job in (FULL, ADAPTERS):
        learner = make_learner(replace(job, dtype="bfloat16"), models)
        assert learner.ema is not None
        assert {average.dtype for average in learner.ema.averages.values()} == {torch.float32}
        _, ema = published(learner, tmp_path / job.name)
        assert {tensor.dtype for tensor in ema.values()} == {torch.bfloat16}


def test_a_refused_step_does_not_move_the_average(models: Path) -> None:
    job = Job("poisoned", ema=True, groups=1, poisoned=0)
    learner = make_learner(job, models)
    learner.step(groups_of(job, 0), 0)
    assert learner.ema is not None
    before = {name: average.clone() for name, average in learner.ema.averages.items()}
    assert learner.step(groups_of(job, 1), 1).refused is not None
    for name, average in learner.ema.averages.items():  # of an infinite weight there is none
        torch.testing.assert_close(average, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("job", [FULL, ADAPTERS], ids=lambda job: job.name)
def test_a_resumed_average_goes_on_bit_by_bit(job: Job, models: Path, tmp_path: Path) -> None:
    whole = make_learner(job, models)
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in range(3):
        whole.step(groups_of(job, step), step)
        if step == 0:
            store.save(whole.state_tensors(), Ledger(settings={}, step=1))
    resumed = make_learner(job, models)
    checkpoint, _ = store.newest()
    assert checkpoint is not None
    resumed.load(checkpoint)
    for step in (1, 2):
        resumed.step(groups_of(job, step), step)
    assert whole.ema is not None
    assert resumed.ema is not None
    assert all(
        torch.equal(average, resumed.ema.averages[name]) for name, average in whole.ema.averages.items()
    )
