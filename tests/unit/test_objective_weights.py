"""Token weights, selections and gates, each against its formula written out in plain torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tabular import V, make_plan, random_logits
from torch import Tensor

from student_trainer.ledger import Ledger
from student_trainer.objective.compile import Plan
from student_trainer.objective.loss import LossOutput, TokenBatch, ViewTensors, objective_loss
from student_trainer.objective.settings import GateSettings
from student_trainer.objective.weights import HysteresisGate, least_entropy_ahead, prefix_weight

T, K = 8, 4
LENGTHS = torch.tensor([5, 3])
TOP_K: dict[str, Any] = {"estimator": "pathwise", "support": "student_topk", "k": K}
LOGITS, LOG_Q = random_logits(T, 1), random_logits(T, 2).log_softmax(-1)
LOG_P = LOGITS.log_softmax(-1)
IDS = LOGITS.topk(K).indices
SAMPLED = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3))
REWARD = torch.tensor([1.0, 1, 1, 0, 1, -1, 0, -1], dtype=torch.float64)


def at_sampled(values: Tensor) -> Tensor:
    return values.gather(1, SAMPLED[:, None])[:, 0]


BEHAVIOUR = at_sampled(LOG_P) + 0.5 * random_logits(1, 4, T)[0]
OLD = at_sampled(LOG_P) + 0.2 * random_logits(1, 5, T)[0]


def make_batch(**changes: Any) -> TokenBatch:
    view = ViewTensors(
        sampled=at_sampled(LOG_Q),
        support_ids=IDS,
        support_logprobs=LOG_Q.gather(1, IDS),
        entropy=-(LOG_Q.exp() * LOG_Q).sum(-1),
    )
    batch = TokenBatch(
        sampled_ids=SAMPLED,
        behaviour_logprobs=BEHAVIOUR,
        mask=torch.ones(T, dtype=torch.bool),
        weight=torch.linspace(0.5, 1.5, T, dtype=torch.float64),
        views={"teacher": view},
        reward_advantage=REWARD,
        sequence_lengths=LENGTHS,
    )
    return replace(batch, **changes)


def run(plan: Plan, batch: TokenBatch, **options: Any) -> tuple[Tensor, LossOutput]:
    leaf = LOGITS.clone().requires_grad_()
    head = torch.eye(V, dtype=torch.float64)
    out = objective_loss(leaf, head, None, batch, plan, **{"chunk_rows": 3, **options})
    out.loss.backward()
    assert leaf.grad is not None
    return leaf.grad, out


def gradient_of(loss_per_position: Any) -> Tensor:
    """Gradient of Σ weight · loss, the loss a function of log p [T, V]."""
    leaf = LOGITS.clone().requires_grad_()
    (make_batch().weight * loss_per_position(leaf.log_softmax(-1))).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def policy_gradient(advantage: Tensor) -> Tensor:
    return gradient_of(lambda log_p: -advantage * at_sampled(log_p))


def test_only_marked_positions_are_trained_on() -> None:
    plan = make_plan(tokens={"marked_only": True})
    marked = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    gradient, out = run(plan, make_batch(marked=marked))
    expected, _ = run(make_plan(), make_batch(mask=marked))
    torch.testing.assert_close(gradient, expected)
    assert out.metrics["positions"] == 4
    with pytest.raises(ValueError, match=r"batch.marked: missing"):
        run(plan, make_batch())


@pytest.mark.parametrize("row", [{}, {**TOP_K, "tail": "bucket"}, {"mix": "add"}], ids=str)
def test_only_positions_that_the_target_supports_are_trained_on(row: dict[str, Any]) -> None:
    """EDGE-OPD: log q(y) − log p(y) above a bound, p the student as it is and not as it sampled."""
    plan = make_plan(**row, tokens={"evidence_above": 0.3}, monitor=False)
    supported = at_sampled(LOG_Q) - at_sampled(LOG_P) > 0.3
    assert not torch.equal(supported, at_sampled(LOG_Q) - BEHAVIOUR > 0.3)
    gradient, out = run(plan, make_batch())
    expected, kept = run(make_plan(**row), make_batch(mask=supported))
    torch.testing.assert_close(gradient, expected)
    assert out.metrics["positions"] == int(supported.sum()) == T - out.metrics["dropped_evidence"]
    assert out.metrics["entropy"] == pytest.approx(kept.metrics["entropy"])


REWARDS = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.9, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("mix", ["replace", "add", "multiply"])
@pytest.mark.parametrize("row", [{}, {**TOP_K, "tail": "bucket"}], ids=["sampled", "top-k"])
def test_reward_gate_distils_responses_in_range_and_rewards_all(row: dict[str, Any], mix: str) -> None:
    if row and mix == "multiply":
        return
    low, high = (
        make_plan(**row, mix=mix, tokens=tokens) for tokens in ({"reward_below": 0.5}, {"reward_above": 0.5})
    )
    plain, batch = make_plan(**row, mix=mix), make_batch(rewards=REWARDS)
    first, last = REWARDS > 0.5, REWARDS < 0.5
    for plan, chosen in ((low, last), (high, first)):
        gradient, out = run(plan, batch)
        distilled, _ = run(plain, make_batch(mask=chosen))
        rest = policy_gradient(torch.where(chosen, 0, REWARD)) if mix != "replace" else 0
        torch.testing.assert_close(gradient, distilled + rest)
        assert out.metrics["gated_reward"] == int((~chosen).sum())
        assert out.metrics["positions"] == (int(chosen.sum()) if mix == "replace" else T)
    nowhere, _ = run(high, make_batch(rewards=torch.full((T,), math.nan)))
    torch.testing.assert_close(
        nowhere, torch.zeros_like(nowhere) if mix == "replace" else policy_gradient(REWARD)
    )
    with pytest.raises(ValueError, match=r"batch.rewards: missing"):
        run(high, make_batch())


@pytest.mark.parametrize("known", [True, False], ids=["old", "current"])
@pytest.mark.parametrize("mix", ["replace", "multiply"])
def test_log_ratio_of_the_student_ignores_who_sampled(mix: str, known: bool) -> None:
    """What guided sampling needs, where μ saw another context than p."""
    plan = make_plan(log_ratio="student", mix=mix)
    own = OLD if known else at_sampled(LOG_P)
    gradient, out = run(plan, make_batch(old_logprobs=OLD if known else None), chunk_rows=3)
    expected, _ = run(make_plan(mix=mix), make_batch(behaviour_logprobs=own))
    torch.testing.assert_close(gradient, expected)
    assert out.metrics["positions"] == T
    blind, _ = run(
        plan, make_batch(behaviour_logprobs=torch.full_like(BEHAVIOUR, math.nan), old_logprobs=own)
    )
    torch.testing.assert_close(blind, expected)


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("tail", ["stop_gradient", "bucket"])
def test_top_fraction_keeps_positions_by_divergence_times_teacher_mass(tail: str, chunk_rows: int) -> None:
    """TA-OPD: whichever way the rows are cut into chunks."""
    plan = make_plan(**TOP_K, tail=tail, tokens={"top_fraction": 0.3})
    s, t = LOG_P.gather(1, IDS), LOG_Q.gather(1, IDS)
    if tail == "bucket":
        s, t = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], dim=1) for x in (s, t))
    score = (s.exp() * (s - t)).sum(-1) * LOG_Q.gather(1, IDS).exp().sum(-1)
    kept = torch.zeros(T, dtype=torch.bool)
    kept[score.topk(3).indices] = True  # ⌈0.3 · 8⌉
    gradient, out = run(plan, make_batch(), chunk_rows=chunk_rows, per_token=True)
    expected, _ = run(make_plan(**TOP_K, tail=tail), make_batch(mask=kept))
    torch.testing.assert_close(gradient, expected)
    assert out.metrics["positions"] == 3
    assert out.per_token is not None
    assert torch.equal(out.per_token["student_logprob"].isfinite(), kept)


def test_top_fraction_of_nothing_is_nothing() -> None:
    plan = make_plan(**TOP_K, tokens={"top_fraction": 0.3})
    gradient, out = run(plan, make_batch(mask=torch.zeros(T, dtype=torch.bool)))
    assert not gradient.any()
    assert out.metrics["positions"] == 0


def test_prefix_weight_falls_from_first_to_last_token() -> None:
    """IW-OPD: 1 + 0.5·(1 − prefix Σ|A| / Σ|A|), within each response."""
    advantage = at_sampled(LOG_Q) - BEHAVIOUR
    weights = []
    for start, stop in ((0, 5), (5, 8)):
        sizes = [abs(float(a)) for a in advantage[start:stop]]
        weights += [1 + 0.5 * (1 - sum(sizes[: i + 1]) / sum(sizes)) for i in range(len(sizes))]
    weight = torch.tensor(weights, dtype=torch.float64)
    assert weight[4] == pytest.approx(1)
    torch.testing.assert_close(prefix_weight(0.5, advantage, LENGTHS), weight)
    gradient, _ = run(make_plan(weights={"prefix": 0.5}), make_batch())
    torch.testing.assert_close(gradient, policy_gradient(weight * advantage))
    zeros = prefix_weight(0.5, torch.zeros(T, dtype=torch.float64), LENGTHS)
    assert torch.equal(zeros, torch.ones(T, dtype=torch.float64))


def test_prefix_weight_ignores_positions_without_an_advantage() -> None:
    plan = make_plan(weights={"prefix": 0.5})
    masked = torch.ones(T, dtype=torch.bool)
    masked[1] = False
    advantage = torch.where(masked, at_sampled(LOG_Q) - BEHAVIOUR, 0)
    gradient, _ = run(plan, make_batch(mask=masked))
    expected = policy_gradient(prefix_weight(0.5, advantage, LENGTHS) * advantage)
    torch.testing.assert_close(gradient, expected)


def kl_on_support(log_p: Tensor, tail: str) -> Tensor:
    s, t = log_p.gather(1, IDS), LOG_Q.gather(1, IDS)
    if tail == "renormalise":
        s, t = s.log_softmax(-1), t.log_softmax(-1)
    else:
        s, t = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], dim=1) for x in (s, t))
    return (s.exp() * (s - t)).sum(-1)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_teacher_entropy_and_surprise_multiply_the_divergence(tail: str) -> None:
    """MSD: KL(p‖q) × the teacher's top-k entropy × (1 − p(y)), the factors detached."""
    weights = {"teacher_entropy": True, "surprise": True}
    gradient, _ = run(make_plan(**TOP_K, tail=tail, weights=weights), make_batch())
    inside = LOG_Q.gather(1, IDS).log_softmax(-1)
    factor = -(inside.exp() * inside).sum(-1) * (1 - at_sampled(LOG_P).exp())
    expected = gradient_of(lambda log_p: factor * kl_on_support(log_p, tail))
    torch.testing.assert_close(gradient, expected)


