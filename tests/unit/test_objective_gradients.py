"""Gradient proofs: tabular policies, exhaustive enumeration, float64.

Every estimator × support × tail × divergence runs through `objective_loss` itself. Its gradient, or its
exact expectation over every token, is compared with a finite difference, or an enumeration, of the
divergence that the settings name. `tests/support/tabular.py` has the definitions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.tabular import (
    DIVERGENCES,
    ENDS,
    SUPPORTS,
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
    share,
    support_of,
)
from torch import Tensor

from student_trainer.objective.loss import TokenBatch, ViewTensors, objective_loss


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("row", DIVERGENCES, ids=label)
def test_pathwise_gradient_is_that_of_the_truncated_divergence(
    row: dict[str, Any], support: str, tail: str
) -> None:
    plan = make_plan(**row, estimator="pathwise", support=support, tail=tail, k=3, monitor=False)
    logits, log_q = random_logits(5, 1), random_logits(5, 2).log_softmax(-1)
    ids = support_of(support, logits, log_q, 3)
    inside, q = inside_of(ids), log_q.exp().numpy()

    def value(moved: Array) -> Array:
        return named_divergence(row, np.exp(log_softmax(moved)), q, inside, tail=tail)

    expected = finite_difference(value, logits)
    torch.testing.assert_close(pathwise_gradient(plan, logits, log_q, ids), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("row", [*DIVERGENCES, *ENDS], ids=label)
def test_pathwise_gradient_is_that_of_the_full_divergence(row: dict[str, Any]) -> None:
    plan = make_plan(**row, estimator="pathwise", support="full")
    logits, log_q = random_logits(5, 3), random_logits(5, 4).log_softmax(-1)

    def value(moved: Array) -> Array:
        return divergence_of(row, np.exp(log_softmax(moved)), log_q.exp().numpy())

    expected = finite_difference(value, logits)
    torch.testing.assert_close(pathwise_gradient(plan, logits, log_q, None), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("row", [row for row in DIVERGENCES if "total" not in row["divergence"]], ids=label)
def test_unbiased_tails_rest_where_student_equals_teacher_and_raw_kl_does_not(
    row: dict[str, Any], support: str
) -> None:
    """But for total variation, whose gradient has a jump there."""
    logits = random_logits(4, 5)
    log_q = logits.log_softmax(-1)
    ids = support_of(support, logits, log_q, 3)
    for tail in (*TAILS, "stop_gradient_mean"):
        plan = make_plan(**row, estimator="pathwise", support=support, tail=tail, k=3, monitor=False)
        largest = pathwise_gradient(plan, logits, log_q, ids).abs().max()
        if tail == "raw" and row["divergence"] in ("kl_student_teacher", "kl_teacher_student"):
            assert largest > 1e-2
            assert plan.warnings
        else:
            assert largest < 1e-12
            assert not plan.warnings


def test_stop_gradient_over_its_mass_is_the_form_with_normalised_weights() -> None:
    """−Σ_S sg(p̃ · (log q − log p)) · log p, p̃ = p / Σ_S p: thunlp's form."""
    settings = {"estimator": "pathwise", "support": "student_topk", "k": 4, "monitor": False}
    logits, log_q = random_logits(5, 6), random_logits(5, 7).log_softmax(-1)
    ids = logits.topk(4).indices
    leaf = logits.clone().requires_grad_()
    log_p = leaf.log_softmax(-1).gather(1, ids)
    weights = log_p.detach().softmax(-1) * (log_q.gather(1, ids) - log_p.detach())
    (-(weights * log_p).sum()).backward()
    form, plain = (
        pathwise_gradient(make_plan(tail=tail, **settings), logits, log_q, ids)
        for tail in ("stop_gradient_mean", "stop_gradient")
    )
    torch.testing.assert_close(form, leaf.grad)
    mass = log_p.detach().exp().sum(-1, keepdim=True)
    assert mass.max() < 0.99
    torch.testing.assert_close(form, plain / mass)


ENTRY_CLIP = 0.05


@pytest.mark.parametrize("tail", ["raw", "renormalise", "bucket", "full"])
@pytest.mark.parametrize("row", DIVERGENCES, ids=label)
def test_entry_clip_bounds_every_share_and_stops_its_gradient(row: dict[str, Any], tail: str) -> None:
    """Σ_v min(share_v, τ), by finite differences: OPSD's per-entry clip for any divergence."""
    where = {"support": "full"} if tail == "full" else {"support": "teacher_topk", "tail": tail, "k": 4}
    plan = make_plan(**row, **where, estimator="pathwise", entry_clip=ENTRY_CLIP, monitor=False)
    logits, log_q = random_logits(5, 12), random_logits(5, 13).log_softmax(-1)
    ids = None if tail == "full" else log_q.topk(4).indices
    inside = np.ones((5, V)) if ids is None else inside_of(ids)
    q = restricted(log_q.exp().numpy(), inside, tail)

    def shares(moved: Array) -> Tensor:
        p = restricted(np.exp(log_softmax(moved)), inside, tail)
        return share(row, torch.from_numpy(p), torch.from_numpy(q))

    def value(moved: Array) -> Array:
        return np.minimum(shares(moved).numpy(), ENTRY_CLIP).sum(-1)

    cut = shares(logits.numpy()) > ENTRY_CLIP
    assert 0 < int(cut.sum()) < cut.numel()
    expected = finite_difference(value, logits)
    torch.testing.assert_close(pathwise_gradient(plan, logits, log_q, ids), expected, rtol=1e-7, atol=1e-8)


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


