"""From a TokenBatch to the rows that are trained on: checked, filtered, with their advantages.

Shapes: T positions of the batch, N rows kept, K support ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.objective.answers import Answers, read_answers
from student_trainer.objective.audit import read_audit
from student_trainer.objective.batch import PAD_ID, TokenBatch, ViewTensors
from student_trainer.objective.custom import TokenValues, divergence_row, transformed_advantage
from student_trainer.objective.divergences import FDivergence
from student_trainer.objective.estimators import discounted_future, future_reward, own_advantage
from student_trainer.objective.mix import entropy_certainty, mixed_advantage, rewarded
from student_trainer.objective.plan import TRUNCATED, Plan
from student_trainer.objective.preference import read_pairs
from student_trainer.objective.rows import Rows, SupportTerm
from student_trainer.objective.support import check_distinct, check_ids
from student_trainer.objective.targets import (
    common_ids,
    monitored_target,
    sampled_targets,
    support_target,
)
from student_trainer.objective.weights import (
    entropy_gate,
    least_entropy_ahead,
    position_in_sequence,
    prefix_weight,
    reward_gate,
)

_PER_POSITION = (
    "behaviour_logprobs",
    "mask",
    "weight",
    "reward_advantage",
    "marked",
    "old_logprobs",
    "rewards",
    "audit_anchor",
    "agreement",
)


def select_rows(batch: TokenBatch, plan: Plan, vocabulary: int, *, distill_open: bool = True) -> Rows:
    """Check a batch against its plan and keep the positions that can be trained on.

    With `distill_open` false only the reward trains.

    A position where a number that the plan needs is not finite is dropped and counted; it is never
    trained on.

    Raises:
        ValueError: a field is missing, has the wrong shape, or holds an id outside the vocabulary.
    """
    _check(batch, plan)
    keep, counts, answers = batch.mask.clone(), {}, read_answers(plan, batch)
    for name in plan.view_requests:
        gate = entropy_gate(plan.tokens, batch.views[name])
        if gate is not None and plan.missing_view == "renormalise":
            gate = gate | ~answers.answered[name]
        keep = keep if gate is None else keep & gate
    if plan.tokens.marked_only and batch.marked is not None:
        keep = keep & batch.marked
    reward = (
        batch.reward_advantage.double() if plan.needs_reward and batch.reward_advantage is not None else None
    )
    distilled = torch.full_like(keep, plan.needs_teacher and distill_open)
    if plan.gates_reward and batch.rewards is not None:
        paid = reward_gate(plan.tokens, batch.rewards)
        counts["gated_reward"] = (keep & ~paid).sum().to(torch.float64)
        distilled &= paid
        keep = keep & paid if plan.mix == "replace" else keep
    usable = {"dropped_behaviour": _behaviour_usable(batch, plan)}
    if reward is not None:
        usable["dropped_reward"] = torch.isfinite(reward)
        reward = torch.nan_to_num(reward, 0.0, 0.0, 0.0)
    audit = None if plan.audit is None else read_audit(plan.audit, batch)
    if audit is not None:
        # Where the writer said nothing there is no loss to be had: the divergence is of other positions.
        usable["dropped_audit"] = audit.known | ~audit.chunk
        reward = audit.weight
    if reward is not None and plan.mix == "route":
        distilled &= ~rewarded(plan, reward)
    pairs = None if plan.preference is None else read_pairs(plan, batch)
    usable["dropped_teacher"] = ~distilled | answers.usable if pairs is None else pairs.trained
    for name, good in usable.items():
        counts[name] = (keep & ~good).sum().to(torch.float64)
        keep = keep & good
    if audit is not None:
        counts |= audit.sums(keep)
    counts |= {} if pairs is None else pairs.sums
    behaviour = torch.nan_to_num(batch.behaviour_logprobs.double(), 0.0, 0.0, 0.0)
    index = keep.nonzero().squeeze(1)
    if plan.missing_view == "renormalise":
        counts["renormalised"] = (keep & distilled & answers.rescaled).sum().to(torch.float64)
    distilled &= answers.usable
    advantage = (
        _advantage(batch, plan, answers, reward, vocabulary, distilled=distilled)
        if pairs is None
        else mixed_advantage(plan, pairs.advantage, None, None)
    )
    pathwise = plan.needs_teacher and plan.estimator == "pathwise"
    supports, terms = _terms(batch, plan, answers, index, distilled[index]) if pathwise else ([], [])
    sampled_ids = batch.sampled_ids[index, None]
    check_ids("batch.sampled_ids", sampled_ids[:, 0], vocabulary)
    for ids in supports:
        check_ids("batch.views support_ids", ids, vocabulary)
    target = monitored_target(plan, batch, answers)
    return Rows(
        plan=plan,
        divergence=divergence_row(plan),
        index=index,
        weight=batch.weight.double()[index],
        trained=torch.zeros_like(index, dtype=torch.bool),
        gather_ids=torch.cat([sampled_ids, *supports], dim=1).clamp(min=0),
        behaviour=behaviour[index] if plan.needs_behaviour else None,
        advantage=None if advantage is None else advantage[index],
        distill_scale=plan.distill_coefficient * distilled[index].double() if pathwise else None,
        terms=terms,
        teacher_sampled=None if target is None else target[index],
        old=None if batch.old_logprobs is None else batch.old_logprobs.double()[index],
        teacher_entropy=_teacher_entropy(batch, index),
        pairs=pairs,
        tokens=_token_values(batch, plan, behaviour, target).at(index) if plan.tells_tokens else None,
        sums=counts,
    )


def _token_values(batch: TokenBatch, plan: Plan, own: Tensor, target: Tensor | None) -> TokenValues:
    """What a user's function may read, [T]; `own` is the student's log-probability."""
    unknown = torch.full_like(own, torch.nan)
    entropy = _teacher_entropy(batch, torch.arange(len(own), device=own.device))
    assert batch.sequence_lengths is not None
    return TokenValues(
        student_logprob=own,
        teacher_logprob=unknown if target is None else target,
        behaviour_logprob=batch.behaviour_logprobs.double(),
        teacher_entropy=unknown if entropy is None else entropy,
        reward=unknown if batch.rewards is None else batch.rewards.double(),
        position=position_in_sequence(batch.sequence_lengths),
    )


def _check(batch: TokenBatch, plan: Plan) -> None:
    positions = len(batch.sampled_ids)
    for name in _PER_POSITION:
        tensor = getattr(batch, name)
        if tensor is not None and tensor.shape != (positions,):
            raise ValueError(f"batch.{name}: got shape {tuple(tensor.shape)}, allowed: ({positions},)")
    if not bool(torch.isfinite(batch.weight).all()):
        raise ValueError("batch.weight: got a weight that is not finite")
    if plan.tokens.marked_only and batch.marked is None:
        raise ValueError("batch.marked: missing, and the plan has tokens.marked_only")
    if plan.gates_reward and batch.rewards is None:
        raise ValueError("batch.rewards: missing, and the plan has tokens.reward_above or reward_below")
    if plan.needs_reward and batch.reward_advantage is None:
        raise ValueError("batch.reward_advantage: missing, and the plan mixes in a reward")
    for name in plan.view_requests:
        if name not in batch.views:
            raise ValueError(f"batch.views: {name!r} is missing, got {sorted(batch.views)}")
        _check_view(name, batch.views[name], plan, positions)
    if plan.tells_tokens and batch.sequence_lengths is None:
        raise ValueError("batch.sequence_lengths: missing, and a function of the user's reads the tokens")
    looks_along = plan.horizon != 0 or plan.weights.prefix is not None or plan.entropy_window > 0
    if looks_along and plan.needs_teacher:
        total = None if batch.sequence_lengths is None else int(batch.sequence_lengths.sum())
        if total != positions:
            raise ValueError(f"batch.sequence_lengths: sums to {total}, allowed: {positions}")


def _check_view(name: str, view: ViewTensors, plan: Plan, positions: int) -> None:
    if plan.support == "sampled" and view.sampled is None:
        raise ValueError(f"batch.views[{name!r}].sampled: missing")
    if plan.entropy_factor is not None and view.entropy is None:
        raise ValueError(f"batch.views[{name!r}].entropy: missing")
    if plan.support in TRUNCATED:
        _check_support(name, view, positions)


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


def _behaviour_usable(batch: TokenBatch, plan: Plan) -> Tensor:
    usable = torch.isfinite(batch.behaviour_logprobs) | (not plan.needs_behaviour)
    if not plan.uses_old or batch.old_logprobs is None:
        return usable
    return usable & torch.isfinite(batch.old_logprobs)


def _advantage(
    batch: TokenBatch,
    plan: Plan,
    answers: Answers,
    reward: Tensor | None,
    vocabulary: int,
    *,
    distilled: Tensor,
) -> Tensor | None:
    """The sampled token's advantage, f64 [T]; None where nothing uses the score function.

    `distilled`, bool [T], is where the teacher has a say.
    """
    if not plan.needs_teacher or plan.estimator == "pathwise":
        return None if reward is None else mixed_advantage(plan, None, reward, None)
    old = batch.old_logprobs if plan.log_ratio == "student" else None
    own = (batch.behaviour_logprobs if old is None else old).double()
    known_own, own = torch.isfinite(own), torch.nan_to_num(own, 0.0, 0.0, 0.0)
    distill = torch.zeros_like(own)
    row = divergence_row(plan)
    for factor, target in sampled_targets(plan, batch, answers):
        known = batch.mask & distilled & torch.isfinite(target) & known_own
        log_u = torch.where(known, _between(plan, batch, target - own), 0)
        if plan.mix == "multiply":
            plain = mixed_advantage(plan, None, reward, None)
            told = mixed_advantage(plan, None, reward, log_u, _certainty(batch, plan, vocabulary))
            return torch.where(distilled, told, plain)
        part = _distilled_advantage(batch, plan, row, log_u)
        distill = distill + factor * torch.where(known, part, 0)
    if "advantage" in plan.custom:
        tokens = _token_values(batch, plan, own, monitored_target(plan, batch, answers))
        known = batch.mask & distilled & known_own
        changed = transformed_advantage(plan, distill, tokens, known)
        distill = torch.where(known, changed, 0)
    if plan.weights.prefix is not None:
        assert batch.sequence_lengths is not None
        distill = distill * prefix_weight(plan.weights.prefix, distill, batch.sequence_lengths)
    return mixed_advantage(plan, distill, reward, None)


def _between(plan: Plan, batch: TokenBatch, log_u: Tensor) -> Tensor:
    """log u as the plan's ratio has it: as it is, or with the second view in the student's place, f64 [T]."""
    if plan.mix != "multiply" or plan.ratio != "first_over_second":
        return log_u
    first, second = (batch.views[name].sampled for name in plan.views)
    assert first is not None
    assert second is not None
    return first.double() - second.double()


def _teacher_entropy(batch: TokenBatch, index: Tensor) -> Tensor | None:
    """Mean over the views that carry an entropy, f64 [N]; None where none does."""
    known = [view.entropy.double()[index] for view in batch.views.values() if view.entropy is not None]
    return torch.stack(known).nanmean(dim=0) if known else None


def _certainty(batch: TokenBatch, plan: Plan, vocabulary: int) -> Tensor | None:
    """The factor of the teacher's entropy, of the only view or of the least certain one, f64 [T]."""
    if plan.entropy_factor is None:
        return None
    factors = []
    for name in plan.views:
        entropy = batch.views[name].entropy
        assert entropy is not None
        entropy = entropy.double()
        if plan.entropy_window:
            assert batch.sequence_lengths is not None
            entropy = least_entropy_ahead(entropy, batch.sequence_lengths, plan.entropy_window)
        factors.append(entropy_certainty(plan.entropy_factor, torch.nan_to_num(entropy), vocabulary))
    return torch.stack(factors).amin(dim=0)


