"""Gradient proofs over several tokens: every sequence of a small tabular policy, enumerated."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.tabular import DIVERGENCES, label, make_plan, random_logits, share
from torch import Tensor

from student_trainer.objective.compile import Plan
from student_trainer.objective.loss import TokenBatch, ViewTensors, objective_loss

# A policy is a table over prefixes; token 0 ends a sequence.

WORDS, LONGEST = 3, 3


def all_sequences() -> list[tuple[int, ...]]:
    complete = []
    for length in range(1, LONGEST + 1):
        for body in itertools.product(range(1, WORDS), repeat=length - 1):
            complete += [(*body, 0)] if length < LONGEST else [(*body, last) for last in range(WORDS)]
    return complete


SEQUENCES = all_sequences()
PREFIXES = sorted({sequence[:t] for sequence in SEQUENCES for t in range(len(sequence))})


def token_logprobs(table: Tensor, sequence: tuple[int, ...]) -> Tensor:
    rows = [PREFIXES.index(sequence[:t]) for t in range(len(sequence))]
    return table.log_softmax(-1)[rows, list(sequence)]


def estimated_gradient(plan: Plan, table: Tensor, *teachers: Tensor) -> Tensor:
    leaf = table.clone().requires_grad_()
    rows = [PREFIXES.index(s[:t]) for s in SEQUENCES for t in range(len(s))]
    lengths = torch.tensor([len(s) for s in SEQUENCES])
    log_p = torch.cat([token_logprobs(table, s) for s in SEQUENCES])
    chance = torch.stack([token_logprobs(table, s).sum().exp() for s in SEQUENCES])
    batch = TokenBatch(
        sampled_ids=torch.tensor([token for s in SEQUENCES for token in s]),
        behaviour_logprobs=log_p,
        mask=torch.ones(len(rows), dtype=torch.bool),
        weight=torch.repeat_interleave(chance, lengths),
        views={
            name: ViewTensors(sampled=torch.cat([token_logprobs(teacher, s) for s in SEQUENCES]))
            for name, teacher in zip(plan.views, teachers, strict=True)
        },
        sequence_lengths=lengths,
    )
    head = torch.eye(WORDS, dtype=torch.float64)
    objective_loss(leaf[rows], head, None, batch, plan, chunk_rows=7).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def tables() -> tuple[Tensor, Tensor]:
    return random_logits(len(PREFIXES), 70, WORDS), random_logits(len(PREFIXES), 71, WORDS)


def test_enumeration_is_complete() -> None:
    table, _ = tables()
    assert len(SEQUENCES) == 1 + 2 + 12
    total = sum(token_logprobs(table, s).sum().exp() for s in SEQUENCES)
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64))


def test_return_to_go_gives_the_gradient_of_the_sequence_divergence() -> None:
    table, teacher = tables()
    leaf = table.clone().requires_grad_()
    divergence = torch.zeros((), dtype=torch.float64)
    for sequence in SEQUENCES:
        log_p, log_q = token_logprobs(leaf, sequence).sum(), token_logprobs(teacher, sequence).sum()
        divergence = divergence + log_p.exp() * (log_p - log_q)
    divergence.backward()
    gradient = estimated_gradient(make_plan(horizon="response"), table, teacher)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-12)
    alone = estimated_gradient(make_plan(horizon=0), table, teacher)
    assert leaf.grad is not None
    assert (alone - leaf.grad).abs().max() > 1e-2


def exact_with_horizon(
    table: Tensor, teacher: Tensor, row: dict[str, Any], *, reach: int, discount: float
) -> Tensor:
    """Σ_{t ≤ t' ≤ t + reach} discount^(t' − t) · ∇_(policy at step t) E[D(p, q at step t')]."""
    leaf = table.clone().requires_grad_()
    total = torch.zeros_like(table)
    depth = torch.tensor([len(prefix) for prefix in PREFIXES])
    for later in range(LONGEST):
        expected = torch.zeros((), dtype=torch.float64)
        for place, prefix in enumerate(PREFIXES):
            if len(prefix) != later:
                continue
            arrival = token_logprobs(leaf, prefix).sum().exp() if prefix else 1.0
            p, q = leaf[place].softmax(-1), teacher[place].softmax(-1)
            local = share(row, p, q).sum()
            expected = expected + arrival * local
        (gradient,) = torch.autograd.grad(expected, leaf)
        ahead = later - depth
        factor = torch.where((ahead >= 0) & (ahead <= reach), discount ** ahead.clamp(min=0).double(), 0)
        total += factor[:, None] * gradient
    return total


@pytest.mark.parametrize(("horizon", "reach"), [(0, 0), (1, 1), (2, 2), (50, 9), ("response", 9)])
@pytest.mark.parametrize("discount", [1.0, 0.6])
@pytest.mark.parametrize("row", DIVERGENCES, ids=label)
def test_horizon_credits_later_tokens_with_discount(
    row: dict[str, Any], discount: float, horizon: int | str, reach: int
) -> None:
    table, teacher = tables()
    plan = make_plan(**row, horizon=horizon, discount=discount)
    expected = exact_with_horizon(table, teacher, row, reach=reach, discount=discount)
    torch.testing.assert_close(estimated_gradient(plan, table, teacher), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", ["mixture", "losses"])
@pytest.mark.parametrize("row", [DIVERGENCES[0], DIVERGENCES[2], DIVERGENCES[5]], ids=label)
def test_horizon_of_several_views(row: dict[str, Any], target: str) -> None:
    """A mixture is a teacher like any other; losses add up."""
    table, first = tables()
    second = random_logits(len(PREFIXES), 72, WORDS)
    weights = (0.3, 0.7)
    views = {
        name: {"weights": f"teacher:{name}", "coefficient": c} for name, c in zip("ab", weights, strict=True)
    }
    plan = make_plan(**row, horizon=1, discount=0.6, target=target, views=views)
    if target == "mixture":
        both = (weights[0] * first.softmax(-1) + weights[1] * second.softmax(-1)).log()
        expected = exact_with_horizon(table, both, row, reach=1, discount=0.6)
    else:
        expected = sum(
            c * exact_with_horizon(table, teacher, row, reach=1, discount=0.6)
            for c, teacher in zip(weights, (first, second), strict=True)
        )
    gradient = estimated_gradient(plan, table, first, second)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
