"""Gradient proofs for targets of several views: log-linear, mixture, and a loss for each.

The targets are written here from their definitions over full distributions; finite differences and exact
expectations of `objective_loss` must agree with them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.tabular import (
    DIVERGENCES,
    TAILS,
    Array,
    V,
    divergence_of,
    expected_gradient,
    finite_difference,
    inside_of,
    label,
    log_softmax,
    make_plan,
    named_divergence,
    pathwise_gradient,
    random_logits,
    restricted,
    scores,
    support_of,
)
from torch import Tensor

from student_trainer.objective.loss import Head, TokenBatch, ViewTensors, objective_loss

MIXTURE = {"a": 0.3, "b": 0.5, "c": 0.2}
LOG_LINEAR = {"a": 1.25, "b": -0.4, "c": 0.3}
LOSSES = {"a": 1.0, "b": 0.5, "c": 2.0}
PATHWISE: dict[str, Any] = {"estimator": "pathwise", "monitor": False}


def views(coefficients: dict[str, float], **clips: float) -> dict[str, Any]:
    return {
        name: {
            "weights": f"teacher:{name}",
            "coefficient": c,
            **({"clip": clips[name]} if name in clips else {}),
        }
        for name, c in coefficients.items()
    }


def teachers(rows: int, seed: int, names: str = "abc") -> dict[str, Tensor]:
    return {name: random_logits(rows, seed + i).log_softmax(-1) for i, name in enumerate(names)}


def product(coefficients: dict[str, float], qs: dict[str, Array]) -> Array:
    """∏_v q_v^c_v, normalised over the last axis; 0 where any q_v is 0."""
    inside = np.logical_and.reduce([q > 0 for q in qs.values()])
    logs = sum(c * np.log(np.where(inside, qs[name], 1)) for name, c in coefficients.items())
    raised = np.where(inside, np.exp(logs), 0)
    return raised / raised.sum(-1, keepdims=True)


def mixed(coefficients: dict[str, float], qs: dict[str, Array]) -> Array:
    return sum((c * qs[name] for name, c in coefficients.items()), np.zeros(()))


def probabilities(log_qs: dict[str, Tensor]) -> dict[str, Array]:
    return {name: q.exp().numpy() for name, q in log_qs.items()}


@pytest.mark.parametrize("coefficients", [LOG_LINEAR, {"a": 0.6}], ids=["three", "one"])
@pytest.mark.parametrize("tail", ["renormalise", "bucket", "full"])
@pytest.mark.parametrize("row", DIVERGENCES, ids=label)
def test_log_linear_target_is_normalised_over_what_the_divergence_sees(
    row: dict[str, Any], tail: str, coefficients: dict[str, float]
) -> None:
    where = {"support": "full"} if tail == "full" else {"support": "student_topk", "tail": tail, "k": 4}
    plan = make_plan(**row, **where, **PATHWISE, views=views(coefficients))
    logits, log_qs = random_logits(4, 1), teachers(4, 2, "".join(coefficients))
    ids = None if tail == "full" else support_of("student_topk", logits, logits, 4)
    inside = np.ones((4, V)) if ids is None else inside_of(ids)
    target = product(
        coefficients, {name: restricted(q, inside, tail) for name, q in probabilities(log_qs).items()}
    )

    def value(moved: Array) -> Array:
        return divergence_of(row, restricted(np.exp(log_softmax(moved)), inside, tail), target)

    gradient = pathwise_gradient(plan, logits, log_qs, ids)
    torch.testing.assert_close(gradient, finite_difference(value, logits), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("tail", [*TAILS, "full"])
@pytest.mark.parametrize("row", DIVERGENCES, ids=label)
def test_mixture_is_the_divergence_from_the_mixed_distribution(row: dict[str, Any], tail: str) -> None:
    where = {"support": "full"} if tail == "full" else {"support": "student_topk", "tail": tail, "k": 4}
    plan = make_plan(**row, **where, **PATHWISE, target="mixture", views=views(MIXTURE))
    logits, log_qs = random_logits(4, 6), teachers(4, 7)
    ids = None if tail == "full" else support_of("student_topk", logits, logits, 4)
    inside, target = np.ones((4, V)) if ids is None else inside_of(ids), mixed(MIXTURE, probabilities(log_qs))

    def value(moved: Array) -> Array:
        return named_divergence(row, np.exp(log_softmax(moved)), target, inside, tail=tail)

    gradient = pathwise_gradient(plan, logits, log_qs, ids)
    torch.testing.assert_close(gradient, finite_difference(value, logits), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("support", ["teacher_topk", "student_topk", "union", "full"])
@pytest.mark.parametrize("row", DIVERGENCES, ids=label)
def test_losses_add_up_each_on_its_own_support(row: dict[str, Any], support: str) -> None:
    tail = TAILS[len(support) % 2 * 2]
    where = {"support": "full"} if support == "full" else {"support": support, "tail": tail, "k": 3}
    plan = make_plan(**row, **where, **PATHWISE, target="losses", views=views(LOSSES))
    logits, log_qs = random_logits(4, 11), teachers(4, 12)
    ids = None if support == "full" else {n: support_of(support, logits, q, 3) for n, q in log_qs.items()}
    qs = probabilities(log_qs)

    def value(moved: Array) -> Array:
        p = np.exp(log_softmax(moved))
        parts = [
            c * divergence_of(row, p, qs[name])
            if ids is None
            else c * named_divergence(row, p, qs[name], inside_of(ids[name]), tail=tail)
            for name, c in LOSSES.items()
        ]
        return sum(parts, np.zeros(()))

    gradient = pathwise_gradient(plan, logits, log_qs, ids)
    torch.testing.assert_close(gradient, finite_difference(value, logits), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("target", ["mixture", "losses"])
@pytest.mark.parametrize("row", DIVERGENCES, ids=label)
def test_sampled_mixture_and_losses_are_unbiased_for_any_divergence(row: dict[str, Any], target: str) -> None:
    coefficients = MIXTURE if target == "mixture" else LOSSES
    plan = make_plan(**row, target=target, views=views(coefficients))
    logits, log_qs = random_logits(1, 16)[0], {n: q[0] for n, q in teachers(1, 17).items()}
    qs = probabilities(log_qs)

    def value(moved: Array) -> Array:
        p = np.exp(log_softmax(moved))
        if target == "mixture":
            return divergence_of(row, p, mixed(coefficients, qs)[None])
        return sum((c * divergence_of(row, p, qs[n][None]) for n, c in coefficients.items()), np.zeros(()))

    gradient = expected_gradient(plan, logits, logits.log_softmax(-1), log_qs)
    expected = finite_difference(value, logits[None])[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


def test_sampled_log_linear_needs_no_normaliser_for_kl_student_teacher_and_does_for_the_rest() -> None:
    """What compile refuses, made by hand: away from KL(p‖q) the optimum is no longer the target."""
    far = {"a": 3.0, "b": -1.5, "c": 0.5}
    plan = make_plan(views=views(far))
    log_qs = {name: q[0] for name, q in teachers(1, 21).items()}
    optimum = torch.stack([c * log_qs[name] for name, c in far.items()]).sum(dim=0)
    log_p = optimum.log_softmax(-1)
    assert abs(float(optimum.logsumexp(-1))) > 0.1
    assert expected_gradient(plan, optimum, log_p, log_qs).abs().max() < 1e-12
    # w_f(u) of KL(q‖p) is linear in u, so a constant only scales it; the JSD's is not.
    logits = random_logits(1, 24)[0]
    unnormalised = replace(plan, divergence="jsd", beta=0.5)
    wrong = expected_gradient(unnormalised, logits, logits.log_softmax(-1), log_qs)

    def value(moved: Array) -> Array:
        row = {"divergence": "jsd", "beta": 0.5}
        return divergence_of(row, np.exp(log_softmax(moved)), log_p.exp().numpy()[None])

    right = finite_difference(value, logits[None])[0]
    assert torch.cosine_similarity(wrong, right, dim=0) < 0.99


def test_the_constant_of_a_log_linear_target_cancels_under_the_student_only() -> None:
    """Off-policy it is a bias, which uncapped importance weights take away again."""
    logits = random_logits(1, 25)[0]
    log_mu = (logits + 0.7 * random_logits(1, 26)[0]).log_softmax(-1)
    log_qs = {name: q[0] for name, q in teachers(1, 27, "ab").items()}
    shifted = {**log_qs, "a": log_qs["a"] + 0.8}

    def moved_by_constant(mu: Tensor, correction: dict[str, Any]) -> float:
        plan = make_plan(views=views({"a": 1.25, "b": -0.25}), correction=correction)
        here, there = (expected_gradient(plan, logits, mu, scores_) for scores_ in (log_qs, shifted))
        return float((here - there).abs().max())

    none, whole, capped = {"kind": "none"}, {"kind": "importance"}, {"kind": "importance", "cap": 1.2}
    assert moved_by_constant(logits.log_softmax(-1), none) < 1e-12
    assert moved_by_constant(log_mu, whole) < 1e-12
    assert moved_by_constant(log_mu, none) > 1e-2
    assert moved_by_constant(log_mu, capped) > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**PATHWISE, "support": "full"},
        {**PATHWISE, "support": "full", "divergence": "jsd"},
        {**PATHWISE, "support": "student_topk", "tail": "bucket", "k": V},
    ],
    ids=["sampled", "full", "full-jsd", "bucket"],
)
def test_optimisation_arrives_at_the_extrapolated_distribution(settings: dict[str, Any]) -> None:
    """ExOPD: log p = λ log q + (1 − λ) log ref + const, by gradient descent on a table."""
    lam = 1.25
    plan = make_plan(**settings, views=views({"a": lam, "b": 1 - lam}))
    log_qs = teachers(1, 31, "ab")
    optimum = (lam * log_qs["a"] + (1 - lam) * log_qs["b"]).softmax(-1)
    logits = random_logits(1, 33)
    for _ in range(300):
        if plan.estimator == "pathwise":
            ids = None if plan.support == "full" else logits.topk(V).indices
            gradient = pathwise_gradient(plan, logits, log_qs, ids)
        else:
            row = {name: q[0] for name, q in log_qs.items()}
            gradient = expected_gradient(plan, logits[0], logits[0].log_softmax(-1), row)[None]
        logits = logits - 4.0 * gradient
    torch.testing.assert_close(logits.softmax(-1), optimum, rtol=0, atol=2e-3)
    assert (optimum - log_qs["a"].exp()).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{}, {**PATHWISE, "support": "student_topk", "tail": "renormalise"}])
def test_clip_bounds_how_far_a_view_moves_the_first(settings: dict[str, Any]) -> None:
    """An anchor and a bounded residual: log q_a + clip(log q_b − log q_a, ± bound)."""
    bound = 2.0
    k = {"k": V} if settings else {}
    plan = make_plan(**settings, **k, views=views({"a": 0.0, "b": 1.0}, b=bound))
    logits, log_qs = random_logits(1, 41), teachers(1, 42, "ab")
    apart = log_qs["b"] - log_qs["a"]
    assert 0 < int((apart.abs() > bound).sum()) < V
    target = (log_qs["a"] + apart.clamp(-bound, bound)).softmax(-1).numpy()

    def value(moved: Array) -> Array:
        return divergence_of({}, np.exp(log_softmax(moved)), target)

    if settings:
        gradient = pathwise_gradient(plan, logits, log_qs, logits.topk(V).indices)
    else:
        row = {name: q[0] for name, q in log_qs.items()}
        gradient = expected_gradient(plan, logits[0], logits[0].log_softmax(-1), row)[None]
    torch.testing.assert_close(gradient, finite_difference(value, logits), rtol=1e-7, atol=1e-8)


def batch_of(views_: dict[str, Any], rows: int) -> TokenBatch:
    return TokenBatch(
        sampled_ids=torch.zeros(rows, dtype=torch.int64),
        behaviour_logprobs=torch.zeros(rows, dtype=torch.float64),
        mask=torch.ones(rows, dtype=torch.bool),
        weight=torch.ones(rows, dtype=torch.float64),
        views=views_,
    )


def test_views_with_different_ids_are_not_combined() -> None:
    plan = make_plan(
        **PATHWISE, support="student_topk", k=3, target="mixture", views=views({"a": 0.5, "b": 0.5})
    )
    logits, log_qs = random_logits(2, 51), teachers(2, 52, "ab")
    batch = batch_of({name: scores(q, q.topk(3).indices) for name, q in log_qs.items()}, 2)
    with pytest.raises(ValueError, match=r"batch.views\['b'\].support_ids: differ from those of 'a'"):
        objective_loss(logits, torch.eye(V, dtype=torch.float64), None, batch, plan)


@pytest.mark.parametrize("target", ["log_linear", "mixture", "losses"])
def test_a_view_that_is_not_finite_drops_its_row_in_process_too(target: str) -> None:
    plan = make_plan(**PATHWISE, support="full", target=target, views=views({"a": 0.5, "b": 0.5}))
    logits, log_qs = random_logits(3, 61), teachers(3, 62, "ab")
    clean = pathwise_gradient(plan, logits, log_qs, None)
    for name in log_qs:
        spoiled = {**log_qs, name: log_qs[name].clone()}
        spoiled[name][1, 2] = torch.nan
        gradient = pathwise_gradient(plan, logits, spoiled, None)
        torch.testing.assert_close(gradient[[0, 2]], clean[[0, 2]])
        assert not gradient[1].any()


def test_every_view_in_process_needs_its_rows_and_head() -> None:
    plan = make_plan(**PATHWISE, support="full", views=views({"a": 0.5, "b": 0.5}))
    logits, eye = random_logits(2, 71), torch.eye(V, dtype=torch.float64)
    for given in ({"a": logits}, logits, None):
        head = Head(eye) if isinstance(given, Tensor) else {name: Head(eye) for name in given or {}}
        with pytest.raises(ValueError, match=r"views in process: \['a', 'b'\]"):
            objective_loss(logits, eye, None, batch_of({}, 2), plan, teacher_hidden=given, teacher_head=head)


# Coefficients that differ from row to row: factors of the examples, and views that did not answer.

FACTORS = {"a": [0.5, 2.0, 0.0], "b": [1.5, 1.0, 0.7]}


def weighed_views(coefficients: dict[str, float], weighed: str = "ab") -> dict[str, Any]:
    return {
        name: {**view, **({"weight_field": f"of_{name}"} if name in weighed else {})}
        for name, view in views(coefficients).items()
    }


def at_coefficients(
    settings: dict[str, Any], target: str, coefficients: dict[str, float], row: int, log_qs: dict[str, Tensor]
) -> Tensor:
    """Gradient of one row under a plan whose coefficients are fixed, by the proofs above."""
    kept = {name: c for name, c in coefficients.items() if c > 0}
    plan = make_plan(**settings, target=target if len(kept) > 1 else None, views=views(kept))
    scale = 1.0 if target != "losses" or len(kept) > 1 else next(iter(kept.values()))
    if target != "log_linear" and len(kept) == 1:
        plan = make_plan(**settings, views=views(dict.fromkeys(kept, 1.0)))
    answers = {name: log_qs[name][row : row + 1] for name in kept}
    return scale * row_gradient(plan, ROW_LOGITS[row : row + 1], answers)


ROW_LOGITS = random_logits(3, 91)
ROW_IDS = ROW_LOGITS.topk(4).indices
SETTINGS: dict[str, dict[str, Any]] = {
    "sampled": {"divergence": "kl_student_teacher"},
    "top-k": {**PATHWISE, "support": "student_topk", "tail": "bucket", "k": 4, "divergence": "jsd"},
}


def row_gradient(plan: Any, logits: Tensor, log_qs: dict[str, Tensor], **fields_: Any) -> Tensor:
    """Gradient of the rows' losses at the token that each sampled, [rows, V]."""
    start = next(i for i in range(len(ROW_LOGITS)) if torch.equal(ROW_LOGITS[i], logits[0]))
    ids = ROW_IDS[start : start + len(logits)]
    sampled = ids[:, 1]
    answered = {
        name: replace(scores(q, ids), sampled=q.gather(1, sampled[:, None])[:, 0])
        for name, q in log_qs.items()
    }
    behaviour = logits.log_softmax(-1).gather(1, sampled[:, None])[:, 0]
    batch = replace(
        batch_of(answered, len(logits)), sampled_ids=sampled, behaviour_logprobs=behaviour, **fields_
    )
    leaf = logits.clone().requires_grad_()
    out = objective_loss(leaf, torch.eye(V, dtype=torch.float64), None, batch, plan, chunk_rows=2)
    out.loss.backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("target", ["log_linear", "mixture", "losses"])
