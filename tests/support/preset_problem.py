"""What the formula of a preset is a function of, and a random tabular one of these.

Two responses, three views, float64; the hidden rows are the logits and the head is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from student_trainer.objective import presets
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.consistency import consistency_loss
from student_trainer.objective.loss import Head, TokenBatch, ViewTensors, objective_loss
from student_trainer.objective.settings import ObjectiveSettings
from student_trainer.objective.weights import position_weights, token_mask
from support.tabular import V, random_logits

K = 4
SKIPPED = [3, 5]  # ids
CHUNK_TOKENS, CONTINUATIONS = 2, 3
REQUIRED: dict[str, dict[str, Any]] = {
    "tokens.skip_ids": {"tokens": {"skip_ids": SKIPPED}},
    "audit.teacher": {
        "audit": {
            "teacher": "writer", "chunks": 2, "chunk_tokens": CHUNK_TOKENS, "continuations": CONTINUATIONS
        }
    },
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """T positions of some responses, one after the other; log-probabilities over the whole vocabulary.

    `student` is what the student thinks as the loss is taken; formulas are differentiated elsewhere.
    """

    student: Tensor  # [T, V]
    views: tuple[Tensor, ...]  # [T, V] each
    sampled: Tensor  # int64 [T]
    behaviour: Tensor  # [T], log μ(y)
    old: Tensor  # [T], log p_old(y)
    lengths: Tensor  # int64 [B]
    advantage: Tensor  # [T], the reward's, relative to its group
    paid: Tensor  # [T], the reward itself
    marked: Tensor  # bool [T]
    factors: tuple[Tensor, ...] = ()  # [T], of views that examples weigh
    k: int = K
    groups: Tensor | None = None  # int64 [B], of the responses; None: all of one
    guided: Tensor | None = None  # bool [B], sampled under a context; None: the first response alone
    under: Tensor | None = None  # [T, V], the student under an auxiliary context; differentiable, too
    chunks: tuple[tuple[int, float], ...] = ()  # first position of each audited chunk, and its agreement

    def of(self, log_x: Tensor) -> Tensor:
        """[T], at the sampled token."""
        return log_x.gather(1, self.sampled[:, None])[:, 0]

    @property
    def first(self) -> Tensor:
        return self.views[0]

    @property
    def second(self) -> Tensor:
        return self.views[1]

    @property
    def pairing(self) -> tuple[Tensor, Tensor]:
        """Group of every response, and whether it is guided, [B]."""
        places = torch.arange(len(self.lengths))
        groups = places * 0 if self.groups is None else self.groups
        return groups, places == 0 if self.guided is None else self.guided

    def top(self, log_x: Tensor) -> Tensor:
        """The k most probable ids."""
        return log_x.topk(self.k).indices


Formula: TypeAlias = Callable[[Problem, Tensor], Tensor]  # log p [T, V], differentiable → the whole loss

LENGTHS = torch.tensor([12, 18])
T = int(LENGTHS.sum())
LOGITS = random_logits(T, 1)
UNDER = random_logits(T, 8)  # of the student under an auxiliary context


def random_problem() -> Problem:
    """The tabular one."""
    student = LOGITS.log_softmax(-1)
    sampled = torch.randint(V, (T,), generator=torch.Generator().manual_seed(4))
    own = student.gather(1, sampled[:, None])[:, 0]
    in_first = torch.arange(T) < LENGTHS[0]
    shares = torch.where(in_first, 0.7, 0.2).double()
    return Problem(
        student=student,
        views=tuple(random_logits(T, seed).log_softmax(-1) for seed in (2, 3, 6)),
        sampled=sampled,
        behaviour=own + 0.8 * random_logits(1, 5, T)[0],
        old=own + 1.5 * random_logits(1, 7, T)[0],
        lengths=LENGTHS,
        advantage=torch.where(in_first, 1.0, -0.5).double(),
        paid=torch.where(in_first, 1.0, 0.0).double(),
        marked=in_first,
        factors=(shares, 1 - shares),
        chunks=((1, 0.8), (6, 0.1), (15, 0.5), (28, 1.0)),
    )


def required(name: str) -> dict[str, Any]:
    """The keys that a preset wants from its user, with values for this problem."""
    return {key: value for want in presets.load(name).requires for key, value in REQUIRED[want].items()}


def plan_of(name: str, **overrides: Any) -> Plan:
    """The preset's plan, its support cut down to K ids."""
    row: dict[str, Any] = {"preset": name, **required(name), **overrides}
    plan = compile_plan(ObjectiveSettings.model_validate(row), student_temperature=1.0)
    if plan.k:
        plan = compile_plan(ObjectiveSettings.model_validate({**row, "k": K}), student_temperature=1.0)
    return plan


