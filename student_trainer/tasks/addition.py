"""Addition of two 3-digit numbers with the work shown, units first.

`347+585=` is answered `12,13,09:932`: for units, tens and hundreds a pair of carry and digit,
then the sum. The whole answer is a function of the prompt, so a model can be judged exactly.
Feedback on a wrong one is in the task's own characters: `-2` says that the second part, the tens, is the
first that is wrong, and `-4` that it is the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from student_trainer.tasks.task import Example

SMALLEST, LARGEST = 100, 999
CHARACTERS = "0123456789+-=,:"
MAX_ANSWER_TOKENS = 16  # the longest answer has 13 characters and an end token

_COUNT = LARGEST - SMALLEST + 1
_HELD_OUT_ONE_IN = 10


class Addition:
    """All ordered pairs of operands; a tenth of the unordered pairs is held out by hash."""

    name = "addition"

    def __len__(self) -> int:
        return _COUNT * _COUNT

    def example(self, index: int) -> Example:
        first, second = operands(index)
        return Example(
            prompt=f"{first}+{second}=",
            answer=str(first + second),
            fields={"solution": solution(first, second)},
        )

    def held_out(self) -> npt.NDArray[np.bool_]:
        first, second = np.divmod(np.arange(len(self), dtype=np.uint64), np.uint64(_COUNT))
        # Both orders of a pair fall on the same side: b+a would give a+b away.
        pair = np.minimum(first, second) * np.uint64(_COUNT) + np.maximum(first, second)
        chosen: npt.NDArray[np.bool_] = _splitmix64(pair) % np.uint64(_HELD_OUT_ONE_IN) == 0
        return chosen

    def reward(self, example: Example, text: str) -> float:
        _, colon, result = text.rpartition(":")
        return float(colon == ":" and result == example.answer)

    def feedback(self, example: Example, text: str) -> str | None:
        if self.reward(example, text) == 1.0:
            return None
        expected, given = _parts(example.fields["solution"]), _parts(text)
        given += [""] * (len(expected) - len(given))
        wrong = next((i for i, part in enumerate(expected) if given[i] != part), len(expected) - 1)
        return f"-{wrong + 1}"


def operands(index: int) -> tuple[int, int]:
    """The two numbers of example `index`."""
    if not 0 <= index < _COUNT * _COUNT:
        raise IndexError(f"addition example: got {index}, allowed are 0 to {_COUNT * _COUNT - 1}")
    first, second = divmod(index, _COUNT)
    return SMALLEST + first, SMALLEST + second


def solution(first: int, second: int, forgotten: Sequence[bool] = (False, False)) -> str:
    """The worked answer; where `forgotten[i]`, the carry out of column i is written but not added."""
    carry, pairs, digits = 0, [], []
    for column in range(3):
        total = first // 10**column % 10 + second // 10**column % 10 + carry
        pairs.append(f"{total // 10}{total % 10}")
        digits.append(str(total % 10))
        carry = total // 10
        if column < 2 and forgotten[column]:
            carry = 0
    result = ("1" if carry else "") + "".join(reversed(digits))
    return f"{','.join(pairs)}:{result}"


def _parts(text: str) -> list[str]:
    """The columns' pairs and the sum."""
    return text.replace(":", ",").split(",")


def _splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A fixed 64-bit mix (Steele, Lea & Flood 2014, the finaliser of SplitMix64); wraps by design."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
