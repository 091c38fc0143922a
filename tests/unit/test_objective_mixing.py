"""The teacher's factor on a reward's advantage: each published form, and what its expectation is not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tabular import V, expected_gradient, make_plan, random_logits
from torch import Tensor

from student_trainer.objective.compile import Plan
from student_trainer.objective.loss import TokenBatch, ViewTensors, objective_loss

T = 8
LENGTHS = torch.tensor([5, 3])
LOGITS, LOG_Q = random_logits(T, 1), random_logits(T, 2).log_softmax(-1)
SAMPLED = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3))
REWARD = torch.tensor([0.7, 0.7, 0.7, 0.7, 0.7, -1.2, -1.2, -1.2], dtype=torch.float64)


def at_sampled(values: Tensor) -> Tensor:
    return values.gather(1, SAMPLED[:, None])[:, 0]


LOG_MU = at_sampled(LOGITS.log_softmax(-1))
LOG_RATIO = at_sampled(LOG_Q) - LOG_MU
ENTROPY = -(LOG_Q.exp() * LOG_Q).sum(-1)


def make_batch(**changes: Any) -> TokenBatch:
    batch = TokenBatch(
        sampled_ids=SAMPLED,
        behaviour_logprobs=LOG_MU,
        mask=torch.ones(T, dtype=torch.bool),
        weight=torch.ones(T, dtype=torch.float64),
        views={"teacher": ViewTensors(sampled=at_sampled(LOG_Q), entropy=ENTROPY)},
        reward_advantage=REWARD,
        sequence_lengths=LENGTHS,
    )
    return replace(batch, **changes)


def gradient(plan: Plan, batch: TokenBatch) -> tuple[Tensor, dict[str, float]]:
    leaf = LOGITS.clone().requires_grad_()
    out = objective_loss(leaf, torch.eye(V, dtype=torch.float64), None, batch, plan, chunk_rows=3)
    out.loss.backward()
    assert leaf.grad is not None
    return leaf.grad, out.metrics


def policy_gradient(advantage: Tensor) -> Tensor:
    leaf = LOGITS.clone().requires_grad_()
    (-(advantage * at_sampled(leaf.log_softmax(-1)))).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def clipped_ratio(direction: int, width: float) -> Tensor:
    return (direction * REWARD.sign() * LOG_RATIO).exp().clamp(1 - width, 1 + width)


def certainty(gamma: float, entropy: Tensor) -> Tensor:
    return (1 - gamma * entropy / math.log(V)).clamp(0.1, 1)


def ahead(window: int) -> Tensor:
    rows = []
    for start, stop in ((0, 5), (5, 8)):
        rows += [ENTROPY[t : min(t + window + 1, stop)].min() for t in range(start, stop)]
    return torch.stack(rows)


RLRT = {"ratio": "student_over_teacher", "ratio_gate": "rewarded", "distill_coefficient": 0.5}
FORMS: dict[str, tuple[dict[str, Any], Tensor]] = {
    # A·[½ + ½·clip((p/q)^sign A, 1 ± ε)] where r = 1
    "rlrt": (
        {**RLRT, "ratio_clip": 1.0},
        torch.where(REWARD > 0, REWARD * (0.5 + 0.5 * clipped_ratio(-1, 1.0)), REWARD),
    ),
    "rlrt-instruct": (
        {**RLRT, "ratio_clip": 0.5},
        torch.where(REWARD > 0, REWARD * (0.5 + 0.5 * clipped_ratio(-1, 0.5)), REWARD),
    ),
    "rlsd": ({"ratio_clip": 0.2}, REWARD * clipped_ratio(1, 0.2)),
    "egrsd": (
        {"ratio_clip": 0.5, "entropy_factor": 0.8},
        REWARD * clipped_ratio(1, 0.5) * certainty(0.8, ENTROPY),
    ),
    "cl-egrsd": (
        {"ratio_clip": 0.5, "entropy_factor": 0.8, "entropy_window": 2},
        REWARD * clipped_ratio(1, 0.5) * certainty(0.8, ahead(2)),
    ),
    "entropy-floor": (
        {"ratio_clip": 0.5, "entropy_factor": 50.0},
        REWARD * clipped_ratio(1, 0.5) * 0.1,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_factor_is_the_published_form(name: str) -> None:
    settings, advantage = FORMS[name]
    plan = make_plan(mix="multiply", **settings)
    _, signal = plan.view_requests["teacher"]
    assert signal.entropy == ("entropy_factor" in settings)
    torch.testing.assert_close(gradient(plan, make_batch())[0], policy_gradient(advantage))


def test_positions_without_the_factors_entropy_are_dropped_and_counted() -> None:
    plan = make_plan(mix="multiply", entropy_factor=0.8)
    entropy = ENTROPY.clone()
    entropy[3] = math.nan
    view = ViewTensors(sampled=at_sampled(LOG_Q), entropy=entropy)
    got, metrics = gradient(plan, make_batch(views={"teacher": view}))
    assert not got[3].any()
    assert (metrics["dropped_teacher"], metrics["positions"]) == (1, T - 1)
    with pytest.raises(ValueError, match=r"batch.views\['teacher'\].entropy: missing"):
        gradient(plan, make_batch(views={"teacher": ViewTensors(sampled=at_sampled(LOG_Q))}))


@pytest.mark.parametrize("ratio", ["teacher_over_student", "student_over_teacher"])
def test_ungated_factor_distils_where_the_reward_says_nothing_and_warns(ratio: str) -> None:
    """A reward that does not depend on the token has no gradient; times the factor it has one.

    With A = ±1 by a fair coin, E[A·factor·∇log p] = E_p[½(w₊ − w₋)·∇log p]: towards the teacher for q/p, away
    from it for p/q. The gate halves it, for a failed response has no say; it does not remove it.
    """
    logits, log_q = random_logits(1, 11)[0], random_logits(1, 12)[0].log_softmax(-1)
    log_p = logits.log_softmax(-1)

    def coin(**settings: Any) -> Tensor:
        plan = make_plan(**settings)
        halves = [
            expected_gradient(plan, logits, log_p, {"teacher": log_q}, torch.full((V,), a))
            for a in (1.0, -1.0)
        ]
        return (halves[0] + halves[1]) / 2

    assert coin(mix="add", distill_coefficient=0.0).abs().max() < 1e-12
    multiply = {"mix": "multiply", "ratio": ratio, "ratio_clip": 0.5}
    ungated, gated = coin(**multiply), coin(**multiply, ratio_gate="rewarded")

    leaf = logits.clone().requires_grad_()
    (leaf.softmax(-1) * (leaf.log_softmax(-1) - log_q)).sum().backward()
    assert leaf.grad is not None
    cosine = float(torch.cosine_similarity(ungated, leaf.grad, dim=0))
    assert cosine > 0.5 if ratio == "teacher_over_student" else cosine < -0.5
    assert 0.01 < float(gated.norm()) < 0.75 * float(ungated.norm())
    assert "without a gate" in make_plan(**multiply).warnings[0]
    assert make_plan(**multiply, ratio_gate="rewarded").warnings == ()
