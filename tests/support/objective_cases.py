"""Random problems for the training loss, and the plain autograd loss over full logits that it must equal."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from student_trainer.objective import loss as loss_module
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.loss import Head, TokenBatch, ViewTensors, objective_loss
from student_trainer.objective.settings import ObjectiveSettings
from support.tabular import DIVERGENCES, share

BASIC: list[dict[str, Any]] = [*DIVERGENCES[:3], {"divergence": "jsd", "beta": 0.1}]
OTHERS = DIVERGENCES[4:]
TAILS = ["raw", "stop_gradient", "stop_gradient_mean", "renormalise", "bucket"]
SUPPORTS = ["teacher_topk", "student_topk", "union"]
NONE: dict[str, Any] = {"kind": "none"}
CAPPED: dict[str, Any] = {"kind": "importance", "cap": 1.3}
PPO: dict[str, Any] = {"kind": "ppo", "clip": 0.2, "dual_clip": 1.5}


def sampled_rows() -> list[dict[str, Any]]:
    plain = [
        {**row, "correction": correction, "mix": mix}
        for row in BASIC
        for correction in (NONE, CAPPED, PPO)
        for mix in ("replace", "add")
    ]
    others = [{**row, "correction": CAPPED} for row in OTHERS]
    stopped = [{**row, "score_weight": "stopped"} for row in DIVERGENCES[1:]]
    return [
        *plain,
        *others,
        *stopped,
        {"mix": "route"},
        {"mix": "add", "distill_coefficient": 0.0, "correction": PPO},
    ]


def pathwise_rows() -> list[dict[str, Any]]:
    truncated = [
        {**row, "support": support, "tail": tail, "correction": correction}
        for row in BASIC
        for support in SUPPORTS
        for tail in TAILS
        for correction in (NONE, CAPPED)
    ]
    others = [
        {**row, "support": SUPPORTS[(i + j) % 3], "tail": tail}
        for i, row in enumerate(OTHERS)
        for j, tail in enumerate(TAILS)
    ]
    clipped = [
        {**row, **where, "entry_clip": 0.1}
        for row in DIVERGENCES
        for where in (
            {"support": "full"},
            {"support": "teacher_topk", "tail": "raw"},
            {"support": "union", "tail": "bucket"},
        )
    ]
    full = [
        {**row, "support": "full", "correction": correction, "mix": mix}
        for row in BASIC
        for correction, mix in ((NONE, "replace"), (CAPPED, "replace"), (PPO, "add"), (NONE, "route"))
    ]
    full += [{**row, "support": "full"} for row in OTHERS]
    mixed = [
        {"support": "teacher_topk", "tail": tail, "mix": mix} for tail in TAILS for mix in ("add", "route")
    ]
    return [{"estimator": "pathwise", **row} for row in (*truncated, *others, *full, *clipped, *mixed)]


def view_rows() -> list[dict[str, Any]]:
    """Targets of several views."""

    def views(*coefficients: float, clip: float | None = None) -> dict[str, Any]:
        return {
            name: {
                "weights": f"teacher:{name}",
                "coefficient": c,
                **({"clip": clip} if clip and name != "a" else {}),
            }
            for name, c in zip("abc", coefficients, strict=False)
        }

    far: dict[str, Any] = {"views": views(1.25, -0.4, 0.3)}
    mixed: dict[str, Any] = {"views": views(0.3, 0.5, 0.2), "target": "mixture"}
    each: dict[str, Any] = {"views": views(1.0, 0.5, 2.0), "target": "losses"}
    clipped: dict[str, Any] = {"views": views(0.0, 1.0, clip=0.7)}
    sampled = [
        {**far, "correction": PPO},
        clipped,
        *({**row, **target} for row in BASIC for target in (mixed, each)),
    ]
    pathwise = [
        {**row, **far, "support": "student_topk", "tail": tail}
        for row in BASIC
        for tail in ("renormalise", "bucket")
    ]
    pathwise += [
        {**row, **mixed, "support": "student_topk", "tail": tail}
        for row, tail in zip([*BASIC, BASIC[0]], TAILS, strict=True)
    ]
    pathwise += [
        {**row, **each, "support": SUPPORTS[i % 3], "tail": TAILS[i % 5]} for i, row in enumerate(DIVERGENCES)
    ]
    pathwise += [{**row, **target, "support": "full"} for row in BASIC for target in (far, mixed, each)]
    pathwise += [
        {**clipped, "support": "student_topk", "tail": "bucket"},
        {"views": views(0.8), "support": "teacher_topk", "tail": "bucket"},
        {"views": views(0.8), "support": "full", "entry_clip": 0.1, "correction": CAPPED},
        {**each, "support": "full", "mix": "route"},
        {**each, "support": "union", "tail": "bucket", "mix": "add"},
    ]
    return [*sampled, *({"estimator": "pathwise", **row} for row in pathwise)]


def weight_rows() -> list[dict[str, Any]]:
    """Factors of a position's loss."""
    top_k: dict[str, Any] = {"estimator": "pathwise", "support": "union", "tail": "bucket"}
    full: dict[str, Any] = {"estimator": "pathwise", "support": "full"}
    both = {"surprise": True, "teacher_entropy": True}
    return [
        {"weights": {"rollout_cap": 1.2}},
        {"weights": {"rollout_cap": 1.2}, "correction": PPO, "mix": "add"},
        {**full, "weights": {"surprise": True, "rollout_cap": 1.2}, "divergence": "jsd"},
        {**full, "weights": {"rollout_cap": 1.2}, "correction": CAPPED, "mix": "add"},
        *({**top_k, "tail": tail, "weights": both} for tail in TAILS),
        {**top_k, "weights": {**both, "rollout_cap": 1.2}, "mix": "add"},
    ]


