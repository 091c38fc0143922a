"""From a TokenBatch to the rows that are trained on: checked, filtered, with their advantages.

Everything here is per position and small; the vocabulary is only met in `fused`.
Shapes: T positions of the batch, N rows kept, R rows of a chunk, K support ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from student_trainer.objective.batch import PAD_ID, TokenBatch, ViewTensors
from student_trainer.objective.divergences import FDivergence, f_divergence
from student_trainer.objective.estimators import (
    discounted_future,
    future_reward,
    importance_weight,
    own_advantage,
    surrogate,
)
from student_trainer.objective.mix import mixed_advantage, rewarded
from student_trainer.objective.plan import TRUNCATED, Plan
from student_trainer.objective.settings import ImportanceCorrection
from student_trainer.objective.support import check_distinct, check_ids
from student_trainer.objective.tails import truncated
from student_trainer.objective.weights import entropy_gate


@dataclass
class Rows:
    """The kept positions, and the loss of any chunk of them as a function of log-probabilities.

    Attributes:
        index: int64 [N], where each row stands in the batch.
        gather_ids: int64 [N, 1 + K]: the sampled id, then the support (pads point at id 0).
        sums: metrics, filled chunk by chunk.
        traces: per-row tensors, filled chunk by chunk when asked for.
    """

    plan: Plan
    divergence: FDivergence
    index: Tensor
    weight: Tensor  # f64 [N]
    gather_ids: Tensor
    behaviour: Tensor | None  # f64 [N]
    advantage: Tensor | None  # f64 [N], of the sampled token
    distill_scale: Tensor | None  # f64 [N], of the pathwise divergence
    present: Tensor | None  # bool [N, K]
    teacher: Tensor | None  # f64 [N, K]
    teacher_sampled: Tensor | None  # f64 [N], NaN where unknown
    sums: dict[str, Tensor] = field(default_factory=dict)
    traces: dict[str, list[Tensor]] | None = None

    def chunk_loss(
        self, part: slice, logprobs: Tensor, dense_value: Tensor | None, dense_bad: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of a chunk.

        Args:
            part: which rows.
            logprobs: f64 [R, 1 + K], log p at `gather_ids`; differentiable.
            dense_value: f64 [R], the full-vocabulary divergence, with support "full".
            dense_bad: bool [R], rows where the teacher's head gave something not finite.

        Returns:
            Σ_R weight · loss, differentiable in `logprobs`, with the dense divergence as a constant;
            and the factor of each row's dense divergence, f64 [R], with support "full".
        """
        weight = self.weight[part]
        if dense_bad is not None:
            weight = weight.masked_fill(dense_bad, 0)
            self._count("dropped_teacher", dense_bad)
        alive = torch.ones_like(weight, dtype=torch.bool) if dense_bad is None else ~dense_bad
        self._count("positions", alive)
        sampled = logprobs[:, 0]
        self._record("student_logprob", sampled.detach(), alive)
        self._monitor(part, sampled.detach(), alive)
        loss = torch.zeros_like(sampled)
        if self.advantage is not None:
            loss = loss + self._policy_gradient(part, sampled, alive)
        if self.distill_scale is None:
            return (weight * loss).sum(), None
        scale = self.distill_scale[part]
        distilled = alive & (scale != 0)
        self._count("distilled", distilled)
        if isinstance(self.plan.correction, ImportanceCorrection) and self.behaviour is not None:
            ratio, kept = importance_weight(self.plan.correction, sampled, self.behaviour[part])
            self._record("ratio", ratio, alive)
            self._record("ratio_clipped", (kept < ratio).to(ratio.dtype), alive)
            # Like SDPO's weight: detached, so that it scales the divergence and is not itself trained.
            scale = scale * kept
        if dense_value is not None:
            self._record("divergence", dense_value, distilled)
            return (weight * (loss + scale * dense_value)).sum(), weight * scale
        value = self._truncated(part, logprobs[:, 1:], distilled)
        self._record("divergence", value.detach(), distilled)
        return (weight * (loss + scale * value)).sum(), None

    def record_entropy(self, entropy: Tensor, dense_bad: Tensor | None) -> None:
        """Note the student's entropy of a chunk's rows, f64 [R]."""
        alive = torch.ones_like(entropy, dtype=torch.bool) if dense_bad is None else ~dense_bad
        self._record("entropy", entropy, alive)

    def _truncated(self, part: slice, student: Tensor, distilled: Tensor) -> Tensor:
        plan = self.plan
        assert self.teacher is not None
        assert self.present is not None
        teacher, present = self.teacher[part], self.present[part]
        for name, logprobs in (("student_mass", student.detach()), ("teacher_mass", teacher)):
            self._record(name, torch.where(present, logprobs.exp(), 0).sum(dim=1), distilled)
        return truncated(
            self.divergence, student, teacher, present, tail=plan.tail, entry_clip=plan.entry_clip
        )

    def _policy_gradient(self, part: slice, sampled: Tensor, alive: Tensor) -> Tensor:
        assert self.advantage is not None
        advantage = self.advantage[part]
        behaviour = None if self.behaviour is None else self.behaviour[part]
        loss, ratio, cut = surrogate(self.plan.correction, sampled, behaviour, advantage)
        self._record("advantage", advantage, alive)
        if self.distill_scale is None or not isinstance(self.plan.correction, ImportanceCorrection):
            self._record("ratio", ratio.detach(), alive)
            self._record("ratio_clipped", cut.to(ratio.dtype), alive)
        return loss

    def _monitor(self, part: slice, sampled: Tensor, alive: Tensor) -> None:
        if self.teacher_sampled is None:
            return
        scored = self.teacher_sampled[part]
        known = alive & torch.isfinite(scored)
        self._count("monitored", known)
        self._record("teacher_logprob", scored, known)
        self._record("sampled_kl", sampled - scored, known)

    def _count(self, name: str, where: Tensor) -> None:
        self._add(name, where.sum().to(torch.float64))

    def _record(self, name: str, values: Tensor, where: Tensor) -> None:
        self._add(name, torch.where(where, values, 0).sum())
        if self.traces is not None:
            self.traces.setdefault(name, []).append(torch.where(where, values, torch.nan))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def select_rows(batch: TokenBatch, plan: Plan, vocabulary: int) -> Rows:
    """Check a batch against its plan and keep the positions that can be trained on.

    A position where a number that the plan needs is not finite is dropped and counted; it is never
    trained on.

    Raises:
        ValueError: a field is missing, has the wrong shape, or holds an id outside the vocabulary.
    """
    _check(batch, plan)
    keep, counts = batch.mask.clone(), {}
    for name in plan.views:
        gate = entropy_gate(plan.tokens, batch.views[name]) if name in batch.views else None
        keep = keep if gate is None else keep & gate
    reward = (
        batch.reward_advantage.double() if plan.needs_reward and batch.reward_advantage is not None else None
    )
    distilled = torch.full_like(keep, plan.needs_teacher)
    usable = {"dropped_behaviour": torch.isfinite(batch.behaviour_logprobs) | (not plan.needs_behaviour)}
    if reward is not None:
        usable["dropped_reward"] = torch.isfinite(reward)
        reward = torch.nan_to_num(reward, 0.0, 0.0, 0.0)
        if plan.mix == "route":
            distilled &= ~rewarded(plan, reward)
    usable["dropped_teacher"] = ~distilled | _teacher_usable(batch, plan)
    for name, good in usable.items():
        counts[name] = (keep & ~good).sum().to(torch.float64)
        keep = keep & good
    behaviour = torch.nan_to_num(batch.behaviour_logprobs.double(), 0.0, 0.0, 0.0)
    index = keep.nonzero().squeeze(1)
    advantage = _advantage(batch, plan, behaviour, reward)
    pathwise = plan.needs_teacher and plan.estimator == "pathwise"
    ids, present, teacher = _support(batch, plan, index, distilled[index]) if pathwise else (None, None, None)
    sampled_ids = batch.sampled_ids[index, None]
    gather_ids = sampled_ids if ids is None else torch.cat([sampled_ids, ids], dim=1)
    check_ids("batch.sampled_ids", gather_ids[:, 0], vocabulary)
    if ids is not None:
        check_ids("batch.views support_ids", ids, vocabulary)
        gather_ids = gather_ids.clamp(min=0)
    return Rows(
        plan=plan,
        divergence=f_divergence(plan.divergence, plan.beta, plan.alpha),
        index=index,
        weight=batch.weight.double()[index],
        gather_ids=gather_ids,
        behaviour=behaviour[index] if plan.needs_behaviour else None,
        advantage=None if advantage is None else advantage[index],
        distill_scale=plan.distill_coefficient * distilled[index].double() if pathwise else None,
        present=present,
        teacher=teacher,
        teacher_sampled=_target(batch, plan, index),
        sums=counts,
    )


