"""The quickstart's teacher and warmed-up student: trained once from scratch, then found again.

python -m launcher.quickstart_models --directory artifacts/quickstart
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.parent_death import PARENT_VARIABLE, follow_parent
from launcher.quickstart_recipes import RECIPES

# Raise it when training changes in a way that the recipes do not show.
CONTENT_VERSION = 1


class TrainingFailedError(RuntimeError):
    """A model's training process ended without a model; says which, and the end of its output."""


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """One look at one of the two trainings."""

    name: str  # "teacher" or "student"
    step: int
    steps: int
    loss: float


ProgressCallback = Callable[[TrainingProgress], None]


def prepare(directory: Path, seed: int = 0, progress: ProgressCallback | None = None) -> tuple[Path, Path]:
    """Paths of the teacher and the student, trained here if they are not in `directory` yet.

    Each lives in a directory named after its settings, so another seed or recipe never meets
    old weights. Both train at the same time, one process and one thread each.

    Args:
        progress: called every few steps, from other threads; never when both models are there.

    Raises:
        TrainingFailedError: a training ended without a model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}-{content_key(name, seed)}" for name in RECIPES}
    missing = [name for name, path in paths.items() if not path.is_dir()]
    with contextlib.ExitStack() as stack:
        trainings = [stack.enter_context(_training(name, seed, paths[name], progress)) for name in missing]
        for training in trainings:
            training.finish()
    return paths["teacher"], paths["student"]


def name_models(teacher: Path, student: Path) -> None:
    """Let the names that the recipes use, `teacher` and `student` beside the models, point at them."""
    for name, path in {"teacher": teacher, "student": student}.items():
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        temporary.replace(path.with_name(name))


def content_key(name: str, seed: int) -> str:
    """Twelve hex digits of a hash of everything that decides the weights."""
    settings = {"version": CONTENT_VERSION, "seed": seed, **asdict(RECIPES[name])}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class _Training:
    """A child process that trains one model and says how far it is, one JSON line at a time."""

    def __init__(self, name: str, seed: int, path: Path, progress: ProgressCallback | None) -> None:
        self.name = name
        self.path = path
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "launcher.quickstart_models",
                "--directory", str(path), "--seed", str(seed), "--only", name,
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", PARENT_VARIABLE: str(os.getpid())},
        )  # fmt: skip
        self._progress = progress
        self._errors = ""
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._follow, self._listen)]
        for reader in self._readers:
            reader.start()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if self._progress is not None:
                self._progress(TrainingProgress(self.name, **json.loads(line)))

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self._errors = self.process.stderr.read()

    def finish(self) -> None:
        """Wait for the model."""
        code = self.process.wait()
        for reader in self._readers:
            reader.join()
        # Whoever trained it: another process may have been faster, and a directory is always whole.
        if not self.path.is_dir():
            end = self._errors.strip()[-2000:]
            raise TrainingFailedError(f"training the {self.name} ended with status {code}: {end}")


@contextlib.contextmanager
def _training(name: str, seed: int, path: Path, progress: ProgressCallback | None) -> Iterator[_Training]:
    """A training that does not outlive this block."""
    training = _Training(name, seed, path, progress)
    try:
        yield training
    finally:
        if training.process.poll() is None:
            training.process.terminate()
            training.process.wait()


def _train_one(name: str, seed: int, path: Path) -> None:
    """In the child: train and let the directory appear whole, by a rename."""
    from launcher.quickstart_training import train
    from services.models.export import export_model
    from student_trainer.tasks.addition import CHARACTERS
    from student_trainer.tasks.characters import character_tokenizer

    recipe = RECIPES[name]

    def report(step: int, loss: float) -> None:
        if step % 10 == 0 or step == recipe.steps:
            print(json.dumps({"step": step, "steps": recipe.steps, "loss": loss}), flush=True)

    export_model(train(recipe, seed, report), character_tokenizer(CHARACTERS), path)


def prepare_with_bars(directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """`prepare` with one progress bar for each model on the terminal, elsewhere with a line before."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("training the {task.fields[model]}"),
        BarColumn(),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}, loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    console = Console()
    if not console.is_terminal:  # where bars are drawn once, at their end
        print(f"a teacher and a student in {directory}: found, or trained now, in minutes", flush=True)
    with Progress(*columns, console=console) as bars:
        tasks = {}

        def show(look: TrainingProgress) -> None:
            if look.name not in tasks:
                tasks[look.name] = bars.add_task("", total=look.steps, model=look.name, loss=look.loss)
            bars.update(tasks[look.name], completed=look.step, loss=look.loss)

        return prepare(directory, seed, show)


def main() -> int:
    """Entry point of `python -m launcher.quickstart_models`."""
    parser = argparse.ArgumentParser(description="Train the quickstart's teacher and student from scratch.")
    parser.add_argument("--directory", type=Path, default=Path("artifacts/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(RECIPES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is not None:
        follow_parent()
        _train_one(arguments.only, arguments.seed, arguments.directory)
        return 0
    paths = prepare_with_bars(arguments.directory, arguments.seed)
    name_models(*paths)
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