def make_batch(plan: Plan, x: Problem) -> TokenBatch:
    """What a trainer would collect for this plan."""
    mask = token_mask(plan.tokens, x.lengths, x.sampled)
    mask = mask & x.marked if plan.tokens.marked_only else mask
    sequences = sum(bool(part.any()) for part in mask.split(x.lengths.tolist()))
    views = {}
    for view, log_q in zip(plan.views, x.views, strict=False):
        ids = x.top(log_q if plan.support == "teacher_topk" else x.student)
        entropy = -(log_q.exp() * log_q).sum(-1)
        views[view] = ViewTensors(x.of(log_q), ids, log_q.gather(1, ids), entropy)
    weight = position_weights(
        mask, x.lengths, plan.normalisation, total_tokens=int(mask.sum()), total_sequences=sequences
    )
    groups, guided = x.pairing
    weight = mask / len(groups.unique()) if plan.preference is not None else weight
    anchor, agreement = torch.full((len(x.sampled),), -1), torch.full((len(x.sampled),), math.nan)
    for first, value in x.chunks:
        anchor[first : first + CHUNK_TOKENS], agreement[first : first + CHUNK_TOKENS] = first, value
    return TokenBatch(
        sampled_ids=x.sampled,
        behaviour_logprobs=x.behaviour,
        mask=mask,
        weight=weight.double(),
        views=views,
        reward_advantage=x.advantage,
        sequence_lengths=x.lengths,
        marked=x.marked,
        old_logprobs=x.old,
        rewards=x.paid,
        audit_anchor=anchor,
        agreement=agreement,
        groups=groups,
        guided=guided,
        view_factors=dict(zip(plan.weight_fields, x.factors, strict=False)),
    )


def trained(plan: Plan) -> tuple[Tensor, Tensor]:
    """The trainer's loss of the tabular problem, and its gradient by the logits, [2T, V].

    The second half are those under an auxiliary context.
    """
    leaf, under = LOGITS.clone().requires_grad_(), UNDER.clone().requires_grad_()
    head, batch = Head(torch.eye(V, dtype=torch.float64)), make_batch(plan, random_problem())
    gate = None if plan.gate is None else True
    loss = objective_loss(leaf, head.weight, None, batch, plan, distill_open=gate).loss
    if plan.auxiliary is not None:
        everywhere = replace(batch, auxiliary_index=torch.arange(T))
        loss = loss + consistency_loss(leaf, under, head, everywhere, plan).loss
    loss.backward()
    return loss.detach(), _slopes(leaf, under)


def written_out(formula: Formula) -> tuple[Tensor, Tensor]:
    """The formula's, by autograd."""
    leaf, under = LOGITS.clone().requires_grad_(), UNDER.clone().requires_grad_()
    loss = formula(replace(random_problem(), under=under.log_softmax(-1)), leaf.log_softmax(-1))
    loss.backward()
    return loss.detach(), _slopes(leaf, under)


def _slopes(leaf: Tensor, under: Tensor) -> Tensor:
    assert leaf.grad is not None
    return torch.cat([leaf.grad, torch.zeros_like(leaf) if under.grad is None else under.grad])
