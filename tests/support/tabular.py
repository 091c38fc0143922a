"""Tabular policies in float64: reference formulas, finite differences and exact expectations.

The hidden rows are the logits and the head is the identity, so that everything goes through
`objective_loss` itself. The formulas are written from the definitions and share no code with the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.loss import Head, TokenBatch, ViewTensors, objective_loss
from student_trainer.objective.settings import ObjectiveSettings

V = 9
TAILS = ["raw", "stop_gradient", "renormalise", "bucket"]
SUPPORTS = ["teacher_topk", "student_topk", "union"]
DIVERGENCES: list[dict[str, Any]] = [
    {"divergence": "kl_student_teacher"},
    {"divergence": "kl_teacher_student"},
    {"divergence": "jsd", "beta": 0.5},
    {"divergence": "jsd", "beta": 0.2},
    {"divergence": "jeffreys"},
    {"divergence": "hellinger"},
    {"divergence": "total_variation"},
    {"divergence": "chi_square_student_teacher"},
    {"divergence": "chi_square_teacher_student"},
    {"divergence": "alpha", "alpha": 0.3},
    {"divergence": "alpha", "alpha": 1.7},
]
ENDS: list[dict[str, Any]] = [
    {"divergence": "jsd", "beta": 0.0},
    {"divergence": "jsd", "beta": 1.0},
    {"divergence": "alpha", "alpha": 0.0},
    {"divergence": "alpha", "alpha": 1.0},
]
Array = np.ndarray


def label(row: Mapping[str, Any]) -> str:
    """Name of a test case."""
    return "-".join(str(value) for value in row.values())


def make_plan(teachers: tuple[str, ...] = (), **settings: Any) -> Plan:
    """The plan of these settings at temperature 1."""
    return compile_plan(
        ObjectiveSettings.model_validate(settings), student_temperature=1.0, teachers=teachers
    )


def random_logits(rows: int, seed: int, columns: int = V) -> Tensor:
    """f64 [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def log_softmax(logits: Array) -> Array:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def share(row: Mapping[str, Any], p: Tensor, q: Tensor) -> Tensor:
    """Every token's share of the divergence, for measures that need not be normalised (0·log 0 = 0)."""
    p, q = p.clamp(min=1e-300), q.clamp(min=1e-300)
    name, beta, alpha = row.get("divergence", "kl_student_teacher"), row.get("beta"), row.get("alpha")
    if (name, beta) == ("jsd", 1.0) or (name, alpha) == ("alpha", 0.0):
        name = "kl_student_teacher"
    if (name, beta) == ("jsd", 0.0) or (name, alpha) == ("alpha", 1.0):
        name = "kl_teacher_student"
    beta, alpha = 0.5 if beta is None else beta, 0.5 if alpha is None else alpha
    m = beta * q + (1 - beta) * p
    formulas: dict[str, Callable[[], Tensor]] = {
        "kl_student_teacher": lambda: p * (p / q).log(),
        "kl_teacher_student": lambda: q * (q / p).log(),
        "jsd": lambda: beta * q * (q / m).log() + (1 - beta) * p * (p / m).log(),
        "jeffreys": lambda: p * (p / q).log() + q * (q / p).log(),
        "hellinger": lambda: (p.sqrt() - q.sqrt()) ** 2 / 2,
        "total_variation": lambda: abs(p - q) / 2,
        "chi_square_student_teacher": lambda: (p - q) ** 2 / q,
        "chi_square_teacher_student": lambda: (q - p) ** 2 / p,
        # Amari's, extended to measures.
        "alpha": lambda: (q**alpha * p ** (1 - alpha) - alpha * q - (1 - alpha) * p) / (alpha * (alpha - 1)),
    }
    return formulas[name]()


def divergence_of(row: Mapping[str, Any], p: Array, q: Array) -> Array:
    """Σ over the last axis."""
    return share(row, torch.from_numpy(p), torch.from_numpy(q)).sum(-1).numpy()


def restricted(p: Array, inside: Array, tail: str) -> Array:
    """A distribution, [T, V] or [T, V + 1], as a tail sees it on the support `inside`."""
    kept = p * inside
    if tail == "renormalise":
        return kept / kept.sum(-1, keepdims=True)
    return np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1) if tail == "bucket" else kept


