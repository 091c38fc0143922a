"""All experiments, by name."""

from __future__ import annotations

from benchmarks.learning.arms import Experiment
from benchmarks.learning.from_oneself import CONTEXT, FEEDBACK, SECOND_SKILL
from benchmarks.learning.from_teachers import (
    EXTRAPOLATION,
    LIGHTNING,
    REWARD_MIXING,
    STRONG_TO_WEAK,
    TOKEN_BUDGETS,
    TWO_EXPERTS,
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        STRONG_TO_WEAK, EXTRAPOLATION, CONTEXT, SECOND_SKILL, FEEDBACK, TWO_EXPERTS, LIGHTNING, TOKEN_BUDGETS,
        REWARD_MIXING,
    )
}  # fmt: skip


def chosen(names: list[str] | None) -> list[Experiment]:
    """The experiments of these names; a name's beginning is enough ("a", "c-priv").

    Raises:
        ValueError: none, or several, begin like that.
    """
    if not names:
        return list(EXPERIMENTS.values())
    found = []
    for name in names:
        matching = [experiment for known, experiment in EXPERIMENTS.items() if known.startswith(name)]
        if len(matching) != 1:
            raise ValueError(
                f"--only: got {name!r}, allowed: {', '.join(EXPERIMENTS)}, or a unique beginning"
            )
        found.append(matching[0])
    return found