def _distilled_advantage(batch: TokenBatch, plan: Plan, row: FDivergence, log_u: Tensor) -> Tensor:
    own = _bounded(plan, own_advantage(row, log_u, stopped=plan.score_weight == "stopped"))
    if plan.horizon == 0:
        return own
    assert batch.sequence_lengths is not None
    later = _bounded(plan, future_reward(row, log_u))
    return own + discounted_future(
        later, batch.sequence_lengths, horizon=plan.horizon, discount=plan.discount
    )


def _bounded(plan: Plan, values: Tensor) -> Tensor:
    bound = plan.advantage_clip
    return values if bound is None else values.clamp(-bound, bound)


def _terms(
    batch: TokenBatch, plan: Plan, answers: Answers, index: Tensor, distilled: Tensor
) -> tuple[list[Tensor], list[SupportTerm]]:
    """Support ids int64 [N, K] and the divergence over them: one, or one for every view."""
    if plan.support == "full":
        return [], []
    factors = [answers.coefficients[name][index] for name in plan.views]
    if plan.target != "losses":
        ids = _known_ids(common_ids(plan, batch, answers)[index], distilled)
        present = ids != PAD_ID
        logprobs = [
            _logprobs(batch.views[name], index, present, distilled & answers.answered[name][index])
            for name in plan.views
        ]
        target = support_target(plan, logprobs, [factor[:, None] for factor in factors], present)
        whole = torch.ones_like(factors[0])
        return [ids], [SupportTerm(whole, slice(0, ids.shape[1]), present, target)]
    supports, terms, start = [], [], 0
    for name, factor in zip(plan.views, factors, strict=True):
        view, heard = batch.views[name], distilled & answers.answered[name][index]
        assert view.support_ids is not None
        ids = _known_ids(view.support_ids[index], heard)
        columns = slice(start, start + ids.shape[1])
        present = ids != PAD_ID
        terms.append(SupportTerm(factor, columns, present, _logprobs(view, index, present, heard)))
        supports.append(ids)
        start = columns.stop
    return supports, terms


def _known_ids(ids: Tensor, heard: Tensor) -> Tensor:
    """The same where a teacher has a say; elsewhere a stand-in that keeps the row's arithmetic finite."""
    stand_in = torch.full_like(ids, PAD_ID)
    stand_in[:, :1] = 0
    return torch.where(heard[:, None], ids, stand_in)


def _logprobs(view: ViewTensors, index: Tensor, present: Tensor, heard: Tensor) -> Tensor:
    """The teacher's log-probabilities f64 [N, K]; something finite where it has no say."""
    assert view.support_logprobs is not None
    return torch.where(present & heard[:, None], view.support_logprobs[index].double(), -1.0)
