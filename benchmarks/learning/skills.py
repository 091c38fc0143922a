"""Addition and subtraction of 3-digit numbers with the work shown, as prompts, answers and data files.

`585-347=` is answered `12,03,02:238`: for units, tens and hundreds a pair of borrow and digit, then the
difference; addition is `student_trainer.tasks.addition`. A pair of operands is held out for both skills or
for none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from student_trainer.tasks.addition import CHARACTERS, Addition, operands
from student_trainer.tasks.addition import solution as added

ADDITION, SUBTRACTION = "addition", "subtraction"
SKILLS = (ADDITION, SUBTRACTION)
RULE = "!"  # before a prompt: work with care
HINT = ";"  # ends what is known about the answer before the prompt
LETTERS = CHARACTERS + RULE + HINT
MAX_NEW_TOKENS = 20
ROWS = 16_384  # of a data file; more than the prompts of one arm
_ROWS_SEED, _HELD_OUT_SEED = 11, 12


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt with its worked answer."""

    skill: str
    first: int
    second: int

    @property
    def prompt(self) -> str:
        return f"{self.first}{'+' if self.skill == ADDITION else '-'}{self.second}="

    @property
    def answer(self) -> str:
        return self.solution().rpartition(":")[2]

    def solution(self, forgotten: Sequence[bool] = (False, False)) -> str:
        """The worked answer; where `forgotten[i]`, the carry or borrow of column i is written, not used."""
        work = added if self.skill == ADDITION else subtracted
        return work(self.first, self.second, forgotten)


def problem(skill: str, index: int) -> Problem:
    """Problem of pair `index` of the addition task; a difference is never negative."""
    first, second = operands(index)
    if skill == SUBTRACTION:
        first, second = max(first, second), min(first, second)
    return Problem(skill, first, second)


def subtracted(first: int, second: int, forgotten: Sequence[bool] = (False, False)) -> str:
    """The worked difference, three digits; where `forgotten[i]`, the borrow of column i is not taken off."""
    borrow, pairs, digits = 0, [], []
    for column in range(3):
        total = first // 10**column % 10 - second // 10**column % 10 - borrow
        borrow = int(total < 0)
        pairs.append(f"{borrow}{total % 10}")
        digits.append(str(total % 10))
        if column < 2 and forgotten[column]:
            borrow = 0
    return f"{','.join(pairs)}:{''.join(reversed(digits))}"


@lru_cache
def training_pairs() -> npt.NDArray[np.int64]:
    """Pairs that models and students may learn from."""
    return np.flatnonzero(~Addition().held_out())


def held_out(skill: str, count: int) -> list[Problem]:
    """The same `count` held-out problems for every model."""
    pairs = np.flatnonzero(Addition().held_out())
    chosen = np.random.default_rng(_HELD_OUT_SEED).choice(pairs, count, replace=False)
    return [problem(skill, int(index)) for index in chosen]


def data_file(directory: Path, skills: Sequence[str], rows: int = ROWS) -> Path:
    """A file of training problems, the skills taking turns; written once, the same for every seed."""
    path = directory / f"{'-'.join(skills)}-{rows}.jsonl"
    if not path.is_file():
        lines = [json.dumps(row) for row in _rows(skills, rows)]
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
    return path


def _rows(skills: Sequence[str], rows: int) -> Iterator[dict[str, str]]:
    chosen = np.random.default_rng(_ROWS_SEED).choice(training_pairs(), rows, replace=False)
    for place, index in enumerate(chosen):
        found = problem(skills[place % len(skills)], int(index))
        yield {
            "prompt": found.prompt,
            "answer": found.answer,
            "solution": found.solution(),
            "skill": found.skill,
        }


def known(found: Problem, what: str) -> str:
    """What stands before the prompt: nothing, the rule, the worked answer, or the result alone."""
    texts = {
        "": "",
        "rule": RULE,
        "solution": found.solution() + HINT,
        "result": found.answer + HINT,
    }
    return texts[what]
