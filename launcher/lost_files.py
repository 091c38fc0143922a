"""What a run file names on this machine and is not there: said before any process starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage_client.errors import invalid

from services.models.place import is_lost

if TYPE_CHECKING:
    from student_trainer.config import RunConfig

_MADE_BY_QUICKSTART = [Path("artifacts/quickstart") / name for name in ("student", "teacher")]


def check_files(config: RunConfig) -> None:
    """Raises TutelageError that names every model, adapter, score file and data file that does not exist."""
    if lost := list(_lost(config)):
        raise invalid("\n  ".join(lost))


def hint(path: str | Path) -> str:
    """What to do about a directory that is not there, where that is known."""
    return "; `tutelage quickstart` makes it" if Path(path) in _MADE_BY_QUICKSTART else ""


def _lost(config: RunConfig) -> Iterator[str]:
    from student_trainer.cached_scores import score_files

    models = {"[student] model": config.student.model}
    for name, entry in config.teachers.items():
        if entry.address is None and entry.model is not None:
            models[f"[teachers.{name}] model"] = entry.model
    for place, model in models.items():
        if is_lost(model):
            yield f"{place}: {model}: there is no such directory{hint(model)}"
    for name, entry in config.teachers.items():
        if entry.adapter is not None and not entry.adapter.is_dir():
            yield f"[teachers.{name}] adapter: {entry.adapter}: there is no such directory"
    for place, path in score_files(config):
        if not path.is_file():
            yield f"{place}: {path}: there is no such file; `tutelage score` writes it"
    if config.data.path is not None and not config.data.path.is_file():
        yield f"[data] path: {config.data.path}: there is no such file"