@pytest.mark.parametrize("where", SETTINGS)
def test_factors_of_the_examples_multiply_their_views_coefficients(where: str, target: str) -> None:
    """MAD-OPD's confidences: a mixture stays a distribution, losses are weighed, exponents are scaled."""
    settings, base, log_qs = SETTINGS[where], {"a": 0.4, "b": 0.6}, teachers(3, 92, "ab")
    plan = make_plan(**settings, target=target, views=weighed_views(base))
    factors = {name: torch.tensor(values) for name, values in FACTORS.items()}
    gradient = row_gradient(plan, ROW_LOGITS, log_qs, view_factors=factors)
    for row in range(3):
        coefficients = {name: base[name] * FACTORS[name][row] for name in base}
        if target == "mixture":
            coefficients = {name: c / sum(coefficients.values()) for name, c in coefficients.items()}
        expected = at_coefficients(settings, target, coefficients, row, log_qs)
        torch.testing.assert_close(gradient[row : row + 1], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("target", ["log_linear", "mixture", "losses"])
@pytest.mark.parametrize("where", SETTINGS)
def test_views_that_did_not_answer_leave_their_share_to_the_others(where: str, target: str) -> None:
    settings, log_qs = SETTINGS[where], teachers(3, 93)
    base = {"a": 0.2, "b": 0.5, "c": 0.3} if target == "mixture" else {"a": 0.4, "b": 1.0, "c": 0.6}
    silent = {"a": [0, 1], "b": [1]}  # rows of a view; of row 1 only c answers
    heard = {name: q.clone() for name, q in log_qs.items()}
    for name, rows in silent.items():
        heard[name][rows] = torch.nan
    plan = make_plan(**settings, target=target, views=views(base), missing_view="renormalise")
    gradient = row_gradient(plan, ROW_LOGITS, heard)
    for row in range(3):
        left = {name: c for name, c in base.items() if row not in silent.get(name, [])}
        coefficients = {name: c * sum(base.values()) / sum(left.values()) for name, c in left.items()}
        expected = at_coefficients(settings, target, coefficients, row, log_qs)
        torch.testing.assert_close(gradient[row : row + 1], expected, rtol=1e-6, atol=1e-8)
    dropping = row_gradient(make_plan(**settings, target=target, views=views(base)), ROW_LOGITS, heard)
    assert not dropping[:2].any()
    torch.testing.assert_close(dropping[2], gradient[2])


def test_positions_that_nobody_scored_are_dropped_and_the_rescaled_ones_counted() -> None:
    plan = make_plan(views=views({"a": 0.2, "b": 0.8}), target="mixture", missing_view="renormalise")
    log_qs = teachers(3, 94, "ab")
    log_qs["a"][:2] = torch.nan
    log_qs["b"][1] = torch.nan
    batch = batch_of({name: ViewTensors(sampled=q[:, 0]) for name, q in log_qs.items()}, 3)
    out = objective_loss(ROW_LOGITS, torch.eye(V, dtype=torch.float64), None, batch, plan)
    counts = {
        name: out.metrics[name] for name in ("positions", "dropped_teacher", "renormalised", "monitored")
    }
    assert counts == {"positions": 2, "dropped_teacher": 1, "renormalised": 1, "monitored": 2}


def test_an_entropy_gate_asks_only_the_views_that_answered() -> None:
    plan = make_plan(
        views=views({"a": 0.5, "b": 0.5}), target="mixture", missing_view="renormalise",
        tokens={"teacher_entropy_below": 1.0},
    )  # fmt: skip
    nan = torch.nan
    batch = batch_of(
        {
            "a": ViewTensors(sampled=torch.tensor([-1.0, nan, nan]), entropy=torch.tensor([0.5, nan, nan])),
            "b": ViewTensors(sampled=torch.tensor([-1.0, -1, -1]), entropy=torch.tensor([2.0, 0.5, 2.0])),
        },
        3,
    )
    out = objective_loss(ROW_LOGITS, torch.eye(V, dtype=torch.float64), None, batch, plan, per_token=True)
    assert out.per_token is not None
    assert out.per_token["student_logprob"].isfinite().tolist() == [False, True, False]


def test_factors_are_those_that_the_plan_asks_for() -> None:
    plan = make_plan(views=weighed_views({"a": 0.5, "b": 0.5}, "a"), target="mixture")
    log_qs, ones = teachers(3, 95, "ab"), torch.ones(3)
    for factors, problem in (
        ({}, r"view_factors\['a'\]: missing"),
        ({"a": ones, "b": ones}, r"view_factors\['b'\]: given"),
        ({"a": -ones}, "finite and not negative"),
        ({"a": ones[:2]}, r"got shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=problem):
            row_gradient(plan, ROW_LOGITS, log_qs, view_factors=factors)
