"""Every preset equals its published formula, written out here in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.tabular import V, random_logits
from torch import Tensor

from student_trainer.objective import presets
from student_trainer.objective.compile import compile_plan
from student_trainer.objective.loss import TokenBatch, ViewTensors, objective_loss
from student_trainer.objective.settings import ObjectiveSettings

LENGTHS = torch.tensor([12, 18])
T = int(LENGTHS.sum())
K = 4
LOGITS = random_logits(T, 1)
LOG_P = LOGITS.log_softmax(-1)
LOG_Q, LOG_REFERENCE = (random_logits(T, seed).log_softmax(-1) for seed in (2, 3))
SAMPLED = torch.randint(V, (T,), generator=torch.Generator().manual_seed(4))
REWARD = torch.where(torch.arange(T) < 12, 1.0, -0.5).double()


def at_sampled(values: Tensor) -> Tensor:
    return values.gather(1, SAMPLED[:, None])[:, 0]


LOG_MU = at_sampled(LOG_P) + 0.8 * random_logits(1, 5, T)[0]
LOG_U = at_sampled(LOG_Q) - LOG_MU
Loss = Callable[[Tensor], Tensor]


def importance(advantage: Tensor) -> Loss:
    return lambda log_p: -(at_sampled(log_p) - LOG_MU).exp() * advantage


def ppo(advantage: Tensor, log_old: Tensor, dual: float) -> Loss:
    def loss(log_p: Tensor) -> Tensor:
        ratio = (at_sampled(log_p) - log_old).exp()
        clipped = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
        return torch.where(advantage < 0, torch.minimum(clipped, -dual * advantage), clipped)

    return loss


def on_policy_ppo(advantage: Tensor) -> Loss:
    """One update per batch: p_old is the student as it is, and what is left of μ is the capped weight."""
    log_old = at_sampled(LOG_P)
    weight = (log_old - LOG_MU).exp().clamp(max=5.0)
    return lambda log_p: weight * ppo(advantage, log_old, 3.0)(log_p)


def gkd(log_p: Tensor) -> Tensor:
    ids = LOG_Q.topk(K).indices
    p, q = (x.gather(1, ids).exp() for x in (log_p, LOG_Q))
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=1) for x in (p, q))
    m = (p + q) / 2
    return 0.5 * (q * (q / m).log() + p * (p / m).log()).sum(-1)


def many_faces(log_p: Tensor) -> Tensor:
    s, t = (x.gather(1, LOG_P.topk(K).indices) for x in (log_p, LOG_Q))
    return -(s.exp() * (t - s.detach())).sum(-1)


def ta_opd(log_p: Tensor) -> Tensor:
    s, t = (x.gather(1, LOG_P.topk(K).indices) for x in (log_p, LOG_Q))
    score = (s.exp() * (s - t)).sum(-1).detach() * t.exp().sum(-1)
    kept = torch.zeros(T, dtype=torch.float64)
    kept[score.topk(math.ceil(0.05 * T)).indices] = 1
    return kept * -(s.exp() * (t - s.detach())).sum(-1)


def iw_weight() -> Tensor:
    rows = []
    for sizes in LOG_U.abs().split(LENGTHS.tolist()):
        rows.append(1 + 0.5 * (1 - sizes.cumsum(0) / sizes.sum()))
    return torch.cat(rows)


EXTRAPOLATED = 1.25 * at_sampled(LOG_Q) - 0.25 * at_sampled(LOG_REFERENCE) - LOG_MU
REFERENCES: dict[str, Loss] = {
    "thinking-machines": importance(LOG_U),
    "gkd": gkd,
    "many-faces": many_faces,
    "grpo": ppo(REWARD, LOG_MU, math.inf),
    "opd-plus": importance(0.5 * ((1 + LOG_U.exp()) / 2).log()),
    "g-opd": on_policy_ppo(LOG_U),
    "exopd": on_policy_ppo(EXTRAPOLATED),
    "ta-opd": ta_opd,
    "iw-opd": importance(iw_weight() * LOG_U),
}


@pytest.mark.parametrize("name", presets.names())
def test_preset_is_its_formula(name: str) -> None:
    row = {"preset": name}
    plan = compile_plan(ObjectiveSettings.model_validate(row), student_temperature=1.0)
    if plan.k:
        plan = compile_plan(ObjectiveSettings.model_validate({**row, "k": K}), student_temperature=1.0)
    log_qs = dict(zip(plan.views, (LOG_Q, LOG_REFERENCE), strict=False))
    ids = (LOG_Q if plan.support == "teacher_topk" else LOG_P).topk(K).indices
    batch = TokenBatch(
        sampled_ids=SAMPLED,
        behaviour_logprobs=LOG_MU,
        mask=torch.ones(T, dtype=torch.bool),
        weight=torch.full((T,), 1 / T, dtype=torch.float64),
        views={
            view: ViewTensors(at_sampled(log_q), ids, log_q.gather(1, ids)) for view, log_q in log_qs.items()
        },
        reward_advantage=REWARD,
        sequence_lengths=LENGTHS,
    )
    leaf, plain = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    objective_loss(leaf, torch.eye(V, dtype=torch.float64), None, batch, plan).loss.backward()
    REFERENCES[name](plain.log_softmax(-1)).mean().backward()
    assert plain.grad is not None
    assert plain.grad.abs().max() > 1e-4
    torch.testing.assert_close(leaf.grad, plain.grad)
