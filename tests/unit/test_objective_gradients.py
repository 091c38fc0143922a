"""Gradient proofs: tabular policies, exhaustive enumeration, float64.

Every estimator × support × tail × divergence runs through `objective_loss` itself (the hidden rows are the
logits, the head is the identity). Its gradient, or its exact expectation over every token, is compared
with a finite difference, or an enumeration, of the divergence that the settings name. The formulas here
are written from the definitions and share no code with the trainer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.loss import Head, TokenBatch, ViewTensors, objective_loss
from student_trainer.objective.settings import ObjectiveSettings

V = 9
DIVERGENCES = [("kl_student_teacher", None), ("kl_teacher_student", None), ("jsd", 0.5), ("jsd", 0.2)]
TAILS = ["raw", "stop_gradient", "renormalise", "bucket"]
SUPPORTS = ["teacher_topk", "student_topk", "union"]
Array = np.ndarray


def make_plan(divergence: str = "kl_student_teacher", beta: float | None = None, **settings: Any) -> Plan:
    row = {"divergence": divergence, **({"beta": beta} if divergence == "jsd" else {}), **settings}
    return compile_plan(ObjectiveSettings.model_validate(row), student_temperature=1.0)


def random_logits(rows: int, seed: int, columns: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence_of(name: str, beta: float | None, p: Array, q: Array) -> Array:
    """Σ over the last axis, for measures that need not be normalised (0·log 0 = 0)."""
    p, q = np.where(p > 0, p, 1e-300), np.where(q > 0, q, 1e-300)
    if name == "kl_student_teacher":
        return (p * np.log(p / q)).sum(-1)
    if name == "kl_teacher_student":
        return (q * np.log(q / p)).sum(-1)
    m = beta * q + (1 - beta) * p
    return (beta * q * np.log(q / m) + (1 - beta) * p * np.log(p / m)).sum(-1)


def named_divergence(name: str, beta: float | None, p: Array, q: Array, inside: Array, *, tail: str) -> Array:
    """The function of full distributions whose gradient a tail claims to give, [T]."""
    ps, qs = p * inside, q * inside
    if tail == "renormalise":
        return divergence_of(name, beta, ps / ps.sum(-1, keepdims=True), qs / qs.sum(-1, keepdims=True))
    if tail == "bucket":
        rest = [1 - x.sum(-1, keepdims=True) for x in (ps, qs)]
        return divergence_of(name, beta, np.concatenate([ps, rest[0]], -1), np.concatenate([qs, rest[1]], -1))
    value = divergence_of(name, beta, ps, qs)
    if tail == "stop_gradient" and name == "kl_student_teacher":
        return value - ps.sum(-1) + qs.sum(-1)  # the divergence of unnormalised measures
    if tail == "stop_gradient" and name == "kl_teacher_student":
        return value + ps.sum(-1) - qs.sum(-1)
    return value


def finite_difference(function: Callable[[Array], Array], logits: Tensor, step: float = 1e-5) -> Tensor:
    """d function_t / d logits_t by central differences; rows are independent."""
    columns = []
    for column in range(logits.shape[1]):
        ends = []
        for sign in (1, -1):
            moved = logits.numpy().copy()
            moved[:, column] += sign * step
            ends.append(function(moved))
        columns.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(np.stack(columns, axis=1))


def support_of(name: str, p: Tensor, q: Tensor, k: int) -> Tensor:
    """int64 [T, K] ids, padded with −1; the last row of a support is padded once more."""
    top_q, top_p = q.topk(k).indices, p.topk(k).indices
    if name != "union":
        ids = (top_q if name == "teacher_topk" else top_p).clone()
        ids[-1, -1] = -1
        return ids
    rows = [sorted(set(a.tolist()) | set(b.tolist())) for a, b in zip(top_q, top_p, strict=True)]
    return torch.tensor([row + [-1] * (2 * k - len(row)) for row in rows])


def pathwise_gradient(plan: Plan, logits: Tensor, log_q: Tensor, ids: Tensor | None) -> Tensor:
    leaf = logits.clone().requires_grad_()
    rows = len(logits)
    view = ViewTensors()
    teacher: dict[str, Any] = {}
    if ids is None:
        teacher = {"teacher_hidden": log_q, "teacher_head": Head(torch.eye(V, dtype=torch.float64))}
    else:
        view = ViewTensors(support_ids=ids, support_logprobs=log_q.gather(1, ids.clamp(min=0)))
    batch = TokenBatch(
        sampled_ids=torch.zeros(rows, dtype=torch.int64),
        behaviour_logprobs=torch.zeros(rows, dtype=torch.float64),
        mask=torch.ones(rows, dtype=torch.bool),
        weight=torch.ones(rows, dtype=torch.float64),
        views={"teacher": view},
    )
    head = torch.eye(V, dtype=torch.float64)
    objective_loss(leaf, head, None, batch, plan, chunk_rows=2, **teacher).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def inside_of(ids: Tensor) -> Array:
    inside = np.zeros((len(ids), V))
    for row, members in enumerate(ids.tolist()):
        inside[row, [member for member in members if member >= 0]] = 1
    return inside


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_pathwise_gradient_is_that_of_the_truncated_divergence(
    divergence: str, beta: float | None, support: str, tail: str
) -> None:
    plan = make_plan(divergence, beta, estimator="pathwise", support=support, tail=tail, k=3, monitor=False)
    logits, log_q = random_logits(5, 1), random_logits(5, 2).log_softmax(-1)
    ids = support_of(support, logits, log_q, 3)
    inside, q = inside_of(ids), log_q.exp().numpy()

    def value(moved: Array) -> Array:
        return named_divergence(divergence, beta, np.exp(log_softmax(moved)), q, inside, tail=tail)

    expected = finite_difference(value, logits)
    torch.testing.assert_close(pathwise_gradient(plan, logits, log_q, ids), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("divergence", "beta"), [*DIVERGENCES, ("jsd", 0.0), ("jsd", 1.0)])
def test_pathwise_gradient_is_that_of_the_full_divergence(divergence: str, beta: float | None) -> None:
    plan = make_plan(divergence, beta, estimator="pathwise", support="full")
    logits, log_q = random_logits(5, 3), random_logits(5, 4).log_softmax(-1)
    named = {0.0: "kl_teacher_student", 1.0: "kl_student_teacher"}.get(beta, divergence)

    def value(moved: Array) -> Array:
        return divergence_of(named, beta, np.exp(log_softmax(moved)), log_q.exp().numpy())

    expected = finite_difference(value, logits)
    torch.testing.assert_close(pathwise_gradient(plan, logits, log_q, None), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_unbiased_tails_rest_where_student_equals_teacher_and_raw_kl_does_not(
    divergence: str, beta: float | None, support: str
) -> None:
    logits = random_logits(4, 5)
    log_q = logits.log_softmax(-1)
    ids = support_of(support, logits, log_q, 3)
    for tail in TAILS:
        plan = make_plan(
            divergence, beta, estimator="pathwise", support=support, tail=tail, k=3, monitor=False
        )
        largest = pathwise_gradient(plan, logits, log_q, ids).abs().max()
        if tail == "raw" and divergence != "jsd":
            assert largest > 1e-2
            assert plan.warnings
        else:
            assert largest < 1e-12
            assert not plan.warnings


def test_stop_gradient_over_its_mass_is_the_form_with_normalised_weights() -> None:
    """−Σ_S sg(p̃ · (log q − log p)) · log p, p̃ = p / Σ_S p: thunlp's form."""
    plan = make_plan(estimator="pathwise", support="student_topk", tail="stop_gradient", k=4, monitor=False)
    logits, log_q = random_logits(5, 6), random_logits(5, 7).log_softmax(-1)
    ids = logits.topk(4).indices
    leaf = logits.clone().requires_grad_()
    log_p = leaf.log_softmax(-1).gather(1, ids)
    weights = log_p.detach().softmax(-1) * (log_q.gather(1, ids) - log_p.detach())
    (-(weights * log_p).sum()).backward()
    mass = log_p.detach().exp().sum(-1, keepdim=True)
    torch.testing.assert_close(leaf.grad, pathwise_gradient(plan, logits, log_q, ids) / mass)


