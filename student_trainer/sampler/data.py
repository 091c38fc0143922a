"""Which example a group index stands for, and how a response to it is rewarded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tutelage_client.errors import invalid

from student_trainer.sampler.checkers import CHECKERS, OBJECTIONS
from student_trainer.sampler.records import Records, field_of, open_records
from student_trainer.sampler.settings import DataSettings
from student_trainer.tasks import Example, Task, load_task

# The order of the evaluation prompts must not depend on a run's seed: runs are compared on them.
_EVALUATION_ORDER_SEED = 20_240_617
_COUNTED_AT_ONCE = 1024


class PromptSource:
    """Examples by group index: a seeded permutation of the training examples, epoch by epoch.

    Any process that builds it from the same settings and seed gives the same examples, so a
    group can be sampled again anywhere.
    """

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        shuffle: bool = True,
        keep: Callable[[Task, npt.NDArray[np.int64]], npt.NDArray[np.int64]] | None = None,
    ) -> None:
        self.task = task
        self.seed = seed
        self.shuffle = shuffle
        held_out = task.held_out()
        self.training = np.flatnonzero(~held_out)
        evaluation = np.flatnonzero(held_out)
        if keep is not None:
            self.training, evaluation = keep(task, self.training), keep(task, evaluation)
        if not len(self.training):
            raise invalid(f"data: {task.name} has no training prompt ({len(task)} prompts in all)")
        self.evaluation = np.random.default_rng(_EVALUATION_ORDER_SEED).permutation(evaluation)
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def training_index(self, group_index: int) -> int:
        """The example's number within the task; pure in seed and group index."""
        if group_index < 0:
            raise ValueError(f"group_index: got {group_index}, must not be negative")
        epoch, position = divmod(group_index, len(self.training))
        if self.shuffle:
            position = int(self._permutation(epoch)[position])
        return int(self.training[position])

    def example(self, group_index: int) -> Example:
        return self.task.example(self.training_index(group_index))

    def restrict(self, examples: npt.NDArray[np.int64]) -> None:
        """Train on these examples (numbers within the task) only; before the first group is asked for."""
        self.training = np.intersect1d(self.training, examples)
        self._permutation.cache_clear()
        if not len(self.training):
            raise invalid(f"data: {self.task.name} has no training prompt among the {len(examples)} wanted")

    def held_out(self, count: int) -> list[Example]:
        """The first `count` evaluation examples (fewer when there are fewer), the same for every run."""
        if not len(self.evaluation):
            raise invalid(f"data.holdout: {self.task.name} holds no prompt out; raise data.holdout")
        return [self.task.example(int(index)) for index in self.evaluation[:count]]

    def reward(self, example: Example, text: str) -> float | None:
        """The checker's verdict, or None where the example has no answer to check."""
        return None if example.answer is None else self.task.reward(example, text)

    def feedback(self, example: Example, text: str) -> str | None:
        """What the checker says about a response; None where it has nothing to say."""
        return None if example.answer is None else self.task.feedback(example, text)

    def place(self, group_index: int) -> str:
        """Where the example comes from, for messages."""
        return f"row {self.training_index(group_index)} of {self.task.name}"

    def _draw_permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.training))


class RecordTask:
    """A file or a data set in the shape of a task."""

    def __init__(self, records: Records, settings: DataSettings) -> None:
        if not len(records):
            raise invalid(f"data: {records.source} is empty")
        self.name = records.source
        self._records = records
        self._settings = settings
        self._check = CHECKERS[settings.checker]
        self._object = OBJECTIONS[settings.checker]

    def __len__(self) -> int:
        return len(self._records)

    def example(self, index: int) -> Example:
        row, settings = self._records.row(index), self._settings
        place = f"row {index} of {self.name}"
        prompt = _prompt(field_of(row, settings.prompt_field, "data.prompt_field", place), place)
        answer = None
        if settings.answer_field is not None:
            answer = str(field_of(row, settings.answer_field, "data.answer_field", place))
        return Example(prompt, answer, row)

    def held_out(self) -> npt.NDArray[np.bool_]:
        """Chosen by a hash of the prompt, so repeated prompts never fall on both sides."""
        limit = int(self._settings.holdout * 2**64)
        prompts = self._records.column(self._settings.prompt_field)
        return np.fromiter((_hash(prompt) < limit for prompt in prompts), dtype=np.bool_, count=len(self))

    def reward(self, example: Example, text: str) -> float:
        assert example.answer is not None
        return self._check(text, example.answer)

    def feedback(self, example: Example, text: str) -> str | None:
        return None if self.reward(example, text) >= 1.0 else self._object(text)


def load_prompts(
    settings: DataSettings,
    *,
    seed: int,
    prompt_tokens: Callable[[Sequence[Example]], list[int]] | None = None,
) -> PromptSource:
    """The prompt source of a run.

    `prompt_tokens` counts the tokens of prompts; it is needed when max_prompt_tokens is set.
    """
    if settings.task is not None:
        return PromptSource(load_task(settings.task), seed=seed, shuffle=settings.shuffle)
    task = RecordTask(open_records(settings), settings)
    limit = settings.max_prompt_tokens
    if limit is None:
        return PromptSource(task, seed=seed, shuffle=settings.shuffle)
    if prompt_tokens is None:
        raise ValueError("prompt_tokens: needed because data.max_prompt_tokens is set")

    def short_enough(task: Task, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        counts: list[int] = []
        for start in range(0, len(indices), _COUNTED_AT_ONCE):
            some = indices[start : start + _COUNTED_AT_ONCE]
            counts += prompt_tokens([task.example(int(index)) for index in some])
        return indices[np.array(counts, dtype=np.int64) <= limit]

    return PromptSource(task, seed=seed, shuffle=settings.shuffle, keep=short_enough)


def _prompt(value: Any, place: str) -> str | tuple[Mapping[str, str], ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return tuple(value)
    raise invalid(f"{place}: got a prompt of type {type(value).__name__}, must be text or a list of messages")


def _hash(prompt: Any) -> int:
    data = json.dumps(prompt, sort_keys=True, ensure_ascii=False).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