CAP = 1.1


@pytest.mark.parametrize("known", [True, False], ids=["old", "current"])
def test_rollout_cap_weighs_by_the_trainers_own_old_probabilities(known: bool) -> None:
    """G-OPD's two ratios: min(p_old/μ, cap) on the token, and p/p_old in the clipped surrogate."""
    old = OLD if known else at_sampled(LOG_P)
    batch = make_batch(old_logprobs=OLD if known else None)
    weight = (old - BEHAVIOUR).exp().clamp(max=CAP)
    assert 0 < int((weight == CAP).sum()) < T
    advantage = at_sampled(LOG_Q) - BEHAVIOUR  # log_ratio is "behaviour"

    def clipped(log_p: Tensor) -> Tensor:
        ratio = (at_sampled(log_p) - old).exp()
        return weight * torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)

    def capped(log_p: Tensor) -> Tensor:
        kept = (at_sampled(LOG_P) - old).exp().clamp(max=1.05)
        return -weight * kept * advantage * at_sampled(log_p)

    for correction, expected in (
        ({"kind": "ppo", "clip": 0.2}, clipped),
        ({"kind": "importance", "cap": 1.05}, capped),
    ):
        plan = make_plan(correction=correction, weights={"rollout_cap": CAP})
        gradient, out = run(plan, batch)
        torch.testing.assert_close(gradient, gradient_of(expected))
        assert out.metrics["rollout_weight"] == pytest.approx(float(weight.sum()))