def test_renormalised_gradient_weighs_log_p_by_normalised_log_ratio() -> None:
    """∇KL(p̃‖q̃) = Σ_S p̃ · sg(log p̃ − log q̃) · ∇log p̃."""
    plan = make_plan(estimator="pathwise", support="teacher_topk", tail="renormalise", k=4, monitor=False)
    logits, log_q = random_logits(5, 8), random_logits(5, 9).log_softmax(-1)
    ids = log_q.topk(4).indices
    leaf = logits.clone().requires_grad_()
    log_p = leaf.log_softmax(-1).gather(1, ids).log_softmax(-1)
    ratio = log_p.detach() - log_q.gather(1, ids).log_softmax(-1)
    (log_p.detach().exp() * ratio * log_p).sum().backward()
    torch.testing.assert_close(leaf.grad, pathwise_gradient(plan, logits, log_q, ids))


# Score function: the expectation is a weighted batch that holds every token once.


def expected_gradient(
    plan: Plan, logits: Tensor, log_mu: Tensor, log_qs: dict[str, Tensor], reward: Tensor | None = None
) -> Tensor:
    """E_{y~μ} of the gradient by one row of logits, exactly."""
    leaf = logits.clone().requires_grad_()
    batch = TokenBatch(
        sampled_ids=torch.arange(V),
        behaviour_logprobs=log_mu,
        mask=torch.ones(V, dtype=torch.bool),
        weight=log_mu.exp(),
        views={name: ViewTensors(sampled=log_q) for name, log_q in log_qs.items()},
        reward_advantage=reward,
        sequence_lengths=torch.ones(V, dtype=torch.int64),
    )
    hidden = leaf[None].expand(V, V)
    objective_loss(hidden, torch.eye(V, dtype=torch.float64), None, batch, plan, chunk_rows=4).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