def named_divergence(row: Mapping[str, Any], p: Array, q: Array, inside: Array, *, tail: str) -> Array:
    """The function of full distributions whose gradient a tail claims to give, [T]."""
    ps, qs = restricted(p, inside, tail), restricted(q, inside, tail)
    value = divergence_of(row, ps, qs)
    if tail == "stop_gradient" and row["divergence"] == "kl_student_teacher":
        return value - ps.sum(-1) + qs.sum(-1)  # the divergence of unnormalised measures
    if tail == "stop_gradient" and row["divergence"] == "kl_teacher_student":
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


def inside_of(ids: Tensor) -> Array:
    """[T, V] of 0 and 1: which ids a support holds."""
    inside = np.zeros((len(ids), V))
    for row, members in enumerate(ids.tolist()):
        inside[row, [member for member in members if member >= 0]] = 1
    return inside


def scores(log_q: Tensor, ids: Tensor) -> ViewTensors:
    """A view that answers with the teacher's log-probabilities at `ids`."""
    return ViewTensors(support_ids=ids, support_logprobs=log_q.gather(1, ids.clamp(min=0)))


def pathwise_gradient(
    plan: Plan,
    logits: Tensor,
    log_qs: Tensor | Mapping[str, Tensor],
    ids: Tensor | Mapping[str, Tensor] | None,
) -> Tensor:
    """Gradient of Σ_t loss_t by the logits. One view is called "teacher"; ids None is support "full"."""
    teachers = {"teacher": log_qs} if isinstance(log_qs, Tensor) else dict(log_qs)
    leaf = logits.clone().requires_grad_()
    rows, head = len(logits), torch.eye(V, dtype=torch.float64)
    in_process: dict[str, Any] = {}
    views: dict[str, ViewTensors] = {}
    if ids is None:
        in_process = {
            "teacher_hidden": teachers["teacher"] if isinstance(log_qs, Tensor) else teachers,
            "teacher_head": Head(head)
            if isinstance(log_qs, Tensor)
            else {name: Head(head) for name in teachers},
        }
    else:
        at = dict.fromkeys(teachers, ids) if isinstance(ids, Tensor) else ids
        views = {name: scores(log_q, at[name]) for name, log_q in teachers.items()}
    batch = TokenBatch(
        sampled_ids=torch.zeros(rows, dtype=torch.int64),
        behaviour_logprobs=torch.zeros(rows, dtype=torch.float64),
        mask=torch.ones(rows, dtype=torch.bool),
        weight=torch.ones(rows, dtype=torch.float64),
        views=views,
    )
    objective_loss(leaf, head, None, batch, plan, chunk_rows=2, **in_process).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def expected_gradient(
    plan: Plan,
    logits: Tensor,
    log_mu: Tensor,
    log_qs: Mapping[str, Tensor],
    reward: Tensor | None = None,
    **batch_fields: Any,
) -> Tensor:
    """E_{y~μ} of the gradient by one row of logits, exactly: a weighted batch that holds every token once."""
    leaf = logits.clone().requires_grad_()
    batch = TokenBatch(
        sampled_ids=torch.arange(V),
        behaviour_logprobs=log_mu,
        mask=torch.ones(V, dtype=torch.bool),
        weight=log_mu.exp(),
        views={name: ViewTensors(sampled=log_q) for name, log_q in log_qs.items()},
        reward_advantage=reward,
        sequence_lengths=torch.ones(V, dtype=torch.int64),
        **batch_fields,
    )
    hidden = leaf[None].expand(V, V)
    objective_loss(hidden, torch.eye(V, dtype=torch.float64), None, batch, plan, chunk_rows=4).loss.backward()
    assert leaf.grad is not None
    return leaf.grad
