"""Verification and packing: what may be trained on, and that every number lands on its own token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.training_groups import (
    FINGERPRINT,
    IDENTITY,
    VOCAB,
    make_expectations,
    make_group,
    make_plan,
    make_scores,
    scored,
    scored_group,
    teacher_logprobs,
)
from tutelage.v1.rollout_pb2 import Group
from tutelage_client.types import Score, SequenceError, SequenceScore

from student_trainer.batch import MicroBatch, pack_step
from student_trainer.ledger import TeacherPin
from student_trainer.objective.compile import Plan
from student_trainer.objective.loss import objective_loss
from student_trainer.verify import RefusedGroupError, TrainingGroup, verify_group

SAMPLED = make_plan()
TEACHER_TOP = make_plan(support="teacher_topk", k=4, estimator="pathwise")
STUDENT_TOP = make_plan(support="student_topk", k=4, estimator="pathwise")
UNION = make_plan(support="union", k=6, estimator="pathwise")
REWARD = make_plan(preset="grpo")
EVERY = {"sampled": SAMPLED, "teacher": TEACHER_TOP, "student": STUDENT_TOP, "union": UNION, "reward": REWARD}


def verified(index: int, plan: Plan, **how: object) -> TrainingGroup:
    return verify_group(scored_group(index, plan, **how), make_expectations(plan), {})


def refused(
    group: Group, score: Score | None, plan: Plan = SAMPLED, errors: dict[str, str] | None = None
) -> tuple[str, str]:
    with pytest.raises(RefusedGroupError) as caught:
        verify_group(
            scored(group, {} if score is None else {"teacher": score}, errors), make_expectations(plan), {}
        )
    return caught.value.reason, caught.value.message


@pytest.mark.parametrize("plan", EVERY.values(), ids=EVERY.keys())
def test_every_number_lands_on_its_token(plan: Plan) -> None:
    groups = [verified(i, plan, lengths=(1, 4, 2), rewards=(1.0, 0.0, 0.0)) for i in range(3)]
    teacher = torch.from_numpy(teacher_logprobs())
    for micro_batch in pack_step(groups, plan, max_tokens=25):
        tokens = micro_batch.tokens
        assert torch.equal(tokens.sampled_ids, micro_batch.layout.response_ids)
        expected = np.concatenate([m.rollout.behaviour_logprobs for m in micro_batch.members])
        assert torch.equal(tokens.behaviour_logprobs, torch.from_numpy(expected))
        for view in tokens.views.values():
            assert view.sampled is not None
            assert torch.equal(view.sampled, teacher[tokens.sampled_ids])
            if view.support_ids is not None and view.support_logprobs is not None:
                real = view.support_ids >= 0
                assert torch.equal(view.support_logprobs[real], teacher[view.support_ids[real]])


def test_prompt_is_packed_once_for_all_its_rollouts() -> None:
    (micro_batch,) = pack_step([verified(0, SAMPLED, lengths=(3, 5), prompt=4)], SAMPLED, max_tokens=100)
    assert micro_batch.layout.num_rows == 4 + (3 - 1) + (5 - 1)


def test_union_holds_no_id_twice() -> None:
    (micro_batch,) = pack_step([verified(i, UNION) for i in range(4)], UNION, max_tokens=1000)
    ids = micro_batch.tokens.views["teacher"].support_ids
    assert ids is not None
    for row in ids.tolist():
        real = [i for i in row if i >= 0]
        assert len(real) == len(set(real))
    assert (ids == -1).any()  # with 6 of 32 on each side some row overlaps
    top = np.argsort(-teacher_logprobs(), kind="stable")[:6]
    assert all(set(top.tolist()) <= set(row) for row in ids.tolist())


def test_micro_batches_keep_to_the_token_budget_and_lose_nothing() -> None:
    groups = [verified(i, SAMPLED, lengths=(2, 7, 3, 6), prompt=5) for i in range(5)]
    micro_batches = pack_step(groups, SAMPLED, max_tokens=20)
    assert len(micro_batches) > 5
    assert sum(len(m.tokens.sampled_ids) for m in micro_batches) == 5 * 18
    for micro_batch in micro_batches:
        assert micro_batch.layout.num_rows <= 20
    members = [member.rollout.response_ids.tolist() for m in micro_batches for member in m.members]
    assert members == [rollout.response_ids.tolist() for group in groups for rollout in group.rollouts]


@pytest.mark.parametrize("normalisation", ["token_mean", "sequence_mean"])
def test_weights_of_a_step_sum_to_one_however_it_is_cut(normalisation: str) -> None:
    plan = make_plan(normalisation=normalisation)
    groups = [verified(i, plan, lengths=(2, 7)) for i in range(4)]
    whole = pack_step(groups, plan, max_tokens=10_000)
    cut = pack_step(groups, plan, max_tokens=12)
    assert len(whole) == 1 < len(cut)
    joined = torch.cat([m.tokens.weight for m in cut])
    assert torch.equal(joined, whole[0].tokens.weight)
    assert float(joined.sum()) == pytest.approx(1.0)


def test_invalid_positions_are_masked_and_do_not_dilute_the_mean() -> None:
    group = make_group(0, TEACHER_TOP, lengths=(3, 2))
    score = make_scores(group, TEACHER_TOP)
    first = score.sequences[0]
    assert first.valid is not None
    assert first.top_logprobs is not None
    # What an engine writes where it has no score must not matter.
    valid = np.array([True, False, True])
    top = first.top_logprobs.copy()
    top[1] = 7.0
    broken = replace(first, valid=valid, top_logprobs=top)
    checked = verify_group(
        scored(group, {"teacher": replace(score, sequences=(broken, score.sequences[1]))}),
        make_expectations(TEACHER_TOP),
        {},
    )
    (micro_batch,) = pack_step([checked], TEACHER_TOP, max_tokens=100)
    assert micro_batch.tokens.mask.tolist() == [True, False, True, True, True]
    assert micro_batch.tokens.weight.tolist() == pytest.approx([0.25, 0.0, 0.25, 0.25, 0.25])
    view = micro_batch.tokens.views["teacher"]
    assert view.support_ids is not None
    assert view.support_logprobs is not None
    assert (view.support_ids[1] == -1).all()
    assert torch.isnan(view.support_logprobs[1]).all()


def test_step_without_a_valid_position_packs_to_nothing() -> None:
    group = make_group(0, SAMPLED, lengths=(2,))
    score = make_scores(group, SAMPLED)
    blank = replace(score.sequences[0], valid=np.zeros(2, dtype=np.bool_))
    checked = verify_group(
        scored(group, {"teacher": replace(score, sequences=(blank,))}), make_expectations(SAMPLED), {}
    )
    assert pack_step([checked], SAMPLED, max_tokens=100) == []


def test_rollout_that_was_not_scored_is_left_out_alone() -> None:
    plan = make_plan(mix="add", estimator="score_function")
    group = make_group(0, plan, lengths=(2, 3, 4), rewards=(1.0, 0.0, 0.0))
    score = make_scores(group, plan)
    bad = SequenceScore(id="1", error=SequenceError("INVALID_ARGUMENT", "too long"))
    score = replace(score, sequences=(score.sequences[0], bad, score.sequences[2]))
    checked = verify_group(scored(group, {"teacher": score}), make_expectations(plan), {})
    (micro_batch,) = pack_step([checked], plan, max_tokens=100)
    assert [member.rollout.length for member in micro_batch.members] == [2, 4]
    # The advantage is still relative to all three rewards.
    assert [round(member.advantage, 4) for member in micro_batch.members] == [0.6667, -0.3333]


def test_reward_advantage_reaches_every_token_of_its_rollout() -> None:
    checked = verified(0, REWARD, lengths=(2, 3), rewards=(1.0, 0.0))
    (micro_batch,) = pack_step([checked], REWARD, max_tokens=100)
    assert micro_batch.tokens.reward_advantage is not None
    signs = micro_batch.tokens.reward_advantage.sign().tolist()
    assert signs == [1.0, 1.0, -1.0, -1.0, -1.0]


def test_group_without_rewards_has_no_advantage_to_train_on() -> None:
    (micro_batch,) = pack_step([verified(0, REWARD, rewards=(None, None))], REWARD, max_tokens=100)
    assert micro_batch.tokens.reward_advantage is not None
    assert torch.isnan(micro_batch.tokens.reward_advantage).all()


Change = Callable[[Score], Score]


OTHER_TOKENIZER = replace(IDENTITY, tokenizer_fingerprint="0" * 64)


def cut(score: Score, positions: int) -> Score:
    sampled = score.sequences[0].sampled
    assert sampled is not None
    return first(score, sampled=sampled[:positions], valid=np.ones(positions, dtype=np.bool_))


def first(score: Score, **changes: object) -> Score:
    return replace(score, sequences=(replace(score.sequences[0], **changes), *score.sequences[1:]))


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (lambda s: replace(s, identity=OTHER_TOKENIZER), "identity", "tokenizer"),
        (lambda s: replace(s, sequences=s.sequences[::-1]), "shape", "sequence '1'"),
        (lambda s: replace(s, sequences=s.sequences[:1]), "shape", "1 scores for 2 rollouts"),
        (lambda s: cut(s, 2), "shape", "2 positions"),
        (lambda s: first(s, sampled=None), "shape", "sampled: got shape None"),
    ],
    ids=["tokenizer", "swapped", "missing", "short", "no sampled"],
)  # fmt: skip
def test_score_that_is_not_what_was_asked_for_is_refused(change: Change, reason: str, message: str) -> None:
    group = make_group(0, SAMPLED)
    got = refused(group, change(make_scores(group, SAMPLED)))
    assert got[0] == reason
    assert message in got[1]


@pytest.mark.parametrize("strange", [-2, 7], ids=["negative", "repeated"])
def test_support_that_cannot_be_one_is_refused(strange: int) -> None:
    group = make_group(0, TEACHER_TOP)
    score = make_scores(group, TEACHER_TOP)
    top = score.sequences[0].top_ids
    assert top is not None
    broken = np.array([[7, strange, 8, 9]] * len(top), dtype=np.int32)
    got = refused(group, first(score, top_ids=broken), TEACHER_TOP)
    assert got[0] == "shape"
    assert "top_ids" in got[1]


@pytest.mark.parametrize("plan", [TEACHER_TOP, UNION], ids=["teacher", "union"])
def test_teacher_ids_that_the_student_has_no_row_for_are_left_to_the_tail(plan: Plan) -> None:
    """Heads of one tokenizer are padded to different sizes; such an id must not end the run."""
    group = make_group(0, plan)
    score = make_scores(group, plan)
    top = score.sequences[0].top_ids
    assert top is not None
    padded = top.copy()
    padded[0, 1], padded[1] = VOCAB + 5, range(VOCAB, VOCAB + plan.k)
    checked = verify_group(
        scored(group, {"teacher": first(score, top_ids=padded)}), make_expectations(plan), {}
    )
    (micro_batch,) = pack_step([checked], plan, max_tokens=1000)
    ids = micro_batch.tokens.views["teacher"].support_ids
    assert ids is not None
    assert ids[0, : plan.k].tolist() == [int(i) if k != 1 else -1 for k, i in enumerate(top[0])]
    torch.manual_seed(0)
    hidden, head = torch.randn(len(ids), 8), torch.randn(VOCAB, 8)
    output = objective_loss(hidden, head, None, micro_batch.tokens, plan)
    assert torch.isfinite(output.loss)
    assert output.metrics["dropped_teacher"] == (1 if plan is TEACHER_TOP else 0)


@pytest.mark.parametrize("changed", [{"weights_version": 1}, {"revision": "r1"}, {"model": "other"}])
def test_teacher_that_changes_during_a_run_is_refused(changed: dict[str, object]) -> None:
    pins: dict[str, TeacherPin] = {}
    verify_group(scored_group(0, SAMPLED), make_expectations(SAMPLED), pins)
    assert pins["big"] == TeacherPin("m", "r0", 0, FINGERPRINT)
    group = make_group(1, SAMPLED)
    other = make_scores(group, SAMPLED, identity=replace(IDENTITY, **changed))
    with pytest.raises(RefusedGroupError, match="the run began with") as caught:
        verify_group(scored(group, {"teacher": other}), make_expectations(SAMPLED), pins)
    assert caught.value.reason == "identity"


def test_failed_group_is_refused_with_the_teachers_error() -> None:
    assert refused(make_group(0, SAMPLED), None, errors={"teacher": "INTERNAL: out of memory"}) == (
        "failed",
        "view 'teacher': INTERNAL: out of memory",
    )


def test_group_without_the_score_of_a_view_is_refused() -> None:
    assert refused(make_group(0, SAMPLED), None) == ("shape", "view 'teacher': there is no score")


def test_group_none_of_whose_rollouts_was_scored_is_refused() -> None:
    group = make_group(0, SAMPLED, lengths=(2,))
    bad = SequenceScore(id="0", error=SequenceError("INVALID_ARGUMENT", "too long"))
    score = replace(make_scores(group, SAMPLED), sequences=(bad,))
    assert refused(group, score) == (
        "no_score",
        "no rollout was scored: view 'teacher': INVALID_ARGUMENT: too long",
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: setattr(g, "temperature", 0.7),
        lambda g: setattr(g, "id", "run-5"),
        lambda g: setattr(g, "run", "other"),
        lambda g: setattr(g, "prompt_ids", b""),
        lambda g: setattr(g, "prompt_ids", b"abc"),
        lambda g: setattr(g.rollouts[0], "response_ids", b""),
        lambda g: setattr(g.rollouts[0], "response_ids", np.array([1, 2, VOCAB], "<i4").tobytes()),
        lambda g: setattr(g.rollouts[0], "behaviour_logprobs", b"\0" * 8),
        lambda g: setattr(g.rollouts[0], "num_candidates", 3),
        lambda g: setattr(g.rollouts[0], "candidate_ids", g.rollouts[0].candidate_ids[:-16]),
    ],
)
def test_group_that_contradicts_itself_is_refused(spoil: Callable[[Group], None]) -> None:
    group = make_group(0, STUDENT_TOP)
    score = make_scores(group, STUDENT_TOP)
    spoil(group)
    assert refused(group, score, STUDENT_TOP)[0] == "shape"


def test_micro_batch_layout_matches_its_tokens() -> None:
    for micro_batch in pack_step([verified(i, STUDENT_TOP) for i in range(3)], STUDENT_TOP, max_tokens=20):
        assert isinstance(micro_batch, MicroBatch)
        assert len(micro_batch.layout.score_rows) == len(micro_batch.tokens.sampled_ids)
        lengths = [member.rollout.length for member in micro_batch.members]
        assert micro_batch.tokens.sequence_lengths is not None
        assert micro_batch.tokens.sequence_lengths.tolist() == lengths