CORRECTIONS = [{"kind": "none"}, {"kind": "importance"}, {"kind": "importance", "cap": 1.5}, {"kind": "ppo"}]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize(("divergence", "beta"), [*DIVERGENCES, ("jsd", 0.0), ("jsd", 1.0)])
def test_score_function_on_policy_is_unbiased_for_its_divergence(
    divergence: str, beta: float | None, correction: dict[str, Any]
) -> None:
    plan = make_plan(divergence, beta, correction=correction)
    logits, log_q = random_logits(1, 10)[0], random_logits(1, 11)[0].log_softmax(-1)
    named = {0.0: "kl_teacher_student", 1.0: "kl_student_teacher"}.get(beta, divergence)

    def value(moved: Array) -> Array:
        return divergence_of(named, beta, np.exp(log_softmax(moved)), log_q.exp().numpy())

    expected = finite_difference(value, logits[None])[0]
    gradient = expected_gradient(plan, logits, logits.log_softmax(-1), {"teacher": log_q})
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


def off_policy(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = random_logits(1, seed)[0]
    log_mu = (logits + 0.7 * random_logits(1, seed + 1)[0]).log_softmax(-1)
    return logits, log_mu, random_logits(1, seed + 2)[0].log_softmax(-1)


def test_importance_weights_give_the_gradient_under_the_current_policy() -> None:
    logits, log_mu, log_q = off_policy(20)
    advantage = (log_q - log_mu).numpy()

    def value(moved: Array) -> Array:  # E_p of −A, with A fixed as the behaviour policy left it
        return -(np.exp(log_softmax(moved)) * advantage).sum(-1)

    plan = make_plan(correction={"kind": "importance"})
    gradient = expected_gradient(plan, logits, log_mu, {"teacher": log_q})
    torch.testing.assert_close(gradient, finite_difference(value, logits[None])[0], rtol=1e-7, atol=1e-8)


def test_importance_cap_truncates_the_weight_and_keeps_the_token() -> None:
    logits, log_mu, log_q = off_policy(30)
    cap = 1.2
    weight = (logits.log_softmax(-1) - log_mu).exp().clamp(max=cap)
    assert int((weight == cap).sum()) in range(1, V)
    leaf = logits.clone().requires_grad_()
    (-(log_mu.exp() * weight * (log_q - log_mu)) * leaf.log_softmax(-1)).sum().backward()
    plan = make_plan(correction={"kind": "importance", "cap": cap})
    torch.testing.assert_close(expected_gradient(plan, logits, log_mu, {"teacher": log_q}), leaf.grad)


@pytest.mark.parametrize(("dual", "high"), [(None, None), (1.1, None), (None, 0.5)])
def test_ppo_is_the_clipped_surrogate(dual: float | None, high: float | None) -> None:
    logits, log_mu, log_q = off_policy(40)
    advantage = (log_q - log_mu).numpy()

    def value(moved: Array) -> Array:
        ratio = np.exp(log_softmax(moved) - log_mu.numpy())
        clipped = np.clip(ratio, 0.8, 1 + (0.2 if high is None else high))
        kept = np.minimum(ratio * advantage, clipped * advantage)
        if dual is not None:
            kept = np.where(advantage < 0, np.maximum(kept, dual * advantage), kept)
        return -(np.exp(log_mu.numpy()) * kept).sum(-1)

    correction = {"kind": "ppo", "clip": 0.2, "clip_high": high, "dual_clip": dual}
    gradient = expected_gradient(make_plan(correction=correction), logits, log_mu, {"teacher": log_q})
    torch.testing.assert_close(gradient, finite_difference(value, logits[None])[0], rtol=1e-7, atol=1e-8)


def test_pathwise_importance_scales_each_position_by_its_truncated_ratio() -> None:
    logits, log_mu, log_q = off_policy(50)
    settings = {"estimator": "pathwise", "support": "teacher_topk", "k": 4, "tail": "bucket"}
    ids = log_q.topk(4).indices[None].expand(V, 4)
    rows = logits[None].expand(V, V)
    plain = pathwise_gradient(make_plan(**settings), rows, log_q[None].expand(V, V), ids)
    weight = (logits.log_softmax(-1) - log_mu).exp().clamp(max=2.0)
    leaf = rows.clone().requires_grad_()
    batch = TokenBatch(
        sampled_ids=torch.arange(V),
        behaviour_logprobs=log_mu,
        mask=torch.ones(V, dtype=torch.bool),
        weight=torch.ones(V, dtype=torch.float64),
        views={"teacher": ViewTensors(support_ids=ids, support_logprobs=log_q[ids])},
    )
    plan = make_plan(correction={"kind": "importance", "cap": 2.0}, **settings)
    objective_loss(leaf, torch.eye(V, dtype=torch.float64), None, batch, plan).loss.backward()
    torch.testing.assert_close(leaf.grad, weight[:, None] * plain)


def test_log_linear_optimum_is_the_extrapolated_distribution() -> None:
    """ExOPD: log p = λ log q + (1 − λ) log ref + const."""
    lam = 1.25
    log_q, log_ref = (random_logits(1, seed)[0].log_softmax(-1) for seed in (60, 61))
    views = {
        "expert": {"weights": "teacher:a", "coefficient": lam},
        "reference": {"weights": "teacher:b", "coefficient": 1 - lam},
    }
    plan = make_plan(views=views, correction={"kind": "ppo", "clip": 0.2, "dual_clip": 3.0})
    scores = {"expert": log_q, "reference": log_ref}
    optimum = lam * log_q + (1 - lam) * log_ref

    def value(moved: Array) -> Array:
        log_p = log_softmax(moved)
        return (np.exp(log_p) * (log_p - optimum.numpy())).sum(-1)

    logits = random_logits(1, 62)[0]
    expected = finite_difference(value, logits[None])[0]
    gradient = expected_gradient(plan, logits, logits.log_softmax(-1), scores)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)
    at_optimum = expected_gradient(plan, optimum, optimum.log_softmax(-1), scores)
    assert at_optimum.abs().max() < 1e-12
    assert expected_gradient(plan, log_q, log_q, scores).abs().max() > 1e-3
    for _ in range(400):
        logits = logits - 1.0 * expected_gradient(plan, logits, logits.log_softmax(-1), scores)
    torch.testing.assert_close(logits.softmax(-1), optimum.softmax(-1), rtol=0, atol=1e-3)


