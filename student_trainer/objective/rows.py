"""The rows that are trained on, and their loss as a function of a few log-probabilities.

Everything here is per position and small; the vocabulary is only met in `fused`.
Shapes: N rows kept, R rows of a chunk, K support ids of a term.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from student_trainer.objective.custom import TokenValues, own_weight
from student_trainer.objective.divergences import MAX_LOG_RATIO, FDivergence
from student_trainer.objective.estimators import discounted_future, importance_weight, surrogate
from student_trainer.objective.plan import Plan
from student_trainer.objective.preference import Pairs
from student_trainer.objective.settings import ImportanceCorrection
from student_trainer.objective.tails import STOPPED, support_entropy, truncated


@dataclass(frozen=True)
class SupportTerm:
    """One divergence over a support: the only one, or one of a view's of several."""

    factor: Tensor  # f64 [N]
    columns: slice  # of the gathered log-probabilities, past the sampled token's
    present: Tensor  # bool [N, K]
    target: Tensor  # f64 [N, K]; anything where not present


@dataclass
class Rows:
    """The kept positions, and the loss of any chunk of them as a function of log-probabilities.

    Attributes:
        index: int64 [N], where each row stands in the batch.
        gather_ids: int64 [N, 1 + ΣK]: the sampled id, then the supports (pads point at id 0).
        sums: metrics, filled chunk by chunk.
        traces: per-row tensors, filled chunk by chunk when asked for.
    """

    plan: Plan
    divergence: FDivergence
    index: Tensor
    weight: Tensor  # f64 [N]
    trained: Tensor  # bool [N], filled chunk by chunk
    gather_ids: Tensor
    behaviour: Tensor | None  # f64 [N]
    advantage: Tensor | None  # f64 [N], of the sampled token
    distill_scale: Tensor | None  # f64 [N], of the pathwise divergence
    terms: list[SupportTerm]  # of a pathwise divergence over supports
    teacher_sampled: Tensor | None  # f64 [N], NaN where unknown
    old: Tensor | None = None  # f64 [N], log p_old where the batch has it
    teacher_entropy: Tensor | None = None  # f64 [N], NaN where unknown
    pairs: Pairs | None = None  # where the plan has a preference
    tokens: TokenValues | None = None  # [N], where the plan has functions of the user's
    sums: dict[str, Tensor] = field(default_factory=dict)
    traces: dict[str, list[Tensor]] | None = None

    def chunk_loss(
        self, part: slice, logprobs: Tensor, dense_value: Tensor | None, dense_bad: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of a chunk.

        Args:
            part: which rows.
            logprobs: f64 [R, 1 + ΣK], log p at `gather_ids`; differentiable.
            dense_value: f64 [R], the full-vocabulary divergence, with support "full".
            dense_bad: bool [R], rows where the teacher's head gave something not finite.

        Returns:
            Σ_R weight · loss, differentiable in `logprobs`, with the dense divergence as a constant;
            and the factor of each row's dense divergence, f64 [R], with support "full".
        """
        sampled = logprobs[:, 0]
        alive = self._trained(part, sampled.detach(), dense_bad)
        self.trained[part] = alive
        weight = self.weight[part].masked_fill(~alive, 0)
        self._count("positions", alive)
        self._record("student_logprob", sampled.detach(), alive)
        self._monitor(part, sampled.detach(), alive)
        weight, behaviour = self._rollout_weight(part, weight, sampled.detach(), alive)
        if self.tokens is not None and "token_weight" in self.plan.custom:
            values = replace(self.tokens.at(part), student_logprob=sampled.detach())
            own = own_weight(self.plan, values)
            self._record("token_weight", own, alive)
            weight = weight * own
        loss = torch.zeros_like(sampled)
        if self.advantage is not None:
            loss = loss + self._policy_gradient(part, sampled, behaviour, alive)
        if self.distill_scale is None:
            return (weight * loss).sum(), None
        scale = self.distill_scale[part]
        distilled = alive & (scale != 0)
        self._count("distilled", distilled)
        if self.plan.weights.surprise:
            scale = scale * -torch.expm1(sampled.detach())
        if isinstance(self.plan.correction, ImportanceCorrection) and behaviour is not None:
            ratio, kept = importance_weight(self.plan.correction, sampled, behaviour)
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

    def disagreement(self, part: slice, logprobs: Tensor, _: Tensor | None = None) -> Tensor:
        """Divergence × the teacher's mass on the support, f64 [R]: what a position has to teach (TA-OPD)."""
        student = logprobs[:, 1:]
        score = torch.zeros_like(student[:, 0])
        for term in self.terms:
            own, target, present = student[:, term.columns], term.target[part], term.present[part]
            mass = torch.where(present, target, -torch.inf).exp().sum(dim=1)
            score += term.factor[part] * mass * self._term(own, target, present)
        return score

    def divergences(self, part: slice, logprobs: Tensor, dense_value: Tensor | None) -> Tensor:
        """The divergence of a chunk's positions, f64 [R]: what a token before them is charged with.

        Over a truncated support it is the one whose gradient the tail takes: with the tails that stop
        gradients that of unnormalised measures, Σ_S p·f(u) − f′(1)·(q − p). As a cross-entropy it has the
        target's entropy besides, −Σ_S q log q, which moves with the prefix though not with this p.
        """
        if dense_value is not None:
            return dense_value
        student = logprobs[:, 1:]
        value = torch.zeros_like(student[:, 0])
        for term in self.terms:
            own, target, present = student[:, term.columns], term.target[part], term.present[part]
            local = self._term(own, target, present)
            if self.plan.tail in STOPPED:
                apart = torch.where(present, target.exp() - own.exp(), 0).sum(dim=1)
                local = local - self.divergence.slope * apart
            if self.plan.charge == "cross_entropy":
                local = local + support_entropy(target, present)
            value += term.factor[part] * local
        return value

    def charged(self, values: Tensor, sequence_lengths: Tensor) -> Rows:
        """These rows with later divergences, f64 [N], in their advantages: −Σ_j discount^j · D_{t+j}."""
        assert self.distill_scale is not None
        plan, bound = self.plan, self.plan.advantage_clip
        costs = values if bound is None else values.clamp(-bound, bound)
        everywhere = costs.new_zeros(int(sequence_lengths.sum()))
        everywhere[self.index] = self.distill_scale * costs
        later = discounted_future(everywhere, sequence_lengths, horizon=plan.horizon, discount=plan.discount)[
            self.index
        ]
        return replace(self, advantage=-later if self.advantage is None else self.advantage - later)

    def restricted(self, kept: Tensor) -> Rows:
        """These rows only, int64 [M] in order; metrics go on being summed in one place."""
        chosen: dict[str, Any] = {
            field.name: value[kept]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        terms = [
            replace(term, factor=term.factor[kept], present=term.present[kept], target=term.target[kept])
            for term in self.terms
        ]
        tokens = None if self.tokens is None else self.tokens.at(kept)
        return replace(self, terms=terms, tokens=tokens, **chosen)

    def record_entropy(self, part: slice, entropy: Tensor) -> None:
        """Note the student's entropy of a chunk that `chunk_loss` has seen, f64 [R]."""
        self._record("entropy", entropy, self.trained[part])

    def _trained(self, part: slice, sampled: Tensor, dense_bad: Tensor | None) -> Tensor:
        """bool [R]: rows that the teacher did not spoil and, where the plan asks for it, supports."""
        alive = torch.ones_like(sampled, dtype=torch.bool)
        if dense_bad is not None:
            alive = ~dense_bad
            self._count("dropped_teacher", dense_bad)
        least = self.plan.tokens.evidence_above
        if least is not None:
            assert self.teacher_sampled is not None
            supported = self.teacher_sampled[part] - sampled > least
            self._count("dropped_evidence", alive & ~supported)
            alive = alive & supported
        return alive

    def _truncated(self, part: slice, student: Tensor, distilled: Tensor) -> Tensor:
        value = torch.zeros_like(student[:, 0])
        masses = {name: torch.zeros_like(value) for name in ("student_mass", "teacher_mass")}
        for term in self.terms:
            own, target, present = student[:, term.columns], term.target[part], term.present[part]
            value = value + term.factor[part] * self._term(own, target, present)
            for name, logprobs in (("student_mass", own.detach()), ("teacher_mass", target)):
                masses[name] += torch.where(present, logprobs, -torch.inf).exp().sum(dim=1)
        for name, mass in masses.items():
            self._record(name, mass / len(self.terms), distilled)
        return value

    def _term(self, own: Tensor, target: Tensor, present: Tensor) -> Tensor:
        plan = self.plan
        value = truncated(self.divergence, own, target, present, tail=plan.tail, entry_clip=plan.entry_clip)
        return value * support_entropy(target, present) if plan.weights.teacher_entropy else value

    def _rollout_weight(
        self, part: slice, weight: Tensor, sampled: Tensor, alive: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The rows' weights with min(p_old/μ, cap) in them, and what `correction` compares p with."""
        cap = self.plan.weights.rollout_cap
        behaviour = None if self.behaviour is None else self.behaviour[part]
        if cap is None or behaviour is None:
            return weight, behaviour
        old = sampled if self.old is None else self.old[part]
        kept = (old - behaviour).clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)
        self._record("rollout_weight", kept, alive)
        return weight * kept, old

    def _policy_gradient(
        self, part: slice, sampled: Tensor, behaviour: Tensor | None, alive: Tensor
    ) -> Tensor:
        assert self.advantage is not None
        advantage = self.advantage[part]
        loss, ratio, cut = surrogate(self.plan.correction, sampled, behaviour, advantage)
        self._record("advantage", advantage, alive)
        if self.distill_scale is None or not isinstance(self.plan.correction, ImportanceCorrection):
            self._record("ratio", ratio.detach(), alive)
            self._record("ratio_clipped", cut.to(ratio.dtype), alive)
        return loss

    def _monitor(self, part: slice, sampled: Tensor, alive: Tensor) -> None:
        if self.teacher_entropy is not None:
            entropy = self.teacher_entropy[part]
            known = alive & torch.isfinite(entropy)
            self._count("entropy_known", known)
            self._record("teacher_entropy", entropy, known)
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
