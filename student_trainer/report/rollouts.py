"""Sampled rollouts as HTML: every token coloured by the teacher's log-ratio log q - log p.

Blue: the teacher finds the token more likely than the student does. Orange: less likely, so the
token is being pushed down. The colour saturates at SATURATION nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from student_trainer.report.run_data import RolloutRecord

SATURATION = 4.0
QUIET = 0.05  # nats; below this both models agree and the token stays plain
MAX_TOKENS = 400
PER_STEP = 6
STEPS_SHOWN = 4


def choose(rollouts: Sequence[RolloutRecord]) -> dict[int, list[RolloutRecord]]:
    """A few rollouts of a few steps: first, last and evenly between, one per prompt."""
    by_step: dict[int, list[RolloutRecord]] = {}
    for rollout in rollouts:
        by_step.setdefault(rollout.step, []).append(rollout)
    steps = sorted(by_step)
    if len(steps) > STEPS_SHOWN:
        spread = (len(steps) - 1) / (STEPS_SHOWN - 1)
        steps = [steps[round(place * spread)] for place in range(STEPS_SHOWN)]
    return {step: _one_per_prompt(by_step[step])[:PER_STEP] for step in steps}


def _one_per_prompt(rollouts: Sequence[RolloutRecord]) -> list[RolloutRecord]:
    first: dict[str, RolloutRecord] = {}
    for rollout in rollouts:
        first.setdefault(rollout.group, rollout)
    return list(first.values())


def strength(log_ratio: float) -> float:
    """Opacity in [0, 1] of the token's colour, growing with |log q - log p|."""
    size = abs(log_ratio)
    return 0.0 if size < QUIET else round(0.12 + 0.78 * min(size / SATURATION, 1.0) ** 0.7, 3)


def visible(text: str) -> str:
    """The token's text with what cannot be seen made visible."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip() or shown == "" else "␣" * len(shown)


def card(rollout: RolloutRecord, key: str) -> str:
    """One rollout as an <article>; the script finds its numbers under `key` in the page's data."""
    ratios = rollout.log_ratios
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    mean = sum(finite) / len(finite) if finite else math.nan
    tokens = "".join(
        _token(text, ratio, index)
        for index, (text, ratio) in enumerate(zip(rollout.token_texts, ratios, strict=True))
        if index < MAX_TOKENS
    )
    hidden = len(rollout.token_texts) - MAX_TOKENS
    guided = '<span class="chip" title="sampled under a context">guided</span>' if rollout.guided else ""
    more = f'<p class="more">… {hidden:,} more tokens</p>' if hidden > 0 else ""
    return (
        f'<article class="rollout" data-rollout="{escape(key, quote=True)}">'
        f'<header><span class="prompt">{escape(rollout.prompt_text)}</span>{guided}{_verdict(rollout.reward)}'
        f'<span class="mean" title="mean of log q − log p over the response">{_signed(mean)}</span></header>'
        f'<p class="tokens">{tokens}</p>{more}</article>'
    )


def readout(rollout: RolloutRecord) -> dict[str, Any]:
    """The numbers behind a card: student and teacher log-probabilities and the teacher's alternatives."""
    return {
        "p": [_rounded(value) for value in rollout.student_logprobs[:MAX_TOKENS]],
        "q": [_rounded(value) for value in rollout.teacher_logprobs[:MAX_TOKENS]],
        "top": [
            [[visible(text) or "∅", _rounded(logprob)] for text, logprob in position[:5]]
            for position in rollout.teacher_top[:MAX_TOKENS]
        ],
    }


def _token(text: str, ratio: float, index: int) -> str:
    shown = escape(visible(text)) or "∅"
    line_break = "<br>" if text.endswith("\n") else ""
    if not math.isfinite(ratio):
        return f'<span class="t unscored" data-i="{index}">{shown}</span>{line_break}'
    opacity = strength(ratio)
    side = "up" if ratio > 0 else "down"
    style = f' style="--a:{opacity}"' if opacity else ""
    return (
        f'<span class="t{f" {side}" if opacity else ""}"{style} data-i="{index}">{shown}</span>{line_break}'
    )


def _verdict(reward: float | None) -> str:
    if reward is None:
        return ""
    if reward >= 1.0:
        return '<span class="chip good">correct</span>'
    return f'<span class="chip bad">{"wrong" if reward <= 0 else f"reward {reward:.2f}"}</span>'


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if math.isfinite(value) else "no score"


def _rounded(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
