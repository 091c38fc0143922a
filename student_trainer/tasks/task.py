"""What a task is: numbered examples, which of them are held out, and a checker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tutelage_client.errors import invalid


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with what is known about it."""

    prompt: str | tuple[Mapping[str, str], ...]  # plain text, or chat messages (role, content)
    answer: str | None  # what the checker compares with; None: no verifiable reward
    fields: Mapping[str, Any] = field(default_factory=dict)  # everything else the source says


class Task(Protocol):
    """A built-in source of examples 0 … len − 1."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def example(self, index: int) -> Example: ...

    def held_out(self) -> npt.NDArray[np.bool_]:
        """bool [len]: the examples kept for evaluation, never sampled in training."""
        ...

    def reward(self, example: Example, text: str) -> float:
        """1.0 when the response `text` (special tokens removed) answers `example`, else 0.0."""
        ...

    def feedback(self, example: Example, text: str) -> str | None:
        """What is wrong with the response, without giving the answer away; None where nothing is."""
        ...


def load_task(name: str) -> Task:
    """The built-in task of that name; raises TutelageError for an unknown one."""
    from student_trainer.tasks.addition import Addition

    tasks = {"addition": Addition}
    if name not in tasks:
        raise invalid(f"data.task: got {name!r}, allowed are {sorted(tasks)}")
    return tasks[name]()
