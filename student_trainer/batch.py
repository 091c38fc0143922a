"""Packing: the groups of one step into micro-batches of tensors for the objective.

Shapes: T response positions of a micro-batch, K support ids, B rollouts, P prompt tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tutelage_client.types import PAD_ID, SequenceScore, Signal

from services.models.packed import PackedLayout, build_layout
from student_trainer.objective.batch import TokenBatch, ViewTensors
from student_trainer.objective.compile import Plan
from student_trainer.objective.mix import group_advantages
from student_trainer.objective.preference import paired_groups, paired_positions
from student_trainer.objective.weights import position_weights, token_mask
from student_trainer.verify import TrainingGroup, TrainingRollout


@dataclass(frozen=True, slots=True)
class Member:
    """A rollout of a micro-batch: which group of the step, which of its rollouts, how rewarded."""

    group: TrainingGroup
    rollout: TrainingRollout
    advantage: float  # NaN where the task gave no reward

    @property
    def cost(self) -> int:
        """Tokens beside the prompt, at most: under an auxiliary context the response is computed again."""
        other = self.rollout.auxiliary_ids
        return self.rollout.length + (0 if other is None else len(other) + self.rollout.length)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass."""

    layout: PackedLayout
    tokens: TokenBatch
    members: tuple[Member, ...]  # in the order of the packed positions


def pack_step(
    groups: Sequence[TrainingGroup], plan: Plan, max_tokens: int, *, shares: int = 1
) -> list[MicroBatch]:
    """Micro-batches of one optimizer step; the sum of their losses is the step's mean loss.

    A prompt is packed once for all its rollouts. A group larger than `max_tokens` is cut between
    rollouts; a single rollout larger than that gets a micro-batch of its own. With a preference, whose pairs
    are of one group, so does a group. With several `shares`, to be trained side by side, micro-batches are
    of about one size and, where there are rollouts enough, a multiple of `shares`.

    Returns:
        An empty list when no position of the step can be trained on.
    """
    parts = _cut(groups, plan, max_tokens, shares)
    masks = [_mask(part, plan) for part in parts]
    lengths = [torch.tensor([member.rollout.length for member in part]) for part in parts]
    if not any(bool(mask.any()) for mask in masks):
        return []
    weights = _weights(parts, masks, lengths, plan)
    return [
        MicroBatch(
            layout=_layout(part),
            tokens=_tokens(part, plan, mask, sizes, weight),
            members=tuple(part),
        )
        for part, mask, sizes, weight in zip(parts, masks, lengths, weights, strict=True)
    ]


def deal(micro_batches: Sequence[MicroBatch], world: int) -> list[list[int]]:
    """Which micro-batches each rank trains, by number and in order; their tokens are balanced.

    The largest go first, one to every rank in turn, beginning with the rank that has least so far.
    """
    sizes = [micro_batch.layout.num_rows for micro_batch in micro_batches]
    largest_first = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    shares: list[list[int]] = [[] for _ in range(world)]
    for start in range(0, len(sizes), world):
        least_first = sorted(shares, key=lambda share: sum(sizes[number] for number in share))
        for share, number in zip(least_first, largest_first[start : start + world], strict=False):
            share.append(number)
    return [sorted(share) for share in shares]


def idle_batch(micro_batch: MicroBatch) -> MicroBatch:
    """One token of it that is not trained on: for a rank without rows, which takes part all the same."""
    first = micro_batch.layout.input_ids[:1].numpy()
    return MicroBatch(
        layout=build_layout([first], [(0, first)]),
        tokens=replace(
            micro_batch.tokens.changed(lambda tensor: tensor[:1].clone()),
            mask=torch.zeros(1, dtype=torch.bool),
            weight=torch.zeros(1),
            sequence_lengths=torch.ones(1, dtype=torch.int64),
            auxiliary_index=None,
        ),
        members=(),
    )


