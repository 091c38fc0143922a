"""Positions, masks, weights and mixing; numbers that are not finite never reach the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.loss import (
    Head,
    NonFiniteStudentError,
    TokenBatch,
    ViewTensors,
    objective_loss,
)
from student_trainer.objective.mix import group_advantages
from student_trainer.objective.settings import ObjectiveSettings, TokenSettings
from student_trainer.objective.support import union
from student_trainer.objective.weights import position_weights, token_mask

T, H, V, K = 6, 3, 8, 3


def make_plan(**row: Any) -> Plan:
    return compile_plan(ObjectiveSettings.model_validate(row), student_temperature=1.0)


PATHWISE: dict[str, Any] = {"estimator": "pathwise", "support": "teacher_topk", "k": K}


def make_batch(seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    log_q = torch.randn(T, V, generator=generator).log_softmax(-1)
    top = log_q.topk(K)
    return TokenBatch(
        sampled_ids=torch.randint(V, (T,), generator=generator),
        behaviour_logprobs=-torch.rand(T, generator=generator),
        mask=torch.ones(T, dtype=torch.bool),
        weight=torch.full((T,), 1 / T),
        views={"teacher": ViewTensors(log_q[:, 0], top.indices, top.values, entropy=torch.linspace(0, 5, T))},
        reward_advantage=torch.tensor([1.0, -1.0, 0.0, 0.5, 0.0, -2.0]),
        sequence_lengths=torch.tensor([4, 2]),
    )


def inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator)


def gradient(batch: TokenBatch, plan: Plan, **kwargs: Any) -> tuple[Tensor, dict[str, float]]:
    hidden, weight = inputs()
    hidden.requires_grad_()
    out = objective_loss(hidden, weight, None, batch, plan, chunk_rows=4, **kwargs)
    out.loss.backward()
    assert hidden.grad is not None
    return hidden.grad, out.metrics


def with_view(batch: TokenBatch, **changed: Tensor) -> TokenBatch:
    return replace(batch, views={"teacher": replace(batch.views["teacher"], **changed)})


def poisoned(values: Tensor, position: Any, value: float) -> Tensor:
    values = values.clone()
    values[position] = value
    return values


BAD = st.sampled_from([math.nan, math.inf, -math.inf])
ROWS: list[dict[str, Any]] = [
    {},
    {"divergence": "kl_teacher_student"},
    {"horizon": "response"},
    {"correction": {"kind": "importance"}, "mix": "add"},
    {"mix": "multiply", "distill_coefficient": 0.5, "correction": {"kind": "ppo"}},
    {"mix": "route"},
    PATHWISE,
    {**PATHWISE, "tail": "renormalise", "mix": "route"},
    {**PATHWISE, "tail": "raw", "divergence": "kl_teacher_student", "correction": {"kind": "importance"}},
    {**PATHWISE, "tail": "stop_gradient", "mix": "add"},
    *({"divergence": name} for name in ("jeffreys", "chi_square_teacher_student", "total_variation")),
    {"divergence": "chi_square_student_teacher", "horizon": 2},
    {"divergence": "chi_square_teacher_student", "score_weight": "stopped"},
    *(
        {**PATHWISE, "divergence": name, "tail": tail}
        for name in ("jeffreys", "hellinger", "chi_square_student_teacher", "chi_square_teacher_student")
        for tail in ("raw", "bucket")
    ),
    {**PATHWISE, "divergence": "alpha", "alpha": 3.0, "tail": "stop_gradient_mean"},
    {**PATHWISE, "divergence": "alpha", "alpha": -2.0, "tail": "renormalise", "entry_clip": 0.1},
]


@settings(max_examples=120, deadline=None)
@given(row=st.sampled_from(ROWS), data=st.data())
def test_values_that_are_not_finite_are_dropped_and_counted(row: dict[str, Any], data: st.DataObject) -> None:
    """Wherever they stand, what comes out is the loss without that position."""
    plan, batch = make_plan(**row), make_batch()
    position = data.draw(st.integers(0, T - 1))
    bad = data.draw(BAD)
    view = batch.views["teacher"]
    assert view.sampled is not None
    assert view.support_logprobs is not None
    field = data.draw(st.sampled_from(["teacher", "behaviour", "reward"]))
    damaged = batch
    if field == "teacher":
        damaged = with_view(
            batch,
            sampled=poisoned(view.sampled, position, bad),
            support_logprobs=poisoned(
                view.support_logprobs, (position, data.draw(st.integers(0, K - 1))), bad
            ),
        )
    elif field == "behaviour":
        damaged = replace(batch, behaviour_logprobs=poisoned(batch.behaviour_logprobs, position, bad))
    elif batch.reward_advantage is not None:
        damaged = replace(batch, reward_advantage=poisoned(batch.reward_advantage, position, bad))
    got, metrics = gradient(damaged, plan)
    assert bool(torch.isfinite(got).all())
    assert all(math.isfinite(value) for value in metrics.values())
    rewarded = plan.mix == "route" and bool(batch.reward_advantage[position] != 0)  # type: ignore[index]
    matters = {"teacher": not rewarded, "behaviour": plan.needs_behaviour, "reward": plan.needs_reward}[field]
    dropped = sum(metrics.get(f"dropped_{name}", 0) for name in ("teacher", "behaviour", "reward"))
    assert dropped == (1 if matters else 0)
    assert metrics["positions"] == T - dropped
    if plan.horizon == 0:
        mask = batch.mask.clone()
        mask[position] = not matters
        expected, _ = gradient(replace(batch, mask=mask), plan)
        torch.testing.assert_close(got, expected)


def test_not_finite_teacher_head_rows_are_dropped_and_counted() -> None:
    plan = make_plan(estimator="pathwise", support="full", divergence="jsd", mix="add")
    teacher_hidden, teacher_weight = inputs(7)
    batch = make_batch()
    for bad in (math.nan, math.inf):
        spoiled = poisoned(teacher_hidden, (2, 0), bad)
        got, metrics = gradient(batch, plan, teacher_hidden=spoiled, teacher_head=Head(teacher_weight))
        mask = batch.mask.clone()
        mask[2] = False
        expected, _ = gradient(
            replace(batch, mask=mask), plan, teacher_hidden=teacher_hidden, teacher_head=Head(teacher_weight)
        )
        torch.testing.assert_close(got, expected)
        assert (metrics["dropped_teacher"], metrics["positions"]) == (1, T - 1)


def test_extreme_finite_values_stay_finite() -> None:
    for row in ROWS:
        batch = with_view(
            make_batch(),
            sampled=torch.full((T,), -300.0),
            support_logprobs=torch.tensor([0.0, -300.0, -1e4]).expand(T, K),
        )
        for behaviour in (-300.0, 0.0):
            changed = replace(batch, behaviour_logprobs=torch.full((T,), behaviour))
            hidden, weight = inputs()
            leaf = (hidden * 50).requires_grad_()
            out = objective_loss(leaf, weight, None, changed, make_plan(**row))
            out.loss.backward()
            assert bool(torch.isfinite(out.loss))
            assert leaf.grad is not None
            assert bool(torch.isfinite(leaf.grad).all())


def test_a_diverged_student_is_an_error_not_a_loss() -> None:
    hidden, weight = inputs()
    for value in (math.nan, math.inf):
        with pytest.raises(NonFiniteStudentError):
            objective_loss(poisoned(hidden, (1, 1), value), weight, None, make_batch(), make_plan())


def test_a_batch_without_positions_has_zero_loss_and_gradient() -> None:
    batch = replace(make_batch(), mask=torch.zeros(T, dtype=torch.bool))
    for row in ROWS:
        got, metrics = gradient(batch, make_plan(**row))
        assert not got.any()
        assert metrics["positions"] == 0


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        ({"sampled_ids": torch.full((T,), V)}, {}, f"batch.sampled_ids: got id {V}, allowed: 0 to {V - 1}"),
        ({"sampled_ids": torch.full((T,), -1)}, {}, "batch.sampled_ids: got id -1"),
        ({"weight": torch.full((T,), math.nan)}, {}, "batch.weight"),
        ({"mask": torch.ones(T + 1, dtype=torch.bool)}, {}, "batch.mask: got shape"),
        ({"reward_advantage": None}, {"mix": "add"}, "batch.reward_advantage: missing"),
        ({"sequence_lengths": None}, {"horizon": 1}, "batch.sequence_lengths"),
        ({"views": {}}, {}, "'teacher' is missing"),
        ({"views": {"teacher": ViewTensors()}}, {}, "sampled: missing"),
        ({"views": {"teacher": ViewTensors()}}, PATHWISE, "support_ids and support_logprobs"),
    ],
)
def test_batches_that_do_not_fit_their_plan_are_refused(
    changes: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    hidden, weight = inputs()
    with pytest.raises(ValueError, match=message):
        objective_loss(hidden, weight, None, replace(make_batch(), **changes), make_plan(**row))


def test_supports_with_strange_ids_are_refused() -> None:
    hidden, weight = inputs()
    ids = make_batch().views["teacher"].support_ids
    assert ids is not None
    for column, value, message in ((0, V, "support_ids: got id 8"), (1, int(ids[2, 0]), "appears twice")):
        batch = with_view(make_batch(), support_ids=poisoned(ids, (2, column), value))
        with pytest.raises(ValueError, match=message):
            objective_loss(hidden, weight, None, batch, make_plan(**PATHWISE))


def test_union_keeps_every_id_once_with_its_score() -> None:
    ids = torch.tensor([[4, 2, 7], [1, 0, -1]])
    more = torch.tensor([[2, 5, 7], [-1, 3, -1]])
    joined, scores = union(ids, ids * 1.0, more, more * 10.0)
    assert joined.tolist() == [[4, 2, 7, -1, 5, -1], [1, 0, -1, -1, 3, -1]]
    assert scores[0, [0, 1, 2, 4]].tolist() == [4.0, 2.0, 7.0, 50.0]
    assert scores[1, [0, 1, 4]].tolist() == [1.0, 0.0, 30.0]


def test_token_mask_counts_positions_within_each_sequence() -> None:
    lengths = torch.tensor([4, 1, 3])
    sampled = torch.tensor([5, 6, 7, 8, 5, 6, 7, 8])
    tokens = TokenSettings(skip_first_n=1, keep_first_n=3)
    assert token_mask(tokens, lengths, sampled).int().tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    tokens = TokenSettings(skip_first_n=1, skip_ids=(7, 5))
    assert token_mask(tokens, lengths, sampled).int().tolist() == [0, 1, 0, 1, 0, 0, 0, 1]


def test_entropy_gate_selects_positions() -> None:
    batch = make_batch()
    gated, metrics = gradient(
        batch, make_plan(tokens={"teacher_entropy_above": 1.5, "teacher_entropy_below": 3.5})
    )
    mask = torch.tensor([False, False, True, True, False, False])
    expected, _ = gradient(replace(batch, mask=mask), make_plan())
    torch.testing.assert_close(gated, expected)
    assert metrics["positions"] == 2


def test_position_weights_add_up_over_micro_batches() -> None:
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    lengths = torch.tensor([3, 1, 2, 3])
    tokens = position_weights(mask, lengths, "token_mean", total_tokens=6, total_sequences=3)
    assert tokens.sum() == pytest.approx(1.0)
    assert tokens[mask].tolist() == pytest.approx([1 / 6] * 6)
    means = position_weights(mask, lengths, "sequence_mean", total_tokens=6, total_sequences=3)
    assert means.tolist() == pytest.approx([1 / 6, 1 / 6, 0, 1 / 3, 0, 0, 1 / 9, 1 / 9, 1 / 9])
    halves = [
        position_weights(mask[part], lengths[some], "sequence_mean", total_tokens=6, total_sequences=3)
        for part, some in ((slice(0, 4), slice(0, 2)), (slice(4, 9), slice(2, 4)))
    ]
    assert torch.equal(torch.cat(halves), means)


def test_group_advantages_compare_within_the_group_only() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 0.3])
    sizes = torch.tensor([4, 2, 1])
    centred = group_advantages(rewards, sizes, divide_by_std=False)
    assert centred.tolist() == [0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0]
    scaled = group_advantages(rewards, sizes, divide_by_std=True)
    assert scaled[:4].tolist() == pytest.approx([0.866, -0.866, -0.866, 0.866], abs=1e-3)
    assert scaled[4:].tolist() == [0.0, 0.0, 0.0]
    tied = group_advantages(torch.tensor([0.1, 0.1, 0.1]), torch.tensor([3]), divide_by_std=True)
    assert tied.tolist() == [0.0, 0.0, 0.0]


def policy_gradient(batch: TokenBatch, advantage: Tensor) -> Tensor:
    hidden, weight = inputs()
    leaf = hidden.clone().requires_grad_()
    log_p = (leaf @ weight.t()).log_softmax(-1).gather(1, batch.sampled_ids[:, None])[:, 0]
    (-(batch.weight * advantage * log_p).sum()).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_mixes_combine_the_two_advantages_as_documented() -> None:
    batch = make_batch()
    reward, sampled = batch.reward_advantage, batch.views["teacher"].sampled
    assert reward is not None
    assert sampled is not None
    log_u = sampled - batch.behaviour_logprobs
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({"distill_coefficient": 0.5}, 0.5 * log_u),
        (
            {"mix": "add", "distill_coefficient": 0.5, "reward_coefficient": 2.0},
            0.5 * log_u + 2 * reward,
        ),
        ({"mix": "add", "distill_coefficient": 0.0, "reward_coefficient": 2.0}, 2 * reward),
        ({"mix": "route", "distill_coefficient": 0.5}, torch.where(reward != 0, reward, 0.5 * log_u)),
        ({"mix": "route", "route_reward": "positive"}, torch.where(reward > 0, reward, log_u)),
        (
            {"mix": "multiply", "distill_coefficient": 0.5, "ratio_clip": 0.4},
            reward * (0.5 + 0.5 * (reward.sign() * log_u).exp().clamp(0.6, 1.4)),
        ),
        ({"advantage_clip": 0.3}, log_u.clamp(-0.3, 0.3)),
    ]
    for row, advantage in cases:
        got, _ = gradient(batch, make_plan(**row))
        torch.testing.assert_close(
            got, policy_gradient(batch, advantage), msg=lambda text, row=row: f"{row}: {text}"
        )


def test_reward_only_control_trains_without_any_view() -> None:
    plan = compile_plan(ObjectiveSettings(preset="grpo"), student_temperature=1.0)
    hidden, weight = inputs()
    batch = replace(make_batch(), views={})
    log_p = (hidden @ weight.t()).log_softmax(-1).gather(1, batch.sampled_ids[:, None])[:, 0]
    batch = replace(batch, behaviour_logprobs=log_p)
    got, metrics = gradient(batch, plan)
    assert batch.reward_advantage is not None
    torch.testing.assert_close(got, policy_gradient(batch, batch.reward_advantage))
    assert metrics["ratio"] == pytest.approx(T)
    assert metrics["ratio_clipped"] == 0


def test_divergence_metrics_cover_distilled_positions_only() -> None:
    batch = make_batch()
    assert batch.reward_advantage is not None
    routed = gradient(batch, make_plan(**{**PATHWISE, "mix": "route"}))[1]
    unrewarded = replace(batch, mask=batch.reward_advantage == 0)
    alone = gradient(unrewarded, make_plan(**PATHWISE))[1]
    assert (routed["positions"], routed["distilled"], alone["distilled"]) == (T, 2, 2)
    for name in ("divergence", "student_mass", "teacher_mass"):
        assert routed[name] == pytest.approx(alone[name])


def test_horizon_does_not_reach_into_the_next_sequence() -> None:
    batch = make_batch()
    view = batch.views["teacher"]
    assert view.sampled is not None
    plan = make_plan(horizon="response")
    changed = with_view(batch, sampled=poisoned(view.sampled, 4, -9.0))
    before, after = gradient(batch, plan)[0], gradient(changed, plan)[0]
    torch.testing.assert_close(before[[0, 1, 2, 3, 5]], after[[0, 1, 2, 3, 5]])
    assert not torch.allclose(before[4], after[4])
