"""Audited chunks: their loss and gradient are the formula's, the others' the divergence's, and no more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tabular import V, make_plan, random_logits
from torch import Tensor

from student_trainer.objective.audit import read_audit
from student_trainer.objective.compile import Plan
from student_trainer.objective.loss import TokenBatch, ViewTensors, objective_loss, student_logprobs

LENGTHS = [7, 5, 9, 3]
T = sum(LENGTHS)
STARTS = [0, 7, 12, 21]
LOGITS, REFERENCE = random_logits(T, 1), random_logits(T, 2).log_softmax(-1)
SAMPLED = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3))
C, N, ALPHA, BETA = 3, 4, 1.5, 0.1
CHUNKS = {1: 0.75, 4: 0.0, 8: 1.0, 12: 0.3, 17: math.nan}  # first position → k̄
HEAD = torch.eye(V, dtype=torch.float64)
AUDIT = {"teacher": "writer", "chunks": 2, "chunk_tokens": C, "continuations": N, "prior": ALPHA}
PATHWISE = {
    "estimator": "pathwise", "divergence": "kl_teacher_student", "support": "teacher_topk", "k": V,
    "tail": "renormalise",
}  # fmt: skip


def audit_plan(**changes: Any) -> Plan:
    row = {"mix": "route", "distill_coefficient": BETA, "audit": AUDIT, **PATHWISE, **changes}
    return make_plan(("big", "writer"), **row)


PLAN = audit_plan()


def positions(chunks: dict[int, float]) -> tuple[Tensor, Tensor]:
    anchor, agreement = torch.full((T,), -1), torch.full((T,), math.nan)
    for start, value in chunks.items():
        anchor[start : start + C], agreement[start : start + C] = start, value
    return anchor, agreement


def make_batch(chunks: dict[int, float] = CHUNKS, **changes: Any) -> TokenBatch:
    anchor, agreement = positions(chunks)
    ids = torch.arange(V).expand(T, V)
    batch = TokenBatch(
        sampled_ids=SAMPLED,
        behaviour_logprobs=torch.full((T,), -2.0),
        mask=torch.ones(T, dtype=torch.bool),
        weight=1 + torch.arange(T, dtype=torch.float64) / T,
        views={"teacher": ViewTensors(at(REFERENCE), ids, REFERENCE)},
        sequence_lengths=torch.tensor(LENGTHS),
        audit_anchor=anchor,
        agreement=agreement,
    )
    return replace(batch, **changes)


def at(values: Tensor) -> Tensor:
    return values.gather(1, SAMPLED[:, None])[:, 0]


def by_hand(
    log_p: Tensor, start: Tensor, batch: TokenBatch, chunks: dict[int, float], beta: float = BETA
) -> Tensor:
    """The formula, chunk by chunk; `start` is log p(y) as the step starts, [T]."""
    total = torch.zeros((), dtype=torch.float64)
    inside: set[int] = set()
    for first, agreement in chunks.items():
        cells = list(range(first, first + C))
        inside |= set(cells)
        if math.isnan(agreement) or not bool(batch.mask[cells].all()):
            continue
        confidence = math.exp(sum(float(start[t]) for t in cells) / C)
        weight = (N * agreement + ALPHA * confidence) / (N + ALPHA)
        for t in cells:
            total = total - batch.weight[t] * weight * log_p[t, SAMPLED[t]]
    for t in set(range(T)) - inside:
        if batch.mask[t]:
            q = REFERENCE[t].exp()
            total = total + batch.weight[t] * beta * (q * (q.log() - log_p[t])).sum()
    return total


def taken(
    batch: TokenBatch, plan: Plan = PLAN, logits: Tensor = LOGITS, **how: Any
) -> tuple[Tensor, Tensor, dict[str, float]]:
    leaf = logits.clone().requires_grad_()
    out = objective_loss(leaf, HEAD, None, batch, plan, chunk_rows=4, **how)
    out.loss.backward()
    assert leaf.grad is not None
    return out.loss.detach(), leaf.grad, out.metrics


def written(formula: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    leaf = LOGITS.clone().requires_grad_()
    loss = formula(leaf.log_softmax(-1))
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def test_loss_and_gradient_are_the_formulas() -> None:
    """Of the student as it is: its own confidence is taken from the same pass, and held fixed."""
    batch, own = make_batch(), at(LOGITS.log_softmax(-1))
    loss, gradient, metrics = taken(batch)
    expected, slope = written(lambda log_p: by_hand(log_p, own, batch, CHUNKS))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, slope)
    assert metrics["dropped_audit"] == C
    assert metrics["audited"] == 4 * C
    assert metrics["distilled"] == T - 5 * C
    assert metrics["agreement"] == pytest.approx(C * (0.75 + 0.0 + 1.0 + 0.3))


def test_the_weight_is_held_fixed() -> None:
    """The formula with π̂ differentiated has another gradient, which is not the trainer's."""

    def moving(log_p: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for first, agreement in CHUNKS.items():
            if not math.isnan(agreement):
                cells = torch.arange(first, first + C)
                weight = (N * agreement + ALPHA * at(log_p)[cells].mean().exp()) / (N + ALPHA)
                total = total - (weight * make_batch().weight[cells] * at(log_p)[cells]).sum()
        return total

    inside = torch.cat([torch.arange(first, first + C) for first in CHUNKS if first != 17])
    _, gradient, _ = taken(make_batch())
    assert not torch.allclose(gradient[inside], written(moving)[1][inside], rtol=1e-2)


def test_confidence_is_that_of_the_student_as_the_step_started() -> None:
    start = at(random_logits(T, 9).log_softmax(-1))
    batch = make_batch(old_logprobs=start)
    loss, gradient, _ = taken(batch)
    expected, slope = written(lambda log_p: by_hand(log_p, start, batch, CHUNKS))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, slope)
    assert PLAN.uses_old
    torch.testing.assert_close(
        student_logprobs(LOGITS, HEAD, None, make_batch(), PLAN), at(LOGITS.log_softmax(-1))
    )


