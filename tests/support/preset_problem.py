"""A random tabular problem on which presets are compared with formulas written out in plain torch.

Two responses, three views, float64; the hidden rows are the logits and the head is the identity. Nothing here
but `trained` and `plan_of` uses the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from student_trainer.objective import presets
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.loss import TokenBatch, ViewTensors, objective_loss
from student_trainer.objective.settings import ObjectiveSettings
from student_trainer.objective.weights import position_weights, token_mask
from support.tabular import V, random_logits

LENGTHS = torch.tensor([12, 18])
T = int(LENGTHS.sum())
K = 4
LOGITS = random_logits(T, 1)
LOG_P = LOGITS.log_softmax(-1)
FIRST, SECOND, THIRD = (random_logits(T, seed).log_softmax(-1) for seed in (2, 3, 6))  # the views, in order
SAMPLED = torch.randint(V, (T,), generator=torch.Generator().manual_seed(4))
IN_FIRST = torch.arange(T) < 12  # which positions belong to the first response
REWARD = torch.where(IN_FIRST, 1.0, -0.5).double()  # the advantage
PAID = torch.where(IN_FIRST, 1.0, 0.0).double()  # the reward itself
MARKED = IN_FIRST
SHARES = torch.where(IN_FIRST, 0.7, 0.2).double()  # of the first of two views; the other has the rest
REQUIRED: dict[str, dict[str, Any]] = {"tokens.skip_ids": {"tokens": {"skip_ids": [3, 5]}}}

Loss: TypeAlias = Callable[[Tensor], Tensor]  # log p [T, V] → the whole loss


def at_sampled(log_x: Tensor) -> Tensor:
    """[T], of the sampled token."""
    return log_x.gather(1, SAMPLED[:, None])[:, 0]


LOG_MU = at_sampled(LOG_P) + 0.8 * random_logits(1, 5, T)[0]
LOG_OLD = at_sampled(LOG_P) + 0.5 * random_logits(1, 7, T)[0]


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


def make_batch(plan: Plan) -> TokenBatch:
    """What a trainer would collect for this plan."""
    log_qs = dict(zip(plan.views, (FIRST, SECOND, THIRD), strict=False))
    mask = token_mask(plan.tokens, LENGTHS)
    views = {}
    for view, log_q in log_qs.items():
        ids = (log_q if plan.support == "teacher_topk" else LOG_P).topk(K).indices
        entropy = -(log_q.exp() * log_q).sum(-1)
        views[view] = ViewTensors(at_sampled(log_q), ids, log_q.gather(1, ids), entropy)
    weight = position_weights(
        mask, LENGTHS, plan.normalisation, total_tokens=int(mask.sum()), total_sequences=len(LENGTHS)
    )
    return TokenBatch(
        sampled_ids=SAMPLED,
        behaviour_logprobs=LOG_MU,
        mask=mask,
        weight=weight.double(),
        views=views,
        reward_advantage=REWARD,
        sequence_lengths=LENGTHS,
        marked=MARKED,
        old_logprobs=LOG_OLD,
        rewards=PAID,
        view_factors=dict(zip(plan.weight_fields, (SHARES, 1 - SHARES), strict=False)),
    )


def trained(plan: Plan) -> tuple[Tensor, Tensor]:
    """The trainer's loss and its gradient by the logits."""
    leaf = LOGITS.clone().requires_grad_()
    out = objective_loss(
        leaf,
        torch.eye(V, dtype=torch.float64),
        None,
        make_batch(plan),
        plan,
        distill_open=None if plan.gate is None else True,
    )
    out.loss.backward()
    assert leaf.grad is not None
    return out.loss.detach(), leaf.grad


def written_out(formula: Loss) -> tuple[Tensor, Tensor]:
    """A formula's loss and its gradient by the logits, by autograd."""
    leaf = LOGITS.clone().requires_grad_()
    loss = formula(leaf.log_softmax(-1))
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad
