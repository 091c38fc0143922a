"""Every combination that compiles, enumerated: its expected gradient is that of what it names, or it warns.

The combinations are made of the settings' own types, so that a new estimator, support, tail, target or
divergence is among them at once, and fails here until its definition is written down below. Policies are
tables over prefixes, of which every sequence is enumerated; the definitions share no code with the trainer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from support.tabular import (
    DIVERGENCES,
    ENDS,
    V,
    expected_gradient,
    label,
    make_plan,
    random_logits,
    share,
)
from torch import Tensor

from student_trainer.objective.compile import Plan
from student_trainer.objective.extension_settings import AuditSettings
from student_trainer.objective.loss import Head, TokenBatch, ViewTensors, objective_loss
from student_trainer.objective.settings import (
    Divergence,
    Estimator,
    Mix,
    NoCorrection,
    Normalisation,
    ObjectiveError,
    Ratio,
    RatioGate,
    ScoreWeight,
    Support,
    Tail,
    Target,
)

WORDS = 4  # token 0 ends a sequence, and so does the second
PREFIXES = [(), (1,), (2,), (3,)]
SEQUENCES = [(0,), *((first, last) for first in (1, 2, 3) for last in range(WORDS))]
ROWS = [PREFIXES.index(s[:t]) for s in SEQUENCES for t in range(len(s))]
HEAD = torch.eye(WORDS, dtype=torch.float64)
ROWS_OF_DIVERGENCES = [*DIVERGENCES, *ENDS]

COEFFICIENTS: dict[str, dict[str, float]] = {
    "one": {"a": 1.0},
    "log_linear": {"a": 1.25, "b": -0.4},
    "mixture": {"a": 0.3, "b": 0.7},
    "losses": {"a": 1.0, "b": 0.5},
}
ON_POLICY: dict[str, list[dict[str, Any]]] = {  # what must not matter where the student itself has sampled
    "pathwise": [
        {},
        {"correction": {"kind": "importance", "cap": 1.5}},
        {"weights": {"rollout_cap": 1.01}},
    ],
    "score_function": [
        {"correction": {"kind": "importance"}},
        {"correction": {"kind": "importance", "cap": 1.5}, "log_ratio": "student"},
        {"correction": {"kind": "ppo"}, "weights": {"rollout_cap": 2.0}},
        {"log_ratio": "student"},
    ],
}
BIASED = ("its gradient is not zero where student and teacher agree", "is not the gradient of the divergence")


def combinations() -> Iterator[tuple[Plan, dict[str, Any], str]]:
    """Every combination of the types that compiles, each with three divergences in turn."""
    place = itertools.count()
    for estimator, support, tail, target, horizon, weight in itertools.product(
        get_args(Estimator),
        get_args(Support),
        (None, *get_args(Tail)),
        ("one", *get_args(Target)),
        (0, 1),
        get_args(ScoreWeight),
    ):
        top_k = support not in ("sampled", "full")
        if top_k != (tail is not None):
            continue
        number = next(place)
        turn = range(len(ROWS_OF_DIVERGENCES)) if tail == "renormalise_teacher" else (0, 5, 10)
        for step in turn:
            row = ROWS_OF_DIVERGENCES[(number + step) % len(ROWS_OF_DIVERGENCES)]
            chosen: dict[str, Any] = {
                **row,
                "estimator": estimator,
                "support": support,
                "horizon": horizon,
                "monitor": False,
                **ON_POLICY[estimator][(number + step) % len(ON_POLICY[estimator])],
            }
            chosen |= {"tail": tail} if tail else {}
            chosen |= {"score_weight": weight} if weight != "exact" else {}
            chosen |= {"k": 1 if support == "union" else 2} if tail else {}
            chosen |= {} if target == "one" else {"target": target}
            views = {
                name: {"weights": f"teacher:{name}", "coefficient": c}
                for name, c in COEFFICIENTS[target].items()
            }
            try:
                yield make_plan(**chosen, views=views), row, target
            except ObjectiveError:
                continue


ACCEPTED = list(combinations())


def identity(case: tuple[Plan, dict[str, Any], str]) -> str:
    plan, row, target = case
    tail = plan.tail if plan.k else "-"
    return f"{plan.estimator}-{plan.support}-{tail}-{target}-{plan.horizon}-{plan.score_weight}-{label(row)}"


def tables(names: str = "pab") -> list[Tensor]:
    return [random_logits(len(PREFIXES), 80 + ord(name), WORDS) for name in names]


def support_ids(plan: Plan, table: Tensor, teacher: Tensor) -> Tensor:
    """int64 [prefixes, K], −1 where there is none."""
    own, other = table.topk(plan.k).indices, teacher.topk(plan.k).indices
    if plan.support == "union":
        return torch.cat([other, torch.where(own == other, -1, own)], dim=1)
    return other if plan.support == "teacher_topk" else own


def gradient_of(plan: Plan, table: Tensor, teachers: dict[str, Tensor]) -> Tensor:
    """Its expectation over every sequence, from the loss itself."""
    leaf = table.clone().requires_grad_()
    loss_of(plan, leaf[ROWS], batch_of(plan, table, teachers), teachers).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def batch_of(plan: Plan, table: Tensor, teachers: dict[str, Tensor]) -> TokenBatch:
    """Every sequence, weighed by its probability."""
    log_p = table.log_softmax(-1)
    picked = [torch.tensor([log_p[PREFIXES.index(s[:t]), s[t]] for t in range(len(s))]) for s in SEQUENCES]
    lengths = torch.tensor([len(s) for s in SEQUENCES])
    sampled = torch.tensor([token for s in SEQUENCES for token in s])
    views = {}
    for name in plan.views:
        log_q = teachers[name].log_softmax(-1)
        answers: dict[str, Tensor] = {"sampled": log_q[ROWS, sampled]}
        if plan.k:
            ids = support_ids(plan, table, teachers[name])
            answers["support_ids"] = ids[ROWS]
            answers["support_logprobs"] = log_q.gather(1, ids.clamp(min=0))[ROWS]
        views[name] = ViewTensors(**answers)
    return TokenBatch(
        sampled_ids=sampled,
        behaviour_logprobs=torch.cat(picked),
        mask=torch.ones(len(ROWS), dtype=torch.bool),
        weight=torch.cat([p.sum().exp().expand(len(p)) for p in picked]),
        views={} if plan.in_process else views,
        sequence_lengths=lengths,
    )


def loss_of(plan: Plan, hidden: Tensor, batch: TokenBatch, teachers: dict[str, Tensor]) -> Tensor:
    in_process: dict[str, Any] = {}
    if plan.in_process:
        in_process["teacher_hidden"] = {name: teachers[name][ROWS] for name in plan.views}
        in_process["teacher_head"] = {name: Head(HEAD) for name in plan.views}
    return objective_loss(hidden, HEAD, None, batch, plan, chunk_rows=5, **in_process).loss


# The definitions. A loss at one prefix, of the student's p and the views' q, each [V].


def local_loss(
    plan: Plan, row: dict[str, Any], p: Tensor, qs: dict[str, Tensor], ids: dict[str, Tensor]
) -> Tensor:
    coefficients = dict(plan.views)
    if len(coefficients) == 1:
        (name,) = coefficients
        return divergence(plan, row, p, qs[name], ids[name])
    if plan.target == "losses":
        parts = [c * divergence(plan, row, p, qs[name], ids[name]) for name, c in coefficients.items()]
        return torch.stack(parts).sum()
    at = next(iter(ids.values()))
    if plan.target == "mixture":
        mixed = torch.stack([c * qs[name] for name, c in coefficients.items()]).sum(dim=0)
        return divergence(plan, row, p, mixed, at)
    if plan.target == "log_linear":
        seen = {name: seen_through(plan, q, at) for name, q in qs.items()}
        raised = (
            torch.stack([c * seen[name].log() for name, c in coefficients.items()]).sum(dim=0).softmax(-1)
        )
        return share(row, seen_through(plan, p, at), raised).sum()
    raise KeyError(f"no definition of target {plan.target!r}")


def seen_through(plan: Plan, x: Tensor, ids: Tensor) -> Tensor:
    """A distribution as support and tail see it."""
    if plan.support in ("sampled", "full"):
        return x
    kept = x[ids[ids >= 0]]
    if plan.tail == "renormalise":
        return kept / kept.sum()
    if plan.tail == "bucket":
        return torch.cat([kept, 1 - kept.sum(dim=0, keepdim=True)])
    if plan.tail in ("raw", "stop_gradient", "stop_gradient_mean", "renormalise_teacher"):
        return kept
    raise KeyError(f"no definition of support {plan.support!r} with tail {plan.tail!r}")


def divergence(plan: Plan, row: dict[str, Any], p: Tensor, q: Tensor, ids: Tensor) -> Tensor:
    """What the settings name. A bare sum over a support is that of measures, D_f + f′(1)·(Σp − Σq)."""
    a, b = seen_through(plan, p, ids), seen_through(plan, q, ids)
    if plan.k and plan.tail == "renormalise_teacher":
        return share(row, a, b / b.sum()).sum()
    value = share(row, a, b).sum()
    if plan.k and plan.tail in ("raw", "stop_gradient", "stop_gradient_mean"):
        slope = {"kl_student_teacher": -1.0, "kl_teacher_student": 1.0}.get(plan.divergence, 0.0)
        value = value + slope * (a.sum() - b.sum())
    return value / a.sum().detach() if plan.k and plan.tail == "stop_gradient_mean" else value


def named_gradient(plan: Plan, row: dict[str, Any], table: Tensor, teachers: dict[str, Tensor]) -> Tensor:
    """∇ of the expected loss at each prefix, and with a horizon of 1 of the next one's by the way there."""
    qs = {name: teacher.softmax(-1) for name, teacher in teachers.items() if name in plan.views}
    ids = {name: support_ids(plan, table, teachers[name]) if plan.k else table.argsort() for name in qs}
    leaf = table.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for place, prefix in enumerate(PREFIXES):
        arrival = leaf[0].softmax(-1)[prefix[0]] if prefix else torch.ones((), dtype=torch.float64)
        here = {name: q[place] for name, q in qs.items()}
        loss = local_loss(plan, row, leaf[place].softmax(-1), here, {n: i[place] for n, i in ids.items()})
        total = total + (arrival.detach() if plan.horizon == 0 else arrival) * loss
    total.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("case", ACCEPTED, ids=identity)
def test_an_accepted_combination_has_the_gradient_that_it_names_or_warns(
    case: tuple[Plan, dict[str, Any], str],
) -> None:
    plan, row, _ = case
    table, first, second = tables()
    teachers = {"a": first, "b": second}
    found = gradient_of(plan, table, teachers)
    right = torch.allclose(found, named_gradient(plan, row, table, teachers), rtol=1e-7, atol=1e-9)
    warned = any(phrase in warning for phrase in BIASED for warning in plan.warnings)
    assert right != warned, plan.warnings


def test_nothing_is_left_out() -> None:
    """Every value of every type occurs among the accepted, with every divergence."""
    kinds: dict[str, set[Any]] = {
        "estimator": set(get_args(Estimator)),
        "support": set(get_args(Support)),
        "divergence": set(get_args(Divergence)),
        "score_weight": set(get_args(ScoreWeight)),
        "target": set(get_args(Target)),
    }
    for field, values in kinds.items():
        assert {getattr(plan, field) for plan, _, _ in ACCEPTED} >= values, field
    tails = {(plan.support, plan.tail) for plan, _, _ in ACCEPTED if plan.k}
    assert tails == set(itertools.product(("teacher_topk", "student_topk", "union"), get_args(Tail)))
    named = {row["divergence"] for row in ROWS_OF_DIVERGENCES}
    assert named == set(get_args(Divergence))


def test_the_wrong_variants_are_among_them_and_warn() -> None:
    """Raw sums of a KL, and weights that leave out how the divergence moves."""
    wrong = [plan for plan, _, _ in ACCEPTED if any(p in w for p in BIASED for w in plan.warnings)]
    assert {(plan.tail, plan.score_weight) for plan in wrong if plan.k} == {("raw", "exact")}
    assert {plan.score_weight for plan in wrong if not plan.k} == {"stopped"}


def test_pairs_of_responses_are_accepted_in_one_combination_alone() -> None:
    """Their own proofs, of the gradient and of where it rests, are in test_objective_preference.py."""
    accepted = []
    for chosen in itertools.product(
        get_args(Estimator),
        get_args(Support),
        (None, *get_args(Tail)),
        (None, *get_args(Target)),
        (0, 1, "response"),
        get_args(Mix),
        get_args(Normalisation),
        (None, *get_args(Divergence)),
    ):
        names = ("estimator", "support", "tail", "target", "horizon", "mix", "normalisation", "divergence")
        row = {name: value for name, value in zip(names, chosen, strict=True) if value is not None}
        view = {"weights": "teacher:a", "context": {"user": "{prompt} {solution}"}}
        try:
            accepted.append((make_plan(**row, preference={}, views={"a": view}), chosen))
        except ObjectiveError:
            continue
    ((plan, chosen),) = accepted
    assert chosen == ("score_function", "sampled", None, None, 0, "replace", "sequence_mean", None)
    assert plan.warnings == ()