ROWS = sampled_rows() + pathwise_rows() + view_rows() + weight_rows()


FIXED = {
    "T": 7, "H": 3, "V": 11, "K": 4, "chunk": 3, "tile": 4,
    "temperature": 1.3, "softcap": 3.0, "scale": 0.8, "bias": True, "kept": 0.8,
}  # fmt: skip


@dataclass
class Case:
    """One random problem; shapes: T positions, H hidden, V vocabulary, K ids."""

    plan: Plan
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    batch: TokenBatch
    teacher_hidden: dict[str, Tensor]
    teacher_head: dict[str, Head]
    chunk_rows: int
    tile_columns: int

    def fused(self) -> tuple[Tensor, dict[str, float], list[Tensor | None]]:
        leaves = self.leaves()
        with patch.object(loss_module, "CPU_TILE_COLUMNS", self.tile_columns):
            out = objective_loss(
                *leaves,
                self.batch,
                self.plan,
                softcap=self.softcap,
                scale=self.scale,
                teacher_hidden=self.teacher_hidden or None,
                teacher_head=self.teacher_head or None,
                chunk_rows=self.chunk_rows,
            )
        (1.7 * out.loss).backward()
        return out.loss.detach(), out.metrics, [None if leaf is None else leaf.grad for leaf in leaves]

    def plain(self) -> tuple[Tensor, list[Tensor | None]]:
        leaves = self.leaves()
        hidden, weight, bias = leaves
        log_p = head_logprobs(Head(weight, bias, self.softcap, self.scale), hidden, self.plan.temperature)
        log_q = {
            name: head_logprobs(self.teacher_head[name], rows, self.plan.temperature)
            for name, rows in self.teacher_hidden.items()
        }
        rows = [
            self.batch.weight[t]
            * plain_row(self.plan, self.batch, t, log_p[t], {n: q[t] for n, q in log_q.items()} or None)
            for t in range(len(hidden))
            if self.batch.mask[t]
        ]
        loss = torch.stack(rows).sum() if rows else (hidden * 0).sum()
        (1.7 * loss).backward()
        return loss.detach(), [
            None if leaf is None else (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
            for leaf in leaves
        ]

    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        made = [
            None if x is None else x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)
        ]
        return made[0], made[1], made[2]  # type: ignore[return-value]


def head_logprobs(head: Head, hidden: Tensor, temperature: float) -> Tensor:
    logits = head.scale * (hidden @ head.weight.t() + (0 if head.bias is None else head.bias))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / temperature).log_softmax(-1)


def plain_row(
    plan: Plan, batch: TokenBatch, t: int, log_p: Tensor, log_q: dict[str, Tensor] | None
) -> Tensor:
    y = batch.sampled_ids[t]
    log_ratio = log_p[y] - batch.behaviour_logprobs[t]
    rollout = 1.0
    if plan.weights.rollout_cap is not None:
        rollout = log_ratio.detach().exp().clamp(max=plan.weights.rollout_cap)
        log_ratio = log_p[y] - log_p[y].detach()
    reward = batch.reward_advantage[t] if plan.needs_reward and batch.reward_advantage is not None else None
    by_reward = plan.mix == "route" and reward is not None and bool(reward != 0)
    distill = 0.0 if by_reward or not plan.needs_teacher else plan.distill_coefficient
    paid = 0.0 if reward is None else plan.reward_coefficient * reward
    if plan.estimator == "score_function":
        advantage = paid
        scored = [batch.views[name].sampled[t] for name in plan.views]  # type: ignore[index]
        for factor, log_q_y in weighed(plan, scored) if distill else []:
            u = (log_q_y - batch.behaviour_logprobs[t]).exp()
            advantage = advantage + distill * factor * sampled_advantage(plan, u)
        return rollout * plain_surrogate(plan, log_p[y], log_ratio, advantage)
    value = torch.zeros_like(log_p[y])
    if distill:
        value = distill * plain_divergence(plan, batch, t, log_p, log_q)
        if plan.correction.kind == "importance":
            value = value * log_ratio.detach().exp().clamp(max=plan.correction.cap)
        if plan.weights.surprise:
            value = value * (1 - log_p[y].detach().exp())
    value = rollout * value
    if reward is None:
        return value
    return value + rollout * plain_surrogate(plan, log_p[y], log_ratio, paid)


