"""kill -9 during a checkpoint save, many times: a whole checkpoint is found every time."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from student_trainer.checkpoint import CheckpointStore, load_tensors
from student_trainer.ledger import Ledger

KEEP = 2


def make_tensors(step: int) -> dict[str, torch.Tensor]:
    return {f"model.{i}": torch.full((100, 100), float(step)) for i in range(8)}


def save_for_ever(directory: str, first: int) -> None:
    """What a trainer does between kills: save, delete old ones, again and again."""
    torch.set_num_threads(1)
    store = CheckpointStore(Path(directory))
    store.newest()
    step = first
    while True:
        ledger = Ledger(settings={}, step=step)
        ledger.applied.add(step)
        store.save(make_tensors(step), ledger)
        store.prune(KEEP)
        step += 1


def start(directory: Path, first: int) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["student_trainer.train", __name__])
    process = context.Process(target=save_for_ever, args=(str(directory), first), daemon=True)
    process.start()
    return process


def kill_and_load(directory: Path, kills: int, seed: int) -> int:
    """The number of kills that hit a save, as its leftovers show."""
    chance = random.Random(seed)
    interrupted, newest = 0, 0
    for _ in range(kills):
        process = start(directory, newest + 1)
        store = CheckpointStore(directory)
        while not (steps := store.steps()) or steps[-1] <= newest:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.05))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        interrupted += any(path.name.startswith(".") for path in directory.iterdir())
        found, damaged = store.newest()
        assert found is not None
        assert damaged == []
        step = found.ledger.step
        assert step > newest
        loaded = {name: torch.zeros_like(tensor) for name, tensor in make_tensors(0).items()}
        load_tensors(found, loaded)
        assert all(torch.equal(tensor, torch.full_like(tensor, float(step))) for tensor in loaded.values())
        assert step in found.ledger.applied
        newest = step
    return interrupted


def test_kill_during_a_save_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    assert kill_and_load(tmp_path, kills=15, seed=0) >= 3


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_hundred_kills_during_saves_leave_a_loadable_checkpoint(tmp_path: Path) -> None:
    interrupted = kill_and_load(tmp_path, kills=200, seed=1)
    print(f"kills during a save: {interrupted} of 200, loadable checkpoints: 200 of 200")
    assert interrupted >= 40
