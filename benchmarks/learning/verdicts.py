"""From results to figures over seeds, and from figures to whether an ordering appeared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.learning.arms import START, Arm, Claim, Experiment, Measure

Verdict = Literal["appears", "does not appear", "the opposite appears", "not clear", "not measured"]
FEW_TOKENS_APART = 0.05  # how far arms may be from each other's tokens and still count as equal


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over seeds: mean, standard deviation (n − 1; 0 of one seed) and the single values."""

    mean: float
    deviation: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """A claim and what was found; `difference` is `more` minus `less`, seed by seed."""

    claim: Claim
    verdict: Verdict
    more: Spread | None
    less: Spread | None
    difference: Spread | None


@dataclass(frozen=True)
class Findings:
    """Results of one experiment: arm → seed → result. `prompts` are the held-out prompts of a look."""

    experiment: Experiment
    results: Mapping[str, Mapping[int, dict[str, Any]]]
    prompts: int

    def seeds(self, arm: str) -> list[int]:
        return sorted(self.results.get(arm, {}))

    def at_end(self, arm: str, measure: Measure) -> dict[int, float]:
        """By seed."""
        return {seed: figure(self.results[arm][seed]["looks"][-1], measure) for seed in self.seeds(arm)}

    def at_start(self, arm: str, measure: Measure) -> dict[int, float]:
        """Of the arm's start, by seed."""
        return {seed: figure(self.results[arm][seed]["looks"][0], measure) for seed in self.seeds(arm)}

    def starts(self) -> dict[str, Arm]:
        """One arm with results for every start that arms have."""
        with_results = [arm for arm in self.experiment.arms if arm.trained and self.seeds(arm.name)]
        return {arm.start: arm for arm in reversed(with_results)}

    def tokens(self) -> dict[str, Spread]:
        """Response tokens that each arm used."""
        return {
            arm.name: spread([float(self.results[arm.name][s]["tokens_used"]) for s in self.seeds(arm.name)])
            for arm in self.experiment.arms
            if arm.trained and self.seeds(arm.name)
        }

    def tokens_apart(self) -> float:
        """(most − fewest) / mean of the arms' tokens; 0 for equal budgets."""
        means = [tokens.mean for tokens in self.tokens().values()]
        return (max(means) - min(means)) / statistics.fmean(means) if means else 0.0

    def judged(self) -> list[Judged]:
        return [judge(claim, *self._sides(claim), prompts=self.prompts) for claim in self.experiment.claims]

    def _sides(self, claim: Claim) -> tuple[dict[int, float], dict[int, float]]:
        less_measure = claim.less_measure or claim.measure
        if claim.more == START:
            return self.at_start(claim.less, claim.measure), self.at_end(claim.less, less_measure)
        more = self.at_end(claim.more, claim.measure)
        if claim.less == START:
            return more, self.at_start(claim.more, less_measure)
        return more, self.at_end(claim.less, less_measure)


def figure(look: Mapping[str, Any], measure: Measure) -> float:
    """The measure in one look at a student; NaN where the experiment has none."""
    if measure.figure == "kl":
        return float(look.get("kl", math.nan))
    return float(look["sets"][measure.on][measure.figure])


def spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation, tuple(values))


def judge(claim: Claim, more: Mapping[int, float], less: Mapping[int, float], *, prompts: int) -> Judged:
    """Compare seed by seed.

    An ordering appears when every seed has it and the mean difference is more than two standard errors,
    over seeds or over prompts, whichever is larger; likewise the opposite. Alike are two whose difference
    stays within the margin in every seed.
    """
    seeds = sorted(more.keys() & less.keys())
    if not seeds:
        return Judged(claim, "not measured", None, None, None)
    difference = spread([more[seed] - less[seed] for seed in seeds])
    found = (spread([more[seed] for seed in seeds]), spread([less[seed] for seed in seeds]), difference)
    if claim.alike is not None:
        inside = [abs(value) <= claim.alike for value in difference.values]
        verdict: Verdict = "appears" if all(inside) else "not clear" if any(inside) else "does not appear"
        return Judged(claim, verdict, *found)
    over_seeds = difference.deviation / math.sqrt(len(seeds))
    clear = abs(difference.mean) > 2.0 * max(over_seeds, _over_prompts(claim, found[0], found[1], prompts))
    if clear and all(value > 0 for value in difference.values):
        return Judged(claim, "appears", *found)
    if clear and all(value < 0 for value in difference.values):
        return Judged(claim, "the opposite appears", *found)
    return Judged(claim, "not clear", *found)


def _over_prompts(claim: Claim, more: Spread, less: Spread, prompts: int) -> float:
    """Standard error of the difference of two shares, each of `prompts` prompts in every seed; else 0."""
    if claim.measure.figure not in ("greedy", "sampled"):
        return 0.0
    variance = sum(share.mean * (1.0 - share.mean) for share in (more, less))
    return math.sqrt(variance / (prompts * len(more.values)))