def sampled_advantage(plan: Plan, u: Tensor) -> Tensor:
    """w_f(u) − w_f(1) with w_f = −f + u·f′ from f itself, whose derivative autograd takes."""

    def cost(ratio: Tensor) -> Tensor:
        return share(row_of(plan), torch.ones_like(ratio), ratio)

    def weight(ratio: Tensor) -> Tensor:
        leaf = ratio.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(cost(leaf).sum(), leaf)
        return -cost(ratio) + ratio * slope

    return -cost(u) if plan.score_weight == "stopped" else weight(u) - weight(torch.ones_like(u))


def row_of(plan: Plan) -> dict[str, Any]:
    """The divergence of a plan, as `share` wants it."""
    return {"divergence": plan.divergence, "beta": plan.beta, "alpha": plan.alpha}


def plain_surrogate(plan: Plan, log_p: Tensor, log_ratio: Tensor, advantage: Any) -> Tensor:
    ratio = log_ratio.exp()
    if plan.correction.kind == "none":
        return -advantage * log_p
    if plan.correction.kind == "importance":
        kept = ratio.detach().clamp(max=plan.correction.cap)
        return -(kept / ratio.detach()) * ratio * advantage
    clipped = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
    return torch.minimum(clipped, -1.5 * torch.as_tensor(advantage)) if advantage < 0 else clipped


def weighed(plan: Plan, logprobs: list[Tensor]) -> list[tuple[float, Tensor]]:
    """(factor, target) of every loss; a log-linear target is left as it is, without its constant."""
    coefficients = list(plan.views.values())
    if plan.target == "losses":
        return list(zip(coefficients, logprobs, strict=True))
    if plan.target == "mixture":
        total = sum(c * q.exp() for c, q in zip(coefficients, logprobs, strict=True))
        return [(1.0, torch.as_tensor(total).log())]
    clips = [plan.view_clips.get(name, math.inf) for name in plan.views]
    apart = [(q - logprobs[0]).clamp(-c, c) for q, c in zip(logprobs, clips, strict=True)]
    total = sum(c * x for c, x in zip(coefficients, apart, strict=True))
    return [(1.0, sum(coefficients) * logprobs[0] + total)]


def plain_divergence(
    plan: Plan, batch: TokenBatch, t: int, log_p: Tensor, log_q: dict[str, Tensor] | None
) -> Tensor:
    if log_q is not None:
        return sum(
            (
                c * clipped_share(plan, log_p, q.log_softmax(-1)).sum()
                for c, q in weighed(plan, [*log_q.values()])
            ),
            torch.zeros_like(log_p[0]),
        )
    scored = []
    for name in plan.views:
        view = batch.views[name]
        keep = view.support_ids[t] >= 0  # type: ignore[index]
        scored.append((view.support_ids[t][keep], view.support_logprobs[t][keep]))  # type: ignore[index]
    value = torch.zeros_like(log_p[0])
    if plan.target == "losses":
        for c, (ids, q) in zip(plan.views.values(), scored, strict=True):
            value = value + c * plain_truncated(plan, log_p[ids], in_tail(plan, q))
        return value
    combine_first = plan.target == "mixture" or plan.plain_view
    answers = [q if combine_first else in_tail(plan, q) for _, q in scored]
    ((_, target),) = weighed(plan, answers)
    if combine_first:
        target = in_tail(plan, target)
    else:
        target = target.log_softmax(-1)
        if plan.tail == "bucket":  # nor has a combined target an empty one
            target = in_tail(plan, target[:-1])
    return plain_truncated(plan, log_p[scored[0][0]], target)


def in_tail(plan: Plan, x: Tensor) -> Tensor:
    if plan.tail == "renormalise":
        return x.log_softmax(-1)
    if plan.tail == "bucket":
        return torch.cat([x, torch.log(-torch.expm1(x.logsumexp(-1, keepdim=True).clamp(max=-1e-7)))])
    return x


