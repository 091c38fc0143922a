"""Gradient proofs over several tokens: every sequence of a small tabular policy, enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from support.tabular import DIVERGENCES, label, make_plan, random_logits, share
from torch import Tensor

from student_trainer.objective.compile import Plan
from student_trainer.objective.loss import Head, TokenBatch, ViewTensors, objective_loss

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


ROWS = [PREFIXES.index(s[:t]) for s in SEQUENCES for t in range(len(s))]
HEAD = torch.eye(WORDS, dtype=torch.float64)


def every_sequence(plan: Plan, table: Tensor, *teachers: Tensor) -> TokenBatch:
    """All sequences as one batch, each weighed by its probability."""
    lengths = torch.tensor([len(s) for s in SEQUENCES])
    chance = torch.stack([token_logprobs(table, s).sum().exp() for s in SEQUENCES])
    return TokenBatch(
        sampled_ids=torch.tensor([token for s in SEQUENCES for token in s]),
        behaviour_logprobs=torch.cat([token_logprobs(table, s) for s in SEQUENCES]),
        mask=torch.ones(len(ROWS), dtype=torch.bool),
        weight=torch.repeat_interleave(chance, lengths),
        views={
            name: ViewTensors(sampled=torch.cat([token_logprobs(teacher, s) for s in SEQUENCES]))
            for name, teacher in zip(plan.views, teachers, strict=True)
        },
        sequence_lengths=lengths,
    )


def gradient_of(plan: Plan, table: Tensor, batch: TokenBatch, **in_process: Any) -> Tensor:
    leaf = table.clone().requires_grad_()
    objective_loss(leaf[ROWS], HEAD, None, batch, plan, chunk_rows=7, **in_process).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def estimated_gradient(plan: Plan, table: Tensor, *teachers: Tensor) -> Tensor:
    return gradient_of(plan, table, every_sequence(plan, table, *teachers))


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


Local: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]


def exact_with_horizon(
    table: Tensor,
    teacher: Tensor,
    row: dict[str, Any],
    *,
    reach: int,
    discount: float,
    local: Local | None = None,
) -> Tensor:
    """Σ_{t ≤ t' ≤ t + reach} discount^(t' − t) · ∇_(policy at step t) E[D(p, q at step t')].

    `local` is D of p and q at a prefix, of which it is also given the number.
    """
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
            cost = share(row, p, q).sum() if local is None else local(p, q, place)
            expected = expected + arrival * cost
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


# Pathwise: the divergence of every position exactly, and what its token causes later by the score function.


def truncated_cost(row: dict[str, Any], ids: Tensor, tail: str) -> Local:
    """The divergence over the ids of every prefix, [prefixes, K], whose gradient the tail claims to give."""

    def cost(p: Tensor, q: Tensor, place: int) -> Tensor:
        ps, qs = p[ids[place]], q[ids[place]]
        if tail == "renormalise":
            ps, qs = ps / ps.sum(), qs / qs.sum()
        if tail == "bucket":
            ps, qs = (torch.cat([x, 1 - x.sum(dim=0, keepdim=True)]) for x in (ps, qs))
        value = share(row, ps, qs).sum()
        if tail == "stop_gradient":  # of measures that need not be normalised
            slope = {"kl_student_teacher": -1, "kl_teacher_student": 1}.get(row["divergence"], 0)
            value = value - slope * (qs.sum() - ps.sum())
        return value

    return cost


@pytest.mark.parametrize(("horizon", "reach", "discount"), [(1, 1, 1.0), (2, 2, 0.6), ("response", 9, 0.6)])
@pytest.mark.parametrize("tail", ["raw", "stop_gradient", "renormalise", "bucket", "full"])
@pytest.mark.parametrize("row", DIVERGENCES, ids=label)
def test_pathwise_with_a_horizon_is_the_gradient_of_the_sequence_sum(
    row: dict[str, Any], tail: str, horizon: int | str, reach: int, discount: float
) -> None:
    """∇E Σ D = E Σ_t [∇D_t + ∇log p(y_t) Σ_j discount^j D_{t+j}]; with KL(q‖p) and horizon 1, DistIL."""
    table, teacher = tables()
    support = ("teacher_topk", "student_topk")[reach % 2]
    where = {"support": "full"} if tail == "full" else {"support": support, "tail": tail, "k": 2}
    plan = make_plan(**row, **where, estimator="pathwise", horizon=horizon, discount=discount, monitor=False)
    ids = (teacher if support == "teacher_topk" else table).topk(2).indices
    batch = every_sequence(plan, table, teacher)
    answers = ViewTensors(
        support_ids=ids[ROWS], support_logprobs=teacher.log_softmax(-1).gather(1, ids)[ROWS]
    )
    in_process = {"teacher_hidden": teacher[ROWS], "teacher_head": Head(HEAD)} if tail == "full" else {}
    gradient = gradient_of(plan, table, replace(batch, views={"teacher": answers}), **in_process)
    local = None if tail == "full" else truncated_cost(row, ids, tail)
    expected = exact_with_horizon(table, teacher, row, reach=reach, discount=discount, local=local)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("tail", ["renormalise", "renormalise_teacher"])
def test_pathwise_with_a_horizon_charged_the_cross_entropy(tail: str) -> None:
    """∇E Σ_t H(q, p), DistIL: to lead where the teacher is undecided costs, too."""
    table, teacher = tables()
    row = {"divergence": "kl_teacher_student", "support": "teacher_topk", "tail": tail, "k": 2}
    plan = make_plan(**row, estimator="pathwise", horizon="response", charge="cross_entropy", monitor=False)
    ids = teacher.topk(2).indices
    answers = ViewTensors(
        support_ids=ids[ROWS], support_logprobs=teacher.log_softmax(-1).gather(1, ids)[ROWS]
    )

    def crossed(p: Tensor, q: Tensor, place: int) -> Tensor:
        ps, qs = p[ids[place]], q[ids[place]]
        ps = ps / ps.sum() if tail == "renormalise" else ps
        return -(qs / qs.sum() * ps.log()).sum()

    gradient = gradient_of(
        plan, table, replace(every_sequence(plan, table, teacher), views={"teacher": answers})
    )
    expected = exact_with_horizon(table, teacher, {}, reach=LONGEST, discount=1.0, local=crossed)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("target", ["mixture", "losses", "log_linear"])
def test_pathwise_horizon_of_several_views(target: str) -> None:
    table, first = tables()
    second = random_logits(len(PREFIXES), 72, WORDS)
    weights = {"a": 0.3, "b": 0.7}
    views = {name: {"weights": f"teacher:{name}", "coefficient": c} for name, c in weights.items()}
    settings = {"support": "student_topk", "tail": "bucket", "k": 2, "divergence": "jsd", "monitor": False}
    plan = make_plan(**settings, estimator="pathwise", horizon=1, target=target, views=views)
    ids = table.topk(2).indices
    answers = {
        name: ViewTensors(support_ids=ids[ROWS], support_logprobs=q.log_softmax(-1).gather(1, ids)[ROWS])
        for name, q in (("a", first), ("b", second))
    }
    batch = replace(every_sequence(plan, table, first, second), views=answers)
    row = {"divergence": "jsd", "beta": 0.5}

    def bucketed(x: Tensor, place: int) -> Tensor:
        kept = x[ids[place]]
        return torch.cat([kept, 1 - kept.sum(dim=0, keepdim=True)])

    def local(p: Tensor, q: Tensor, place: int) -> Tensor:
        own, a, b = (bucketed(x, place) for x in (p, q, second[place].softmax(-1)))
        if target == "losses":
            return 0.3 * share(row, own, a).sum() + 0.7 * share(row, own, b).sum()
        raised = a**0.3 * b**0.7
        return share(row, own, 0.3 * a + 0.7 * b if target == "mixture" else raised / raised.sum()).sum()

    expected = exact_with_horizon(table, first, row, reach=1, discount=1.0, local=local)
    torch.testing.assert_close(gradient_of(plan, table, batch), expected, rtol=1e-8, atol=1e-11)


def test_pathwise_horizon_adds_to_a_reward_and_is_bounded_by_the_clip() -> None:
    """A = A_reward − c · Σ_j min(D_{t+j}, bound), with the importance weight of its token."""
    table, teacher = tables()
    settings: dict[str, Any] = {"estimator": "pathwise", "support": "teacher_topk", "k": 2, "tail": "bucket"}
    plan = make_plan(
        **settings, horizon="response", discount=0.5, advantage_clip=0.2, mix="add", distill_coefficient=0.7,
        correction={"kind": "importance", "cap": 1.1}, monitor=False,
    )  # fmt: skip
    ids = teacher.topk(2).indices
    batch = every_sequence(plan, table, teacher)
    noise = random_logits(1, 73, len(ROWS))[0]
    reward = random_logits(1, 74, len(ROWS))[0]
    answers = ViewTensors(
        support_ids=ids[ROWS], support_logprobs=teacher.log_softmax(-1).gather(1, ids)[ROWS]
    )
    batch = replace(
        batch, views={"teacher": answers}, reward_advantage=reward,
        behaviour_logprobs=batch.behaviour_logprobs + 0.3 * noise,
    )  # fmt: skip
    leaf = table.clone().requires_grad_()
    log_p = leaf.log_softmax(-1)[ROWS]
    cost = truncated_cost({"divergence": "kl_student_teacher"}, ids, "bucket")
    local = torch.stack([cost(leaf[r].softmax(-1), teacher[r].softmax(-1), r) for r in ROWS])
    own = log_p[torch.arange(len(ROWS)), batch.sampled_ids]
    ratio = (own.detach() - batch.behaviour_logprobs).exp().clamp(max=1.1)
    charged, start = torch.zeros(len(ROWS), dtype=torch.float64), 0
    for length in batch.sequence_lengths.tolist():  # type: ignore[union-attr]
        costs = local.detach()[start : start + length].clamp(max=0.2)
        for t in range(length):
            charged[start + t] = sum(0.5**j * costs[t + j] for j in range(1, length - t))
        start += length
    assert bool((local > 0.2).any())
    loss = ratio * (0.7 * local - (reward - 0.7 * charged) * own)
    (batch.weight * loss).sum().backward()
    torch.testing.assert_close(gradient_of(plan, table, batch), leaf.grad, rtol=1e-9, atol=1e-12)
