"""What ranks tell each other, and how a step's work is divided among them."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import save_tiny_model
from support.training_groups import make_expectations, make_plan, scored_group
from tutelage_client.errors import TutelageError

from student_trainer.batch import MicroBatch, deal, idle_batch, pack_step
from student_trainer.exchange import (
    Outcome,
    decode_micro_batches,
    decode_outcomes,
    encode_micro_batches,
    encode_outcomes,
)
from student_trainer.learner import Learner
from student_trainer.objective.compile import Plan
from student_trainer.ranks import Ranks, join
from student_trainer.sections import StudentSettings, TrainingSettings
from student_trainer.sharding import check_positions
from student_trainer.student import load_student
from student_trainer.verify import TrainingGroup, verify_group

PLANS = {
    "sampled": make_plan(support="sampled", estimator="score_function"),
    "union": make_plan(support="union", k=8, tail="bucket", estimator="pathwise"),
    "reward": make_plan(preset="grpo"),
    "audit": make_plan(
        audit={"teacher": "writer", "chunks": 2, "chunk_tokens": 2},
        mix="route",
        support="teacher_topk",
        k=8,
        estimator="pathwise",
    ),
    "pairs": make_plan(
        preference={},
        normalisation="sequence_mean",
        views={"taught": {"weights": "teacher:big", "context": {"user": "{prompt} {solution}"}}},
    ),
}


def groups_of(plan: Plan, lengths: list[tuple[int, ...]]) -> list[TrainingGroup]:
    return [
        verify_group(
            scored_group(i, plan, lengths=each, rewards=tuple(float(j % 2) for j in range(len(each)))),
            make_expectations(plan),
            {},
        )
        for i, each in enumerate(lengths)
    ]


def assert_same(one: MicroBatch, other: MicroBatch) -> None:
    for name in ("input_ids", "position_ids", "score_rows", "response_ids"):
        assert torch.equal(getattr(one.layout, name), getattr(other.layout, name)), name
    assert one.layout.sequence_parts == other.layout.sequence_parts
    assert one.tokens.views.keys() == other.tokens.views.keys()
    assert one.tokens.view_factors.keys() == other.tokens.view_factors.keys()
    for view, factor in other.tokens.view_factors.items():
        assert torch.equal(one.tokens.view_factors[view], factor)
    pairs = [
        (one.tokens, other.tokens),
        *zip(one.tokens.views.values(), other.tokens.views.values(), strict=True),
    ]
    for left, right in pairs:
        for field in fields(left):
            got, wanted = getattr(left, field.name), getattr(right, field.name)
            if isinstance(wanted, torch.Tensor):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
                assert got.dtype == wanted.dtype
            elif field.name not in ("views", "view_factors"):
                assert got is wanted is None, field.name


def test_factors_of_views_come_through_as_they_were() -> None:
    (batch,) = pack_step(groups_of(PLANS["sampled"], [(3, 4)]), PLANS["sampled"], 99)
    tokens = replace(batch.tokens, view_factors={"a/b": torch.rand(7), "c": torch.rand(7)})
    (found,) = decode_micro_batches(encode_micro_batches([replace(batch, tokens=tokens)]))
    assert_same(found, replace(batch, tokens=tokens))
    assert idle_batch(replace(batch, tokens=tokens)).tokens.view_factors["c"].shape == (1,)


@pytest.mark.parametrize("name", PLANS)
def test_micro_batches_come_through_as_they_were(name: str) -> None:
    plan = PLANS[name]
    sent = pack_step(groups_of(plan, [(3, 5), (1,), (7, 2, 2)]), plan, max_tokens=14)
    sent.append(idle_batch(sent[0]))
    received = decode_micro_batches(encode_micro_batches(sent))
    assert len(received) == len(sent) > 2
    for one, other in zip(received, sent, strict=True):
        assert_same(one, other)


def test_more_than_ten_micro_batches_keep_their_order() -> None:
    plan = PLANS["sampled"]
    sent = pack_step(groups_of(plan, [(length,) for length in range(1, 14)]), plan, max_tokens=1)
    received = decode_micro_batches(encode_micro_batches(sent))
    assert [len(each.tokens.mask) for each in received] == list(range(1, 14))


def test_nothing_is_a_message_too() -> None:
    assert decode_micro_batches(encode_micro_batches([])) == []
    assert decode_outcomes(encode_outcomes([])) == []


def test_outcomes_come_through_exactly() -> None:
    trace = {"student_logprob": torch.tensor([-1.5, math.nan])}
    sent = [
        Outcome(0.1 + 0.2, {"positions": 2.0, "entropy": 1 / 3}, trace),
        Outcome(0.0, {}, {}, "the logits are not finite"),
        Outcome(math.pi, {"positions": 0.0}, {}),
    ]
    received = decode_outcomes(encode_outcomes(sent))
    assert [(o.loss, o.sums, o.diverged) for o in received] == [(o.loss, o.sums, o.diverged) for o in sent]
    torch.testing.assert_close(
        received[0].per_token["student_logprob"], trace["student_logprob"], equal_nan=True, rtol=0, atol=0
    )
    assert received[1].per_token == received[2].per_token == {}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_every_micro_batch_is_trained_once_and_the_work_is_even(world: int, max_tokens: int) -> None:
    plan = PLANS["sampled"]
    lengths = [(3 + i % 5, 9 - i % 7) for i in range(24)]
    micro_batches = pack_step(groups_of(plan, lengths), plan, max_tokens, shares=world)
    assert sum(int(each.tokens.mask.sum()) for each in micro_batches) == sum(map(sum, lengths))
    assert sum(float(each.tokens.weight.sum()) for each in micro_batches) == pytest.approx(1.0)
    assert all(len(each.layout.input_ids) <= max_tokens for each in micro_batches)
    shares = deal(micro_batches, world)
    assert sorted(number for share in shares for number in share) == list(range(len(micro_batches)))
    assert {len(share) for share in shares} == {len(micro_batches) // world}, "some rank would be idle"
    loads = [sum(micro_batches[number].layout.num_rows for number in share) for share in shares]
    assert max(loads) - min(loads) <= 20  # a rollout with its prompt, at most


def test_one_share_is_every_micro_batch_in_its_order() -> None:
    plan = PLANS["sampled"]
    groups = groups_of(plan, [(9,), (1,), (5, 5), (2,)])
    whole = pack_step(groups, plan, max_tokens=14)
    assert deal(whole, 1) == [list(range(len(whole)))]


def test_fewer_micro_batches_than_ranks_leave_some_without() -> None:
    plan = PLANS["sampled"]
    (only,) = pack_step(groups_of(plan, [(4,)]), plan, max_tokens=100, shares=3)
    assert deal([only], 3) == [[0], [], []]
    assert deal([], 3) == [[], [], []]
    assert not idle_batch(only).tokens.mask.any()
    assert not idle_batch(only).tokens.weight.any()


# What several ranks cannot work with.


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TutelageError, match=r"student\.device: got 'cuda:1'") as caught, join("cuda:1", 1.0):
        pass
    assert caught.value.code == "INVALID_ARGUMENT"


def test_model_without_packed_attention_is_refused(tmp_path: Path) -> None:
    """Its ranks would make different numbers of forward passes and wait for each other for ever."""
    student = load_student(StudentSettings(model=str(save_tiny_model(tmp_path, "bloom")), device="cpu"))
    settings = TrainingSettings.model_validate({"steps": 1})
    with pytest.raises(TutelageError, match="no packed attention") as caught:
        Learner(student, PLANS["sampled"], settings, Ranks(0, 2, torch.device("cpu")))
    assert caught.value.code == "FAILED_PRECONDITION"


def test_sequences_that_cannot_be_packed_are_refused() -> None:
    from support.tiny_models import tiny_model

    model = tiny_model("qwen3")
    model.config.rope_parameters = {
        "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16, "rope_theta": 1e4,
    }  # fmt: skip
    check_positions(model, 15)
    with pytest.raises(TutelageError, match="reaches position 16"):
        check_positions(model, 16)