def _check(batch: TokenBatch, plan: Plan) -> None:
    positions = len(batch.sampled_ids)
    for name in ("behaviour_logprobs", "mask", "weight", "reward_advantage"):
        tensor = getattr(batch, name)
        if tensor is not None and tensor.shape != (positions,):
            raise ValueError(f"batch.{name}: got shape {tuple(tensor.shape)}, allowed: ({positions},)")
    if not bool(torch.isfinite(batch.weight).all()):
        raise ValueError("batch.weight: got a weight that is not finite")
    if plan.needs_reward and batch.reward_advantage is None:
        raise ValueError("batch.reward_advantage: missing, and the plan mixes in a reward")
    for name in plan.view_requests:
        view = batch.views.get(name)
        if view is None:
            raise ValueError(f"batch.views: {name!r} is missing, got {sorted(batch.views)}")
        if plan.support == "sampled" and view.sampled is None:
            raise ValueError(f"batch.views[{name!r}].sampled: missing")
        if plan.support in TRUNCATED:
            _check_support(name, view, positions)
    if plan.horizon != 0 and plan.needs_teacher:
        total = None if batch.sequence_lengths is None else int(batch.sequence_lengths.sum())
        if total != positions:
            raise ValueError(f"batch.sequence_lengths: sums to {total}, allowed: {positions}")