def test_rollout_cap_multiplies_a_pathwise_divergence_with_both_ratios() -> None:
    """SDPO: min(p/p_old, 2) and a rollout weight capped on its own."""
    plan = make_plan(
        **TOP_K, tail="bucket", correction={"kind": "importance", "cap": 1.05}, weights={"rollout_cap": CAP}
    )
    gradient, _ = run(plan, make_batch(old_logprobs=OLD))
    factor = (OLD - BEHAVIOUR).exp().clamp(max=CAP) * (at_sampled(LOG_P) - OLD).exp().clamp(max=1.05)
    torch.testing.assert_close(gradient, gradient_of(lambda log_p: factor * kl_on_support(log_p, "bucket")))


def test_old_probabilities_that_are_not_finite_drop_their_position() -> None:
    plan = make_plan(weights={"rollout_cap": CAP})
    old = OLD.clone()
    old[2] = math.nan
    gradient, out = run(plan, make_batch(old_logprobs=old))
    assert not gradient[2].any()
    assert (out.metrics["dropped_behaviour"], out.metrics["positions"]) == (1, T - 1)


def test_gate_opens_high_and_closes_low() -> None:
    gate = HysteresisGate(GateSettings(entropy_on=1.0, off_fraction=0.9))
    seen = []
    for entropy in (0.95, 1.0, 0.95, math.nan, 0.9, 0.89, 0.99, 1.2):
        gate = gate.after(entropy)
        seen.append(gate.open)
    assert seen == [False, True, True, True, True, False, False, True]