# Several tokens: every sequence of a tabular policy over prefixes, token 0 ends a sequence.

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


def estimated_gradient(plan: Plan, table: Tensor, teacher: Tensor) -> Tensor:
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
        views={"teacher": ViewTensors(sampled=torch.cat([token_logprobs(teacher, s) for s in SEQUENCES]))},
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
    table: Tensor, teacher: Tensor, name: str, beta: float | None, *, reach: int, discount: float
) -> Tensor:
    """Σ_{t ≤ t' ≤ t + reach} discount^(t' − t) · ∇_(policy at step t) E[D(p, q at step t')]."""
    leaf = table.clone().requires_grad_()
    total = torch.zeros_like(table)
    depth = torch.tensor([len(prefix) for prefix in PREFIXES])
    for later in range(LONGEST):
        expected = torch.zeros((), dtype=torch.float64)
        for row, prefix in enumerate(PREFIXES):
            if len(prefix) != later:
                continue
            arrival = token_logprobs(leaf, prefix).sum().exp() if prefix else 1.0
            p, q = leaf[row].softmax(-1), teacher[row].softmax(-1)
            m = None if beta is None else beta * q + (1 - beta) * p
            local = {
                "kl_student_teacher": lambda p=p, q=q: (p * (p / q).log()).sum(),
                "kl_teacher_student": lambda p=p, q=q: (q * (q / p).log()).sum(),
                "jsd": lambda p=p, q=q, m=m: (
                    beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
                ).sum(),
            }[name]()
            expected = expected + arrival * local
        (gradient,) = torch.autograd.grad(expected, leaf)
        ahead = later - depth
        factor = torch.where((ahead >= 0) & (ahead <= reach), discount ** ahead.clamp(min=0).double(), 0)
        total += factor[:, None] * gradient
    return total


@pytest.mark.parametrize(("horizon", "reach"), [(0, 0), (1, 1), (2, 2), (50, 9), ("response", 9)])
@pytest.mark.parametrize("discount", [1.0, 0.6])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_horizon_credits_later_tokens_with_discount(
    divergence: str, beta: float | None, discount: float, horizon: int | str, reach: int
) -> None:
    table, teacher = tables()
    plan = make_plan(divergence, beta, horizon=horizon, discount=discount)
    expected = exact_with_horizon(table, teacher, divergence, beta, reach=reach, discount=discount)
    torch.testing.assert_close(estimated_gradient(plan, table, teacher), expected, rtol=1e-9, atol=1e-12)