@pytest.mark.parametrize("known", [False, True])
def test_a_chunk_that_is_not_whole_is_not_trained_on(known: bool) -> None:
    """Whatever is known of the student outside the mask."""
    mask, own = torch.ones(T, dtype=torch.bool), at(LOGITS.log_softmax(-1))
    mask[[2, 9, 20]] = False  # the first two within chunks
    batch = make_batch(mask=mask, old_logprobs=own if known else None)
    loss, gradient, metrics = taken(batch)
    expected, slope = written(lambda log_p: by_hand(log_p, own, batch, CHUNKS))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, slope)
    assert metrics["dropped_audit"] == C + 2 + 2
    assert not gradient[[1, 2, 3, 8, 9, 10, 17, 18, 19]].any()


def test_an_agreement_of_none_is_no_divergence() -> None:
    """k̄ = 0 and a student without confidence: the weight is almost 0, and the position stays audited."""
    sure = LOGITS.clone()
    sure[:, :] = 0.0
    sure.scatter_(1, SAMPLED[:, None], -2000.0)
    _, gradient, metrics = taken(make_batch({1: 0.0}), logits=sure)
    assert metrics["audited"] == C
    assert metrics["distilled"] == T - C
    assert float(gradient[1 : 1 + C].abs().max()) < 1e-300


def test_coefficients_scale_their_own_part() -> None:
    batch, own = make_batch(), at(LOGITS.log_softmax(-1))
    audited = written(lambda log_p: by_hand(log_p, own, batch, CHUNKS, beta=0.0))[1]
    whole = written(lambda log_p: by_hand(log_p, own, batch, CHUNKS))[1]
    plan = audit_plan(reward_coefficient=3.0, distill_coefficient=2 * BETA)
    torch.testing.assert_close(taken(batch, plan)[1], 3 * audited + 2 * (whole - audited))
    alone = make_plan(("writer",), mix="route", distill_coefficient=0.0, audit=AUDIT)
    torch.testing.assert_close(taken(replace(batch, views={}), alone)[1], audited)


def test_the_others_may_be_distilled_by_their_sampled_tokens() -> None:
    """As without an audit: the expected gradient of the rest is that of the divergence, token by token."""
    plan = audit_plan(
        estimator="score_function", support="sampled", divergence="kl_student_teacher", k=None, tail=None
    )
    batch = make_batch()
    plain = make_plan(("big",), divergence="kl_student_teacher", distill_coefficient=BETA)
    _, gradient, _ = taken(batch, plan)
    _, rest, _ = taken(replace(batch, audit_anchor=None, agreement=None), plain)
    own = at(LOGITS.log_softmax(-1))
    audited = written(lambda log_p: by_hand(log_p, own, batch, CHUNKS, beta=0.0))[1]
    outside = positions(CHUNKS)[0] < 0
    torch.testing.assert_close(gradient, torch.where(outside[:, None], rest, audited))