CORRECTIONS = [{"kind": "none"}, {"kind": "importance"}, {"kind": "importance", "cap": 1.5}, {"kind": "ppo"}]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("row", [*DIVERGENCES, *ENDS], ids=label)
def test_score_function_on_policy_is_unbiased_for_its_divergence(
    row: dict[str, Any], correction: dict[str, Any]
) -> None:
    plan = make_plan(**row, correction=correction)
    logits, log_q = random_logits(1, 10)[0], random_logits(1, 11)[0].log_softmax(-1)

    def value(moved: Array) -> Array:
        return divergence_of(row, np.exp(log_softmax(moved)), log_q.exp().numpy())

    expected = finite_difference(value, logits[None])[0]
    gradient = expected_gradient(plan, logits, logits.log_softmax(-1), {"teacher": log_q})
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "row", [row for row in DIVERGENCES if "kl_student" not in row["divergence"]], ids=label
)
def test_stopped_divergence_is_another_direction_and_warns(row: dict[str, Any]) -> None:
    """−f(u) alone leaves out E_p ∇f: its expectation is only the first half of the product rule."""
    plan = make_plan(**row, score_weight="stopped")
    assert "not the gradient" in plan.warnings[-1]
    logits, log_q = random_logits(1, 10)[0], random_logits(1, 11)[0].log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    p = leaf.softmax(-1)
    fixed = (share(row, p, log_q.exp()) / p).detach()
    (p * fixed).sum().backward()
    stopped = expected_gradient(plan, logits, logits.log_softmax(-1), {"teacher": log_q})
    torch.testing.assert_close(stopped, leaf.grad)
    exact = expected_gradient(make_plan(**row), logits, logits.log_softmax(-1), {"teacher": log_q})
    assert (stopped - exact).norm() > 0.2 * exact.norm()


def test_stopped_forward_kl_points_away_from_the_teacher() -> None:
    """The published check found a cosine of −0.94 with the true gradient for KL(q‖p); so does this one."""
    cosines = []
    for seed in range(20):
        logits, log_q = random_logits(1, 100 + seed)[0], random_logits(1, 200 + seed)[0].log_softmax(-1)
        stopped, exact = (
            expected_gradient(
                make_plan(divergence="kl_teacher_student", score_weight=weight),
                logits,
                logits.log_softmax(-1),
                {"teacher": log_q},
            )
            for weight in ("stopped", "exact")
        )
        cosines.append(float(torch.cosine_similarity(stopped, exact, dim=0)))
    assert max(cosines) < -0.5


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_rollout_weight_changes_nothing_on_policy(correction: dict[str, Any]) -> None:
    logits, log_q = random_logits(1, 14)[0], random_logits(1, 15)[0].log_softmax(-1)
    plan, plain = (
        make_plan(correction=correction, **more) for more in ({"weights": {"rollout_cap": 1.01}}, {})
    )
    gradients = [
        expected_gradient(one, logits, logits.log_softmax(-1), {"teacher": log_q}) for one in (plan, plain)
    ]
    torch.testing.assert_close(gradients[0], gradients[1])


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


@pytest.mark.parametrize("row", [*DIVERGENCES, *ENDS], ids=label)
def test_importance_with_the_students_own_ratio_is_unbiased_off_policy(row: dict[str, Any]) -> None:
    """u = q/p and not q/μ: the gradient of the divergence from whatever samples."""
    logits, log_mu, log_q = off_policy(20)
    plan = make_plan(**row, log_ratio="student", correction={"kind": "importance"})

    def value(moved: Array) -> Array:
        return divergence_of(row, np.exp(log_softmax(moved)), log_q.exp().numpy())

    expected = finite_difference(value, logits[None])[0]
    gradient = expected_gradient(plan, logits, log_mu, {"teacher": log_q})
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)
    as_sampled = make_plan(**row, correction={"kind": "importance"})
    other = expected_gradient(as_sampled, logits, log_mu, {"teacher": log_q})
    assert (other - expected).abs().max() > 1e-3


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
    for _ in range(120):
        logits = logits - 4.0 * expected_gradient(plan, logits, logits.log_softmax(-1), scores)
    torch.testing.assert_close(logits.softmax(-1), optimum.softmax(-1), rtol=0, atol=1e-3)
