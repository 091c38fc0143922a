"""Rock tokens: those whose divergence from the teacher stays high through a run, by its recorded rollouts.

A recorded token y counts with r − 1 − log r, r = q(y)/p(y), which is never negative and whose expectation
under the student is KL(student‖teacher) at its position (Schulman, "Approximating KL divergence", 2020, k3).
Shares are of the sum over all tokens of the same stretch of the run. Rollouts are a sample, so are these.
Guided responses are left out: under the prompt that is trained on they are no sample of the student's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from student_trainer.report.rollouts import visible
from student_trainer.report.run_data import RolloutRecord

STRETCH = 3  # early is the first third of the recorded steps, late the last
FEWEST = 5  # occurrences in a stretch below which nothing is said about a token
KEPT = 0.5  # share of its early divergence that a rock token has kept
SHOWN = 12
MAX_LOG_RATIO = 10.0  # nats; one absurd token must not be the whole sum


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a token was in a stretch of the run; `mean` in nats per occurrence, `share` of all divergence."""

    count: int
    mean: float
    share: float


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """A token early and late."""

    token_id: int
    text: str
    early: Stretch
    late: Stretch
    rock: bool


@dataclass(frozen=True, slots=True)
class RockTokens:
    """Tokens by their late share, largest first; `mean` of all tokens in nats, early and late."""

    tokens: tuple[TokenDivergence, ...]
    early_steps: tuple[int, int]
    late_steps: tuple[int, int]
    early_mean: float
    late_mean: float

    @property
    def rock_share(self) -> float:
        """Share of the late divergence that rock tokens have."""
        return sum(token.late.share for token in self.tokens if token.rock)


def find_rock_tokens(rollouts: Sequence[RolloutRecord]) -> RockTokens | None:
    """None when fewer than two steps were recorded, or no token was scored in one of the stretches.

    A rock token has kept half of its early divergence per occurrence and lies above the late mean of all.
    """
    own = [rollout for rollout in rollouts if not rollout.guided]
    steps = sorted({rollout.step for rollout in own})
    if len(steps) < 2:
        return None
    width = max(1, len(steps) // STRETCH)
    stretches = steps[:width], steps[-width:]
    early, late = (_sums(r for r in own if r.step in set(stretch)) for stretch in stretches)
    if not early or not late:
        return None
    means = [_mean(sums) for sums in (early, late)]
    texts = {key: text for sums in (early, late) for key, (text, _, _) in sums.items()}
    found = []
    for key, text in texts.items():
        before, after = _stretch(early, key), _stretch(late, key)
        enough = min(before.count, after.count) >= FEWEST
        stays = after.mean >= KEPT * before.mean and after.mean > means[1]
        found.append(TokenDivergence(key, text, before, after, rock=enough and stays))
    found.sort(key=lambda token: (-token.late.share, token.token_id))
    return RockTokens(
        tokens=tuple(found),
        early_steps=(stretches[0][0], stretches[0][-1]),
        late_steps=(stretches[1][0], stretches[1][-1]),
        early_mean=means[0],
        late_mean=means[1],
    )


def divergence(log_ratio: float) -> float:
    """r − 1 − log r from log r = log q(y) − log p(y), nats."""
    bounded = min(log_ratio, MAX_LOG_RATIO)
    return math.expm1(bounded) - bounded


def section(rollouts: Sequence[RolloutRecord]) -> str:
    """The report's section about them; empty where the run says nothing."""
    found = find_rock_tokens(rollouts)
    if found is None:
        return ""
    rocks = sum(token.rock for token in found.tokens)
    told = (
        f"{rocks} of {len(found.tokens)} tokens are rocks and carry {100 * found.rock_share:.0f}% of the "
        "late divergence."
        if rocks
        else "No token is one in the rollouts that were recorded."
    )
    body = "".join(_row(token) for token in found.tokens[:SHOWN])
    return (
        '<h2>Rock tokens</h2><p class="note">Tokens whose divergence from the teacher stays: late in the run '
        f"(steps {_steps(found.late_steps)}) still at least half of what it was early "
        f"({_steps(found.early_steps)}), and above the mean of all tokens ({found.early_mean:.3f} nats "
        f"early, {found.late_mean:.3f} late). {told} The largest late shares first; estimated from the "
        "recorded rollouts, KL(student ‖ teacher) at the sampled tokens.</p>"
        '<div class="table"><table class="rocks"><thead><tr><th>token</th><th>id</th><th>seen</th>'
        "<th>nats each, early → late</th><th>share of all, early → late</th><th></th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(token: TokenDivergence) -> str:
    early, late = token.early, token.late
    marked = ' class="rock"' if token.rock else ""
    return (
        f"<tr{marked}><td>{escape(visible(token.text)) or '∅'}</td><td>{token.token_id}</td>"
        f"<td>{early.count} → {late.count}</td><td>{_nats(early)} → {_nats(late)}</td>"
        f"<td>{100 * early.share:.0f}% → {100 * late.share:.0f}%</td>"
        f"<td>{'rock' if token.rock else ''}</td></tr>"
    )


def _nats(stretch: Stretch) -> str:
    return f"{stretch.mean:.3f}" if stretch.count else "–"


def _steps(steps: tuple[int, int]) -> str:
    first, last = steps
    return f"{first}" if first == last else f"{first} to {last}"


Sums = dict[int, tuple[str, int, float]]  # token id → text, occurrences, sum of divergence


def _sums(rollouts: Iterable[RolloutRecord]) -> Sums:
    sums: Sums = {}
    for rollout in rollouts:
        for token, text, ratio in zip(
            rollout.token_ids, rollout.token_texts, rollout.log_ratios, strict=True
        ):
            if math.isfinite(ratio):
                _, count, total = sums.get(token, (text, 0, 0.0))
                sums[token] = (text, count + 1, total + divergence(ratio))
    return sums


def _mean(sums: Sums) -> float:
    return math.fsum(total for _, _, total in sums.values()) / sum(count for _, count, _ in sums.values())


def _stretch(sums: Sums, token: int) -> Stretch:
    _, count, total = sums.get(token, ("", 0, 0.0))
    everything = math.fsum(each for _, _, each in sums.values())
    return Stretch(count, total / count if count else 0.0, total / everything if everything > 0 else 0.0)
