"""Several training runs beside each other: what the run files of a test module have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from support.training_run import Processes, TrainingRun, finish, kill, start_server, write_model


@dataclass(frozen=True)
class Bench:
    """What the runs of a module share: models, a queue, a teacher called big, and who starts processes."""

    root: Path  # of the models and of every run
    url: str
    processes: Processes
    usual: Mapping[str, Any]

    def run(self, name: str, **how: Any) -> TrainingRun:
        """A run as it usually is here, but for `how`: arguments of TrainingRun."""
        return TrainingRun(self.root, self.url, self.root, name=name, **{**self.usual, **how})

    def whole(self, name: str, **how: Any) -> TrainingRun:
        """A run that one trainer made with one sampler, without interruption."""
        run = self.run(name, **how)
        sampler = self.processes.sampler(run)
        finish(self.processes.trainer(run), run)
        kill(sampler)
        return run

    def progress(self, run: TrainingRun) -> dict[str, Any]:
        """What the run has told the queue about itself."""
        with redis.Redis.from_url(self.url) as client:
            found: dict[bytes, bytes] = client.hgetall(f"tutelage:run:{run.config.run.name}")  # type: ignore[assignment]
        return {name.decode(): json.loads(value) for name, value in found.items()}


@contextmanager
def training_bench(root: Path, **usual: Any) -> Iterator[Bench]:
    """A bench in `root`, whose runs are `usual` where they do not say otherwise; it ends with the block."""
    write_model(root / "student", seed=1)
    write_model(root / "teacher", seed=2)
    server = start_server(root / "queue")
    with Processes() as processes:
        processes.teacher(server.url, root / "teacher", root / "teacher.log")
        yield Bench(root, server.url, processes, usual)
    server.stop()