def _check_support(name: str, view: ViewTensors, positions: int) -> None:
    ids, logprobs = view.support_ids, view.support_logprobs
    if ids is None or logprobs is None:
        raise ValueError(f"batch.views[{name!r}]: support_ids and support_logprobs are needed")
    if ids.shape != logprobs.shape or ids.dim() != 2 or len(ids) != positions:
        raise ValueError(
            f"batch.views[{name!r}]: support_ids {tuple(ids.shape)} and support_logprobs "
            f"{tuple(logprobs.shape)} must both be ({positions}, K)"
        )
    check_distinct(f"batch.views[{name!r}].support_ids", ids)


def _teacher_usable(batch: TokenBatch, plan: Plan) -> Tensor:
    """bool [T]: everything the plan needs of every view is finite."""
    usable = torch.ones_like(batch.mask)
    for name in plan.view_requests:
        view = batch.views[name]
        if plan.support == "sampled":
            assert view.sampled is not None
            usable = usable & torch.isfinite(view.sampled)
        else:
            assert view.support_ids is not None
            assert view.support_logprobs is not None
            pad = view.support_ids == PAD_ID
            usable = usable & (torch.isfinite(view.support_logprobs) | pad).all(dim=1) & ~pad.all(dim=1)
    return usable


def _advantage(batch: TokenBatch, plan: Plan, behaviour: Tensor, reward: Tensor | None) -> Tensor | None:
    """The sampled token's advantage, f64 [T]; None where nothing uses the score function."""
    if not plan.needs_teacher or plan.estimator == "pathwise":
        return None if reward is None else mixed_advantage(plan, None, reward, None)
    target = torch.zeros_like(behaviour)
    for name, coefficient in plan.views.items():
        sampled = batch.views[name].sampled
        assert sampled is not None
        target = target + coefficient * sampled.double()
    known = batch.mask & torch.isfinite(target) & torch.isfinite(batch.behaviour_logprobs)
    log_u = torch.where(known, target - behaviour, 0)
    if plan.mix == "multiply":
        return mixed_advantage(plan, None, reward, log_u)
    row = f_divergence(plan.divergence, plan.beta, plan.alpha)
    own = _bounded(plan, own_advantage(row, log_u, stopped=plan.score_weight == "stopped"))
    if plan.horizon != 0:
        assert batch.sequence_lengths is not None
        later = _bounded(plan, future_reward(row, log_u))
        own = own + discounted_future(
            later, batch.sequence_lengths, horizon=plan.horizon, discount=plan.discount
        )
    return mixed_advantage(plan, own, reward, None)


def _bounded(plan: Plan, values: Tensor) -> Tensor:
    bound = plan.advantage_clip
    return values if bound is None else values.clamp(-bound, bound)


def _support(
    batch: TokenBatch, plan: Plan, index: Tensor, distilled: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Support ids int64 [N, K], which are present, and the teacher's log-probabilities f64 [N, K]."""
    if plan.support == "full":
        return None, None, None
    view = batch.views[next(iter(plan.views))]
    assert view.support_ids is not None
    assert view.support_logprobs is not None
    ids = view.support_ids[index]
    # A row that the reward trains needs no teacher; a stand-in keeps its arithmetic finite.
    stand_in = torch.full_like(ids, PAD_ID)
    stand_in[:, :1] = 0
    ids = torch.where(distilled[:, None], ids, stand_in)
    present = ids != PAD_ID
    wanted = present & distilled[:, None]
    return ids, present, torch.where(wanted, view.support_logprobs[index].double(), -1.0)


def _target(batch: TokenBatch, plan: Plan, index: Tensor) -> Tensor | None:
    """Σ_v c_v log q_v(y), f64 [N], for metrics; None where a view does not carry it."""
    if not plan.views or any(n not in batch.views or batch.views[n].sampled is None for n in plan.views):
        return None
    target = torch.zeros(len(index), dtype=torch.float64, device=index.device)
    for name, coefficient in plan.views.items():
        sampled = batch.views[name].sampled
        assert sampled is not None
        target = target + coefficient * sampled[index].double()
    return target
