"""Verifiable rewards for files and data sets: a response text against the expected answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact(text: str, answer: str) -> float:
    """1.0 when both texts are equal, white space at the ends aside."""
    return float(text.strip() == answer.strip())


def numeric(text: str, answer: str) -> float:
    """1.0 when the last number of the text equals the last number of the answer."""
    found, expected = last_number(text), last_number(answer)
    return float(found is not None and found == expected)


def boxed(text: str, answer: str) -> float:
    r"""1.0 when the content of the last complete \boxed{…} equals the answer.

    Compared as text without white space and $, then as numbers where both are one.
    """
    found = last_boxed(text)
    if found is None:
        return 0.0
    expected = last_boxed(answer)
    left, right = _plain(found), _plain(answer if expected is None else expected)
    if left == right:
        return 1.0
    both_numbers = _NUMBER.fullmatch(left) and _NUMBER.fullmatch(right)
    return float(bool(both_numbers) and last_number(left) == last_number(right))


def exact_objection(text: str) -> str:
    """What `exact` has against a wrong response."""
    return f"The answer {text.strip()!r} is wrong." if text.strip() else "There is no answer."


def numeric_objection(text: str) -> str:
    """What `numeric` has against a wrong response."""
    found = last_number(text)
    return "There is no number in the answer." if found is None else f"The last number, {found}, is wrong."


def boxed_objection(text: str) -> str:
    r"""What `boxed` has against a wrong response."""
    found = last_boxed(text)
    return r"There is no \boxed{} in the answer." if found is None else rf"\boxed{{{found}}} is wrong."


def last_number(text: str) -> Decimal | None:
    """The last decimal number in `text`; commas between digits are read as thousands."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…} whose braces close, or None."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        begin = start + len("\\boxed{")
        depth = 1
        for position in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin:position]
        start = text.rfind("\\boxed{", 0, start)
    return None


def _plain(text: str) -> str:
    return re.sub(r"[\s$]", "", text)


CHECKERS: dict[str, Callable[[str, str], float]] = {"exact": exact, "numeric": numeric, "boxed": boxed}
OBJECTIONS: dict[str, Callable[[str], str]] = {
    "exact": exact_objection,
    "numeric": numeric_objection,
    "boxed": boxed_objection,
}
