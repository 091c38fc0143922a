"""The chunked loss equals a plain autograd loss over full logits, whatever the shapes and settings."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.objective_cases import (
    FIXED,
    ROWS,
    Case,
    head_logprobs,
    make_case,
    pathwise_rows,
    to_dtype,
)

from student_trainer.objective import head_pass
from student_trainer.objective.compile import compile_plan
from student_trainer.objective.loss import Head, TokenBatch, objective_loss
from student_trainer.objective.settings import ObjectiveSettings

SHAPES = st.fixed_dictionaries(
    {
        "T": st.integers(1, 7),
        "H": st.integers(1, 4),
        "V": st.integers(2, 12),
        "K": st.integers(1, 5),
        "chunk": st.integers(1, 4),
        "tile": st.sampled_from([1, 3, 5, 64]),
        "temperature": st.sampled_from([1.0, 0.7, 1.6]),
        "softcap": st.sampled_from([None, 2.5]),
        "scale": st.sampled_from([1.0, 0.5]),
        "bias": st.booleans(),
        "kept": st.sampled_from([0.0, 0.6, 1.0]),
    }
)


def assert_agreement(case: Case) -> None:
    loss, _, gradients = case.fused()
    expected, expected_gradients = case.plain()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: "-".join(str(x) for k, x in row.items() if k != "views")
)
def test_every_combination_agrees_with_plain_autograd(row: dict[str, Any]) -> None:
    assert_agreement(make_case(1, row, FIXED))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**31), row=st.sampled_from(ROWS), shape=SHAPES)
def test_any_shape_agrees_with_plain_autograd(seed: int, row: dict[str, Any], shape: dict[str, Any]) -> None:
    assert_agreement(make_case(seed, row, shape))


@pytest.mark.parametrize("row", [row for row in ROWS if row.get("tail") == "bucket"], ids=str)
def test_a_support_that_holds_the_whole_vocabulary_agrees_too(row: dict[str, Any]) -> None:
    """Nothing is outside: a bucket has the least that a bucket has, that of a combined target too."""
    for seed in range(4):
        assert_agreement(make_case(seed, row, {**FIXED, "V": 3, "K": 3, "kept": 1.0}))


@pytest.mark.parametrize("row", ROWS[:: max(1, len(ROWS) // 24)], ids=str)
def test_float32_agrees_with_float64(row: dict[str, Any]) -> None:
    case = make_case(2, row, {**FIXED, "V": 300, "H": 16, "tile": 64, "kept": 1.0})
    loss, _, gradients = to_dtype(case, torch.float32).fused()
    expected, expected_gradients = case.plain()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("row", [ROWS[0], pathwise_rows()[0], pathwise_rows()[-12]], ids=str)
def test_bfloat16_inputs_have_float32_logits(row: dict[str, Any]) -> None:
    """Rounded inputs, exact arithmetic: only the final rounding of the gradients differs."""
    case = to_dtype(
        make_case(3, row, {**FIXED, "V": 300, "H": 16, "tile": 64, "bias": False}), torch.bfloat16
    )
    with patch.object(head_pass, "CONVERTED_ROWS", 70):
        loss, _, gradients = case.fused()
    expected, expected_gradients = to_dtype(case, torch.float64).plain()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        if gradient is not None and wanted is not None:
            assert gradient.dtype == torch.bfloat16
            torch.testing.assert_close(gradient.double(), wanted, rtol=8e-3, atol=1e-4)


def test_per_token_values_stand_at_their_positions() -> None:
    case = make_case(4, {"estimator": "pathwise", "support": "teacher_topk"}, {**FIXED, "kept": 0.5})
    out = objective_loss(
        case.hidden,
        case.weight,
        case.bias,
        case.batch,
        case.plan,
        softcap=3.0,
        scale=0.8,
        chunk_rows=2,
        per_token=True,
    )
    assert out.per_token is not None
    log_p = head_logprobs(Head(case.weight, case.bias, 3.0, 0.8), case.hidden, case.plan.temperature)
    own = log_p.gather(1, case.batch.sampled_ids[:, None])[:, 0]
    assert 0 < int(case.batch.mask.sum()) < len(own)
    for name, expected in (("student_logprob", own), ("entropy", -(log_p.exp() * log_p).sum(-1))):
        values = out.per_token[name]
        assert torch.equal(values.isnan(), ~case.batch.mask)
        torch.testing.assert_close(
            values[case.batch.mask].double(), expected[case.batch.mask], rtol=1e-5, atol=1e-6
        )
        assert out.metrics[name] == pytest.approx(float(expected[case.batch.mask].sum()), rel=1e-9)
    assert out.metrics["positions"] == int(case.batch.mask.sum())


def test_only_asked_gradients_are_made_and_only_once() -> None:
    case = make_case(5, {"estimator": "pathwise", "support": "teacher_topk"}, FIXED)
    hidden = case.hidden.clone().requires_grad_()
    loss = objective_loss(hidden, case.weight, case.bias, case.batch, case.plan, softcap=3.0, scale=0.8).loss
    kept = loss.grad_fn.gradients  # type: ignore[union-attr]
    assert (kept.weight, kept.bias) == (None, None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    with torch.no_grad():
        assert not objective_loss(hidden, case.weight, None, case.batch, case.plan).loss.requires_grad


def test_sums_over_a_real_vocabulary_keep_their_digits() -> None:
    """One float32 sum over 152k terms would lose four digits; torch's CPU log_softmax is biased by 7e-6."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, rows = 151_936, 2
    weight = torch.randn(vocabulary, 4, generator=generator)
    teacher = Head(torch.randn(vocabulary, 4, generator=generator))
    hidden = torch.randn(rows, 4, generator=generator)
    plan = compile_plan(ObjectiveSettings(estimator="pathwise", support="full"), student_temperature=1.0)
    batch = TokenBatch(
        sampled_ids=torch.tensor([0, vocabulary - 1]),
        behaviour_logprobs=torch.zeros(rows),
        mask=torch.ones(rows, dtype=torch.bool),
        weight=torch.ones(rows),
    )
    leaf = hidden.clone().requires_grad_()
    out = objective_loss(
        leaf, weight, None, batch, plan, teacher_hidden=hidden, teacher_head=teacher, per_token=True
    )
    out.loss.backward()
    exact = hidden.double().requires_grad_()
    log_p = (exact @ weight.double().t()).log_softmax(-1)
    log_q = (hidden.double() @ teacher.weight.double().t()).log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum()
    wanted.backward()
    assert out.metrics["divergence"] == pytest.approx(wanted.item(), rel=1e-6)
    assert out.per_token is not None
    own = log_p.gather(1, batch.sampled_ids[:, None])[:, 0]
    torch.testing.assert_close(out.per_token["student_logprob"].double(), own, rtol=0, atol=3e-6)
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
