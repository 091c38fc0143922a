"""What has to be done for a set of experiments: models to train and arms to run, and what is done already."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import Arm, Experiment, Sizes, arm_key
from benchmarks.learning.models import MODELS, ModelSpec, model_path


@dataclass(frozen=True, slots=True)
class Task:
    """One model to train (arm "") or one arm to run, in whose name; `path` is there when it is done."""

    experiment: str
    arm: str
    model: str
    seed: int
    path: Path
    needs: tuple[Path, ...]

    @property
    def title(self) -> str:
        what = f"{self.experiment[0]}: {self.arm}" if self.arm else f"model: {self.model}"
        return f"{what}, seed {self.seed}"

    @property
    def done(self) -> bool:
        return self.path.exists()

    @property
    def ready(self) -> bool:
        return all(path.exists() for path in self.needs)


def plan_tasks(
    experiments: Sequence[Experiment],
    seeds: Sequence[int],
    directory: Path,
    sizes: Sizes,
    specs: Mapping[str, ModelSpec] = MODELS,
) -> list[Task]:
    """Everything, experiment by experiment, models before the arms that need them; each once."""
    tasks: dict[Path, Task] = {}
    for experiment in experiments:
        arms = [task for seed in seeds for task in _of_experiment(experiment, seed, directory, sizes, specs)]
        for task in sorted(arms, key=lambda task: task.arm != ""):
            tasks.setdefault(task.path, task)
    return list(tasks.values())


def _of_experiment(
    experiment: Experiment, seed: int, directory: Path, sizes: Sizes, specs: Mapping[str, ModelSpec]
) -> Iterator[Task]:
    models = directory / "models"
    for arm in experiment.arms:
        names = [*arm.models(specs), *([experiment.judge] if experiment.judge else [])]
        for name in names:
            yield from _models(name, seed, models, specs)
        needs = tuple(dict.fromkeys(model_path(models, name, seed, specs) for name in names))
        path = result_path(directory, experiment, arm, seed, sizes, specs=specs)
        yield Task(experiment.name, arm.name, "", seed, path, needs)


def _models(name: str, seed: int, models: Path, specs: Mapping[str, ModelSpec]) -> Iterator[Task]:
    before = specs[name].after
    needs: tuple[Path, ...] = ()
    if before is not None:
        yield from _models(before, seed, models, specs)
        needs = (model_path(models, before, seed, specs),)
    own = seed if specs[name].per_seed else 0
    yield Task("", "", name, own, model_path(models, name, seed, specs), needs)


def result_path(
    directory: Path,
    experiment: Experiment,
    arm: Arm,
    seed: int,
    sizes: Sizes,
    *,
    specs: Mapping[str, ModelSpec] = MODELS,
) -> Path:
    """Where the arm's result lies, or will."""
    return directory / "results" / f"{arm_key(experiment, arm, seed, sizes, specs)}.json"


def costs_path(model: Path) -> Path:
    """Where it says what training the model cost."""
    return model.with_name(f"{model.name}.json")


def read_result(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Let the result appear whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def task_document(task: Task) -> dict[str, Any]:
    """A task as JSON, for the process that does it."""
    return {**asdict(task), "path": str(task.path), "needs": [str(path) for path in task.needs]}


def source_version() -> str:
    """The commit that the code is of, with "+" where files that it uses differ from it."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=10", "HEAD")
    if not commit:
        return "unknown"
    changed = git(
        "status", "--porcelain", "--", "benchmarks/learning", "services", "student_trainer", "proto"
    )
    return commit + ("+" if changed else "")
