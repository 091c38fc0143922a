"""TensorBoard, Weights & Biases and trackio, each imported only when a run file names it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from tutelage_client.errors import invalid

from student_trainer.config import RunConfig
from student_trainer.metrics import Tracker
from student_trainer.sections import Tracker as TrackerName


class TensorBoardTracker:
    """Event files in RUN_DIR/tensorboard; what a resumed run repeats is purged."""

    def __init__(self, config: RunConfig, step: int) -> None:
        module = _require("torch.utils.tensorboard", "tensorboard")
        directory = config.run.directory / "tensorboard"
        self._writer = module.SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """One Weights & Biases run per training run; a resumption continues it."""

    def __init__(self, config: RunConfig, step: int) -> None:
        module = _require("wandb", "wandb")
        self._run: Any = module.init(
            project=config.queue.namespace,
            name=config.run.name,
            dir=str(config.run.directory),
            config=config.model_dump(mode="json"),
            resume="allow",
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """A local trackio dashboard."""

    def __init__(self, config: RunConfig, step: int) -> None:
        self._module = _require("trackio", "trackio")
        self._module.init(
            project=config.queue.namespace, name=config.run.name, config=config.model_dump(mode="json")
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()


TRACKERS: dict[TrackerName, Callable[[RunConfig, int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise invalid(
            f"training.trackers: {package!r} is not installed; run pip install {package}, or leave it out"
        ) from error