def _cut(groups: Sequence[TrainingGroup], plan: Plan, max_tokens: int, shares: int) -> list[list[Member]]:
    """Consecutive rollouts up to the token budget, a prompt counted once per micro-batch."""
    members = [member for group in groups for member in _members(group, plan)]
    whole = plan.preference is not None
    starts = _starts(members, max_tokens, whole)
    if shares > 1:
        wanted = -(-len(starts) // shares) * shares
        # The smallest budget that needs no more micro-batches: the largest is then as small as can be.
        fair = 1 + bisect_left(
            range(1, max_tokens), True, key=lambda budget: len(_starts(members, budget, whole)) <= wanted
        )
        starts = _starts(members, fair, whole)
    return [members[start:end] for start, end in zip(starts, [*starts[1:], len(members)], strict=True)]


def _starts(members: Sequence[Member], max_tokens: int, whole: bool) -> list[int]:
    """Where each micro-batch begins: at a rollout, or with `whole` groups at the first of one."""
    numbers = _group_numbers(members)
    starts: list[int] = []
    used, place, last = 0, 0, -1
    for (number, _), together in groupby(
        enumerate(members), key=lambda at: (numbers[at[0]], 0 if whole else at[0])
    ):
        kept = [member for _, member in together]
        responses, prompt = sum(member.cost for member in kept), len(kept[0].group.prompt_ids)
        cost = responses + (0 if number == last else prompt)
        if not starts or used + cost > max_tokens:
            starts.append(place)
            used, cost = 0, responses + prompt
        used, place, last = used + cost, place + len(kept), number
    return starts


def _group_numbers(members: Sequence[Member]) -> list[int]:
    """Which group each member is of, counted from 0."""
    changes = (int(one.group is not other.group) for one, other in pairwise(members))
    return list(accumulate(changes, initial=0))


def _members(group: TrainingGroup, plan: Plan) -> list[Member]:
    advantages = _advantages(group, plan)
    return [
        Member(group, rollout, advantages[place])
        for rollout, place in zip(group.rollouts, group.places, strict=True)
    ]


def _advantages(group: TrainingGroup, plan: Plan) -> list[float]:
    """Advantage of every rollout of the prompt relative to the rewarded ones; NaN without a reward."""
    known = [place for place, reward in enumerate(group.rewards) if reward is not None]
    advantages = [float("nan")] * len(group.rewards)
    if plan.needs_reward and known:
        rewards = torch.tensor([group.rewards[place] for place in known], dtype=torch.float32)
        relative = group_advantages(rewards, torch.tensor([len(known)]), divide_by_std=plan.advantage_std)
        for place, advantage in zip(known, relative.tolist(), strict=True):
            advantages[place] = advantage
    return advantages


def _mask(part: Sequence[Member], plan: Plan) -> Tensor:
    """bool [T]: selected by the settings, and scored: by every view, or by one with "renormalise"."""
    reduce = np.logical_and.reduce if plan.missing_view == "drop" else np.logical_or.reduce
    scored = [
        reduce([_valid(score) for score in member.rollout.scores.values()])
        if member.rollout.scores
        else np.ones(member.rollout.length, dtype=np.bool_)
        for member in part
    ]
    lengths = torch.tensor([member.rollout.length for member in part])
    sampled = torch.from_numpy(np.concatenate([member.rollout.response_ids for member in part]))
    valid, wanted = torch.from_numpy(np.concatenate(scored)), token_mask(plan.tokens, lengths, sampled)
    if plan.preference is not None:
        return paired_positions(wanted, valid, lengths, **_pairing(part))
    mask = valid & wanted
    return mask & _marked(part, lengths) if plan.tokens.marked_only else mask


def _weights(
    parts: Sequence[Sequence[Member]], masks: Sequence[Tensor], lengths: Sequence[Tensor], plan: Plan
) -> list[Tensor]:
    """f32 [T] of every part: the share that a position's loss has in the step's.

    With a preference the unit is the group: 1 over the groups that have a pair, at all of their positions.
    """
    if plan.preference is not None:
        trained = sum(
            paired_groups(mask, sizes, _pairing(part)["groups"])
            for part, mask, sizes in zip(parts, masks, lengths, strict=True)
        )
        return [mask.to(torch.float32) / trained for mask in masks]
    total_tokens = sum(int(mask.sum()) for mask in masks)
    total_sequences = sum(
        _selected_sequences(mask, sizes) for mask, sizes in zip(masks, lengths, strict=True)
    )
    return [
        position_weights(
            mask, sizes, plan.normalisation, total_tokens=total_tokens, total_sequences=total_sequences
        )
        for mask, sizes in zip(masks, lengths, strict=True)
    ]


def _pairing(part: Sequence[Member]) -> dict[str, Tensor]:
    """Of every response, [B]: its group and whether it is guided."""
    return {
        "groups": torch.tensor(_group_numbers(part)),
        "guided": torch.tensor([member.rollout.guided for member in part]),
    }


def _selected_sequences(mask: Tensor, lengths: Tensor) -> int:
    """Sequences of which at least one position is selected."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return len(torch.unique(owner[mask]))


def _valid(score: SequenceScore) -> npt.NDArray[np.bool_]:
    assert score.valid is not None  # verified
    return score.valid


def _layout(part: Sequence[Member]) -> PackedLayout:
    """Every response after its prompt, then those of the auxiliary loss after their other context."""
    contexts: list[npt.NDArray[np.int32]] = []
    sequences: list[tuple[int, npt.NDArray[np.int32]]] = []
    last: TrainingGroup | None = None
    for member in part:
        if member.group is not last:
            contexts.append(member.group.prompt_ids)
            last = member.group
        sequences.append((len(contexts) - 1, member.rollout.response_ids))
    others: dict[bytes, int] = {}
    for member in part:
        ids = member.rollout.auxiliary_ids
        if ids is not None:
            place = others.setdefault(ids.tobytes(), len(contexts))
            if place == len(contexts):
                contexts.append(ids)
            sequences.append((place, member.rollout.response_ids))
    return build_layout(contexts, sequences)


def _auxiliary_index(part: Sequence[Member], lengths: Tensor) -> Tensor:
    """int64 [A]: positions of the responses that the auxiliary loss takes in, in their order."""
    taken = torch.tensor([member.rollout.auxiliary_ids is not None for member in part])
    return taken.repeat_interleave(lengths).nonzero().squeeze(1)


def _tokens(part: Sequence[Member], plan: Plan, mask: Tensor, lengths: Tensor, weight: Tensor) -> TokenBatch:
    advantages = torch.tensor([member.advantage for member in part], dtype=torch.float32)
    paid = [math.nan if (reward := member.rollout.reward) is None else reward for member in part]
    rewards = torch.tensor(paid, dtype=torch.float32)
    return TokenBatch(
        sampled_ids=_joined([member.rollout.response_ids.astype(np.int64) for member in part]),
        behaviour_logprobs=_joined([member.rollout.behaviour_logprobs for member in part]),
        mask=mask,
        weight=weight,
        views={view: _view(view, part, plan) for view in plan.view_requests},
        reward_advantage=advantages.repeat_interleave(lengths) if plan.needs_reward else None,
        view_factors={view: _factors(view, part, lengths) for view in plan.weight_fields},
        sequence_lengths=lengths,
        marked=_marked(part, lengths) if plan.tokens.marked_only else None,
        auxiliary_index=_auxiliary_index(part, lengths) if plan.auxiliary is not None else None,
        rewards=rewards.repeat_interleave(lengths) if plan.carries_rewards else None,
        **(_audit(part, plan.audit.chunk_tokens) if plan.audit is not None else {}),
        **(_pairing(part) if plan.preference is not None else {}),
    )


def _audit(part: Sequence[Member], chunk_tokens: int) -> dict[str, Tensor]:
    """Of every position, [T]: where its audited chunk begins, and the writer's agreement with it."""
    total = sum(member.rollout.length for member in part)
    anchor, agreement = np.full(total, -1, dtype=np.int64), np.full(total, np.nan, dtype=np.float32)
    begin = 0
    for member in part:
        anchors, found = member.rollout.anchors, member.rollout.agreement
        assert anchors is not None  # verified
        for number, start in enumerate(begin + anchors):
            anchor[start : start + chunk_tokens] = start
            agreement[start : start + chunk_tokens] = np.nan if found is None else found[number]
        begin += member.rollout.length
    return {"audit_anchor": torch.from_numpy(anchor), "agreement": torch.from_numpy(agreement)}


def _marked(part: Sequence[Member], lengths: Tensor) -> Tensor:
    return torch.tensor([member.rollout.marked for member in part]).repeat_interleave(lengths)


def _factors(view: str, part: Sequence[Member], lengths: Tensor) -> Tensor:
    factors = [member.group.view_weights[view] for member in part]
    return torch.tensor(factors, dtype=torch.float32).repeat_interleave(lengths)


def _view(view: str, part: Sequence[Member], plan: Plan) -> ViewTensors:
    _, signal = plan.view_requests[view]
    scores = [
        (member.rollout, member.rollout.scores.get(view) or _unscored(member.rollout, signal))
        for member in part
    ]
    supports = [_support(rollout, score, plan) for rollout, score in scores] if plan.k else []
    width = max((ids.shape[1] for ids, _ in supports), default=0)
    return ViewTensors(
        sampled=_joined([_masked(s, s.sampled) for _, s in scores]) if signal.sampled else None,
        entropy=_joined([_masked(s, s.entropy) for _, s in scores]) if signal.entropy else None,
        hidden=_joined([_states(s) for _, s in scores]) if signal.hidden_layers else None,
        support_ids=_joined([_padded(ids, width, PAD_ID) for ids, _ in supports]) if supports else None,
        support_logprobs=_joined([_padded(q, width, np.nan) for _, q in supports]) if supports else None,
    )


def _unscored(rollout: TrainingRollout, signal: Signal) -> SequenceScore:
    """The answer of a view that did not answer: no position is valid."""
    rows, candidates = rollout.length, rollout.candidate_ids
    nothing = np.full((rows, signal.top_k), np.nan, dtype=np.float32)
    return SequenceScore(
        id="",
        valid=np.zeros(rows, dtype=np.bool_),
        sampled=np.full(rows, np.nan, dtype=np.float32),
        entropy=np.full(rows, np.nan, dtype=np.float32),
        top_ids=np.full((rows, signal.top_k), PAD_ID, dtype=np.int32),
        top_logprobs=nothing,
        candidate_logprobs=None if candidates is None else np.full(candidates.shape, np.nan, np.float32),
    )


def _support(
    rollout: TrainingRollout, score: SequenceScore, plan: Plan
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Ids [R, K] without repetition in a row, and the teacher's log-probabilities of them."""
    ids: list[npt.NDArray[np.int64]] = []
    logprobs: list[npt.NDArray[np.float32]] = []
    if plan.support in ("teacher_topk", "union"):
        assert score.top_ids is not None  # verified
        ids.append(np.where(_valid(score)[:, None], score.top_ids, PAD_ID).astype(np.int64))
        logprobs.append(_masked(score, score.top_logprobs))
    if plan.support in ("student_topk", "union"):
        assert rollout.candidate_ids is not None  # verified
        candidates = rollout.candidate_ids.astype(np.int64)
        if ids:
            repeated = (candidates[:, :, None] == ids[0][:, None, :]).any(axis=2)
            candidates = np.where(repeated, PAD_ID, candidates)
        ids.append(candidates)
        logprobs.append(_masked(score, score.candidate_logprobs))
    return np.concatenate(ids, axis=1), np.concatenate(logprobs, axis=1)


def _states(score: SequenceScore) -> npt.NDArray[np.float16]:
    """float16 [R, L, H] with NaN where the engine had no score."""
    assert score.hidden is not None  # verified
    return np.where(_valid(score)[:, None, None], score.hidden, np.float16(np.nan)).astype(np.float16)


def _masked(score: SequenceScore, values: npt.NDArray[np.floating] | None) -> npt.NDArray[np.float32]:
    """float32 with NaN where the engine had no score, whatever it wrote there."""
    assert values is not None  # verified
    valid = _valid(score).reshape(-1, *([1] * (values.ndim - 1)))
    return np.where(valid, values, np.nan).astype(np.float32)


def _padded(array: npt.NDArray[np.generic], width: int, fill: float) -> npt.NDArray[np.generic]:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


def _joined(arrays: Sequence[npt.NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))