def plain_truncated(plan: Plan, s: Tensor, q: Tensor) -> Tensor:
    """The divergence between log p at the support and a target that is already as the tail wants it."""
    s = in_tail(plan, s)
    inside = q[: len(q) - 1] if plan.tail == "bucket" else q
    value = clipped_share(plan, s, q).sum()
    if plan.tail in ("stop_gradient", "stop_gradient_mean"):
        if plan.divergence == "kl_student_teacher":
            value = -(s.exp() * (q - s.detach())).sum()
        if plan.divergence == "kl_teacher_student":
            value = (q.exp() * (q - s) + s.exp() - s.detach().exp()).sum()
    if plan.tail == "stop_gradient_mean":
        value = value / s.detach().exp().sum()
    normal = inside.log_softmax(-1)
    return value * -(normal.exp() * normal).sum() if plan.weights.teacher_entropy else value


def clipped_share(plan: Plan, s: Tensor, t: Tensor) -> Tensor:
    shares = share(row_of(plan), s.exp(), t.exp())
    return shares if plan.entry_clip is None else shares.clamp(max=plan.entry_clip)


def make_case(seed: int, row: dict[str, Any], shape: dict[str, Any]) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    rows, hidden_size, vocabulary, k = shape["T"], shape["H"], shape["V"], min(shape["K"], shape["V"])
    chosen = {name: value for name, value in row.items() if value is not None}
    if chosen.get("support") in ("teacher_topk", "student_topk", "union"):
        chosen["k"] = k
    plan = compile_plan(
        ObjectiveSettings.model_validate(
            {**chosen, **({"distill_coefficient": 0.7} if "distill_coefficient" not in chosen else {})}
        ),
        student_temperature=shape["temperature"],
    )
    weight, hidden = normal(vocabulary, hidden_size), normal(rows, hidden_size)
    bias = normal(vocabulary) if shape["bias"] else None
    names = list(plan.views) or ["teacher"]
    teachers = {name: normal(rows, vocabulary).log_softmax(-1) for name in names}
    ids, pads = {}, {}
    for name in names:
        if name == names[0] or plan.target == "losses":
            drawn = torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(rows)])
            padded = torch.rand(rows, k, generator=generator) < 0.3
            padded[:, 0] = False
        ids[name], pads[name] = drawn, padded
    sampled = torch.randint(vocabulary, (rows,), generator=generator)
    own = head_logprobs(Head(weight, bias, shape["softcap"], shape["scale"]), hidden, plan.temperature)
    reward = torch.where(torch.rand(rows, generator=generator) < 0.4, 0, normal(rows))
    batch = TokenBatch(
        sampled_ids=sampled,
        behaviour_logprobs=own.gather(1, sampled[:, None])[:, 0] + 0.4 * normal(rows),
        mask=torch.rand(rows, generator=generator) < shape["kept"],
        weight=torch.rand(rows, generator=generator, dtype=torch.float64),
        views={
            name: ViewTensors(
                sampled=log_q.gather(1, sampled[:, None])[:, 0],
                support_ids=ids[name].masked_fill(pads[name], -1),
                support_logprobs=log_q.gather(1, ids[name]).masked_fill(pads[name], math.nan),
            )
            for name, log_q in teachers.items()
        },
        reward_advantage=reward,
    )
    in_process = names if plan.in_process else []
    return Case(
        plan=plan,
        hidden=hidden,
        weight=weight,
        bias=bias,
        softcap=shape["softcap"],
        scale=shape["scale"],
        batch=batch,
        teacher_hidden={name: normal(rows, 3) for name in in_process},
        teacher_head={
            name: Head(normal(vocabulary, 3), None, 4.0 if shape["softcap"] else None) for name in in_process
        },
        chunk_rows=shape["chunk"],
        tile_columns=shape["tile"],
    )


def to_device(case: Case, device: str) -> Case:
    """Everything of the problem on `device`."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {name: moved(item) for name, item in value.items()}
        if isinstance(value, (TokenBatch, ViewTensors, Head)):
            return replace(
                value, **{field.name: moved(getattr(value, field.name)) for field in fields(value)}
            )
        return value

    return replace(case, **{field.name: moved(getattr(case, field.name)) for field in fields(case)})


def to_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Hidden states and heads in `dtype`."""
    cast = {n: None if (x := getattr(case, n)) is None else x.to(dtype) for n in ("hidden", "weight", "bias")}
    return replace(
        case,
        **cast,
        teacher_hidden={name: rows.to(dtype) for name, rows in case.teacher_hidden.items()},
        teacher_head={
            name: replace(head, weight=head.weight.to(dtype)) for name, head in case.teacher_head.items()
        },
    )