def test_gate_without_a_level_takes_it_from_its_first_steps() -> None:
    """AntiSD: H_warm is the mean of five warm-up steps; on at H_warm, off below 0.93 of it."""
    gate = HysteresisGate(GateSettings())
    seen = []
    for entropy in (1.0, 1.2, math.nan, 0.8, 1.1, 0.9, 0.94, 0.92, 0.99, 1.0):
        gate = gate.after(entropy)
        seen.append(gate.open)
        saved = Ledger.from_json(Ledger(settings={}, gate=gate.state).to_json())
        assert HysteresisGate(GateSettings(), **saved.gate) == gate
    assert gate.level == pytest.approx(1.0)
    assert seen == [False] * 5 + [True, True, False, False, True]
    with pytest.raises(ValueError, match="warmup_steps: set beside entropy_on"):
        GateSettings(entropy_on=1.0, warmup_steps=3)


@pytest.mark.parametrize("row", [{}, {**TOP_K, "tail": "bucket"}])
def test_entropies_of_student_and_teacher_are_counted_for_the_gate(row: dict[str, Any]) -> None:
    plan = make_plan(**row, mix="add", gate={"entropy_of": "teacher"})
    assert all(signal.entropy for _, signal in plan.view_requests.values())
    batch = make_batch()
    entropy = batch.views["teacher"].entropy
    assert entropy is not None
    unknown = entropy.clone()
    unknown[1] = math.nan
    batch = make_batch(views={"teacher": replace(batch.views["teacher"], entropy=unknown)})
    _, out = run(plan, batch, distill_open=False)
    assert out.metrics["entropy_known"] == T - 1
    assert out.metrics["teacher_entropy"] == pytest.approx(float(entropy.sum() - entropy[1]))
    assert out.metrics["entropy"] == pytest.approx(float(-(LOG_P.exp() * LOG_P).sum()))


@pytest.mark.parametrize("row", [{}, {**TOP_K, "tail": "bucket"}, {"mix": "multiply"}, {"mix": "route"}])
def test_closed_gate_leaves_the_reward_alone(row: dict[str, Any]) -> None:
    settings = {"mix": "add", **row}
    gated, plain = make_plan(**settings, gate={"entropy_on": 1.0}), make_plan(**settings)
    batch = make_batch()
    opened, _ = run(gated, batch, distill_open=True)
    torch.testing.assert_close(opened, run(plain, batch)[0])
    closed, out = run(gated, make_batch(views={"teacher": blank(batch)}), distill_open=False)
    torch.testing.assert_close(closed, policy_gradient(REWARD))
    assert out.metrics["dropped_teacher"] == 0
    assert not torch.allclose(closed, opened)


def blank(batch: TokenBatch) -> ViewTensors:
    """The view with every score missing."""
    view = batch.views["teacher"]
    nowhere = {
        name: torch.full_like(values, math.nan)
        for name in ("sampled", "support_logprobs", "entropy")
        if (values := getattr(view, name)) is not None
    }
    return replace(view, **nowhere)


def test_state_of_a_gate_is_given_exactly_when_there_is_one() -> None:
    for settings, state in (({"mix": "add", "gate": {"entropy_on": 1.0}}, None), ({}, True), ({}, False)):
        with pytest.raises(ValueError, match="distill_open: got"):
            run(make_plan(**settings), make_batch(), distill_open=state)


def test_softplus_advantage_is_that_of_the_jensen_shannon_divergence() -> None:
    """AntiSD: A_seq − λ·½·[softplus(u) − log 2] is jsd 0.5 with a negative coefficient, gate and all."""
    plan = make_plan(
        divergence="jsd", beta=0.5, mix="add", distill_coefficient=-0.3, gate={"entropy_on": 1.0}
    )
    u = at_sampled(LOG_Q) - BEHAVIOUR
    advantage = REWARD - 0.3 * 0.5 * (torch.nn.functional.softplus(u) - math.log(2))
    torch.testing.assert_close(run(plan, make_batch(), distill_open=True)[0], policy_gradient(advantage))
    torch.testing.assert_close(run(plan, make_batch(), distill_open=False)[0], policy_gradient(REWARD))


def test_least_entropy_ahead_stays_within_its_response() -> None:
    entropy = torch.tensor([3.0, 5.0, 4.0, 2.0, math.nan, 1.0, 6.0, 0.5])
    assert least_entropy_ahead(entropy, LENGTHS, 1).tolist() == [3, 4, 2, 2, math.inf, 1, 0.5, 0.5]
    assert least_entropy_ahead(entropy, LENGTHS, 99).tolist() == [2, 2, 2, 2, math.inf, 0.5, 0.5, 0.5]
    assert least_entropy_ahead(entropy[:1], torch.tensor([1]), 3).tolist() == [3]