def test_beside_audited_chunks_every_combination_distils_the_other_positions_as_it_did() -> None:
    """Chunks of one token have the gradient of −π̂ · log p(y), whatever the others have."""
    audit = AuditSettings(teacher="writer", chunk_tokens=1, continuations=3, prior=1.0)
    table, first, second = tables()
    teachers, p = {"a": first, "b": second}, table.softmax(-1)[ROWS]
    chosen = torch.arange(len(ROWS)) % 3 == 0
    agreement = torch.where(chosen, torch.linspace(0, 1, len(ROWS)), torch.nan)
    anchor = torch.where(chosen, torch.arange(len(ROWS)), -1)
    seen = set()
    for plan, _, target in ACCEPTED:
        if plan.horizon != 0 or not isinstance(plan.correction, NoCorrection):
            continue  # refused beside an audit
        batch, rows = batch_of(plan, table, teachers), []
        for each in (plan, replace(plan, mix="route", audit=audit)):
            leaf = table[ROWS].requires_grad_()
            there = replace(batch, audit_anchor=anchor, agreement=agreement)
            loss_of(each, leaf, there, teachers).backward()  # type: ignore[no-untyped-call]
            rows.append(leaf.grad)
        likely = p.gather(1, batch.sampled_ids[:, None])[:, 0]
        weight = batch.weight * (3 * agreement + likely) / 4
        slope = -weight[:, None] * (torch.eye(WORDS)[batch.sampled_ids] - p)
        expected = torch.where(chosen[:, None], slope, rows[0])
        torch.testing.assert_close(rows[1], expected, rtol=1e-6, atol=1e-9)
        seen.add((plan.estimator, plan.support, target))
    assert seen == {(plan.estimator, plan.support, target) for plan, _, target in ACCEPTED}


@pytest.mark.parametrize("ratio", get_args(Ratio))
def test_a_factor_on_the_reward_pulls_where_the_reward_says_nothing_and_warns_unless_gated(
    ratio: str,
) -> None:
    """Reward 1 or −1 by a coin: what is right does not move. The gate leaves about half of the pull."""
    names = ("a", "b") if ratio == "first_over_second" else ("a",)
    views = {name: {"weights": f"teacher:{name}"} for name in names}
    logits = random_logits(1, 91)[0]
    log_qs = {name: random_logits(1, 92 + i)[0].log_softmax(-1) for i, name in enumerate(names)}
    pulls = {}
    for gate in get_args(RatioGate):
        settings: dict[str, Any] = {"mix": "multiply", "ratio": ratio, "ratio_gate": gate, "ratio_clip": 0.5}
        plan = make_plan(**settings, views=views)
        gradients = [
            expected_gradient(plan, logits, logits.log_softmax(-1), log_qs, torch.full((V,), reward))
            for reward in (1.0, -1.0)
        ]
        pulls[gate] = float(sum(gradients).norm() / 2)  # type: ignore[union-attr]
        assert any("pulls on tokens" in warning for warning in plan.warnings) == (gate == "none")
    alone = make_plan(mix="add", distill_coefficient=0.0)
    coin = [
        expected_gradient(alone, logits, logits.log_softmax(-1), {}, torch.full((V,), reward))
        for reward in (1.0, -1.0)
    ]
    assert float(sum(coin).norm()) < 1e-12  # type: ignore[union-attr]
    assert pulls["none"] > 1e-2
    assert pulls["rewarded"] < 0.75 * pulls["none"]