def test_micro_batches_and_their_chunks_add_up() -> None:
    """Sequences apart or together, rows a few at a time or at once: the same loss, gradient and sums."""
    whole = make_batch()
    loss, gradient, metrics = taken(whole)
    for cuts in ([0, 7, 12, 21, 24], [0, 12, 24]):
        losses, gradients, sums = [], [], dict.fromkeys(metrics, 0.0)
        for first, last in itertools.pairwise(cuts):
            part = whole.changed(lambda tensor, a=first, b=last: tensor[a:b] if len(tensor) == T else tensor)
            assert part.audit_anchor is not None
            anchor = part.audit_anchor
            part = replace(
                part,
                audit_anchor=torch.where(anchor < 0, anchor, anchor - first),
                sequence_lengths=torch.tensor(
                    [n for s, n in zip(STARTS, LENGTHS, strict=True) if first <= s < last]
                ),
            )
            each = taken(part, logits=LOGITS[first:last])
            losses.append(each[0])
            gradients.append(each[1])
            sums = {name: sums[name] + each[2].get(name, 0.0) for name in sums}
        torch.testing.assert_close(torch.stack(losses).sum(), loss)
        torch.testing.assert_close(torch.cat(gradients), gradient)
        assert sums == pytest.approx(metrics)


def test_minimising_it_makes_what_the_writer_agrees_with_likelier() -> None:
    """Of two chunks alike but for k̄, the agreed one gains more log-probability from a step."""
    logits = LOGITS.clone()
    logits[4 : 4 + C] = logits[1 : 1 + C]
    same = SAMPLED.clone()
    same[4 : 4 + C] = same[1 : 1 + C]
    batch = make_batch({1: 1.0, 4: 0.1}, sampled_ids=same, weight=torch.ones(T, dtype=torch.float64))
    _, gradient, _ = taken(batch, logits=logits)
    moved = (logits - 0.1 * gradient).log_softmax(-1) - logits.log_softmax(-1)
    gained = moved.gather(1, same[:, None])[:, 0]
    assert bool((gained[1 : 1 + C] > gained[4 : 4 + C]).all())
    assert bool((gained[4 : 4 + C] > 0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audit_anchor": None}, "the plan has objective.audit"),
        ({"agreement": None}, "the plan has objective.audit"),
        ({"audit_anchor": torch.arange(T) + 1}, "begins after one of its positions"),
        ({"audit_anchor": torch.full((T,), -2)}, "is no chunk"),
        ({"agreement": torch.zeros(T - 1)}, r"batch\.agreement: got shape"),
    ],
)
def test_a_batch_that_does_not_say_what_was_audited_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        taken(make_batch(**changes))


def test_every_weight_lies_between_the_two_it_is_made_of() -> None:
    """Property: π̂ is between k̄ and π̄, nearer to k̄ the more continuations, for random chunks."""
    random = torch.Generator().manual_seed(0)
    assert PLAN.audit is not None
    for _ in range(50):
        own = -3 * torch.rand(T, generator=random, dtype=torch.float64)
        starts = {s: float(torch.rand((), generator=random)) for s in (0, 3, 7, 12, 15, 21)}
        batch = make_batch(starts, old_logprobs=own)
        far = math.inf
        for count in (1, 10, 1000):
            audit = read_audit(PLAN.audit.model_copy(update={"continuations": count}), batch)
            distance = 0.0
            for start, k in starts.items():
                confidence = own[start : start + C].mean().exp()
                weight = audit.weight[start]
                low, high = min(k, float(confidence)), max(k, float(confidence))
                assert low - 1e-6 <= float(weight) <= high + 1e-6
                distance += abs(float(weight) - k)
            assert distance < far
            far = distance


def test_of_chunks_of_one_token_it_is_a_policy_gradient_on_the_agreement() -> None:
    """By enumeration over y: on-policy the expected gradient is that of −E_p (N·k̄(y) + ½·α·p(y))/(N + α)."""
    agreement = torch.rand(V, generator=torch.Generator().manual_seed(5)).double()
    logits = random_logits(1, 6)[0]
    p = logits.softmax(-1)
    plan = make_plan(
        ("writer",), mix="route", distill_coefficient=0.0, audit={**AUDIT, "chunks": 1, "chunk_tokens": 1}
    )
    batch = TokenBatch(
        sampled_ids=torch.arange(V),
        behaviour_logprobs=p.log(),
        mask=torch.ones(V, dtype=torch.bool),
        weight=p,
        sequence_lengths=torch.ones(V, dtype=torch.int64),
        audit_anchor=torch.arange(V),
        agreement=agreement,
    )
    leaf = logits.clone().requires_grad_()
    objective_loss(leaf.expand(V, V), HEAD, None, batch, plan).loss.backward()
    own = logits.clone().requires_grad_()
    likely = own.softmax(-1)
    (-(likely * (N * agreement + ALPHA / 2 * likely)).sum() / (N + ALPHA)).backward()
    torch.testing.assert_close(leaf.grad, own.grad)
