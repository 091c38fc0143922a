"""The consistency loss: the same responses under two contexts in one packed forward, against plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training_groups import make_expectations, make_group, make_plan, make_scores, scored
from support.training_run import write_model
from torch import Tensor
from tutelage.v1.rollout_pb2 import Group
from tutelage_client.codec import pack_ids

from student_trainer import train
from student_trainer.batch import MicroBatch, idle_batch, pack_step
from student_trainer.config import parse_run_config
from student_trainer.exchange import decode_micro_batches, encode_micro_batches
from student_trainer.learner import Learner
from student_trainer.objective.compile import Plan
from student_trainer.objective_pass import ObjectivePass
from student_trainer.sections import StudentSettings, TrainingSettings
from student_trainer.student import Student, load_student
from student_trainer.verify import RefusedGroupError, TrainingGroup, TrainingRollout, verify_group

AUXILIARY: dict[str, Any] = {
    "kind": "consistency",
    "context": {"user": "{answer} {prompt}"},
    "coefficient": 0.7,
    "missing": "same",
}


def plan_of(**more: Any) -> Plan:
    return make_plan(correction={"kind": "importance"}, auxiliary={**AUXILIARY, **more})


def make_groups(plan: Plan, *, without: int | None = None) -> list[TrainingGroup]:
    """Two groups of two responses; of the second group both have one context, response `without` has none."""
    groups = []
    for index in range(2):
        group = make_group(index, plan)
        random = np.random.default_rng(index)
        shared = pack_ids(random.integers(3, 32, 6))
        for place, rollout in enumerate(group.rollouts):
            own = pack_ids(random.integers(3, 32, 5 + place))
            if 2 * index + place != without:
                rollout.auxiliary_context_ids = shared if index else own
        groups.append(verify(group, plan))
    return groups


def verify(group: Group, plan: Plan, positions: int | None = None) -> TrainingGroup:
    scores = {view: make_scores(group, plan, view) for view in plan.view_requests}
    expected = replace(make_expectations(plan), max_positions=positions)
    return verify_group(scored(group, scores), expected, {})


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    model = write_model(tmp_path_factory.mktemp("student"), seed=1)
    return load_student(StudentSettings(model=str(model), device="cpu"))


def plain_logprobs(student: Student, context: Any, response: Any) -> Tensor:
    """[R, V], of one sequence alone."""
    ids = torch.from_numpy(np.concatenate([context, response]).astype(np.int64))[None]
    logits: Tensor = student.model(input_ids=ids).logits[0]
    return logits[len(context) - 1 : -1].float().log_softmax(-1)


def gradients(student: Student, loss: Tensor) -> dict[str, Tensor]:
    student.model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.clone() for name, parameter in student.trained() if parameter.grad is not None
    }


def passed(student: Student, plan: Plan, batches: list[MicroBatch]) -> tuple[Tensor, dict[str, float]]:
    total, sums = torch.zeros(()), {"consistency": 0.0, "consistent": 0.0, "positions": 0.0}
    for batch in batches:
        out = ObjectivePass(student)(batch.layout, batch.tokens, plan)
        total = total + out.loss
        for name in sums:
            sums[name] += out.output.metrics.get(name, 0.0)
    return total, sums


@pytest.mark.parametrize("budget", [10_000, 30], ids=["one", "several"])
@pytest.mark.parametrize("without", [None, 1], ids=["all", "one response without"])
def test_it_adds_the_divergence_from_the_student_without_the_context(
    student: Student, without: int | None, budget: int
) -> None:
    plan = plan_of()
    groups = make_groups(plan, without=without)
    batches = pack_step(groups, plan, budget)
    assert (len(batches) > 1) == (budget == 30)
    loss, sums = passed(student, plan, batches)
    found = gradients(student, loss)

    expected, positions, tokens = passed(student, replace(plan, auxiliary=None), batches)[0], 0, 0
    value = torch.zeros(())
    for group in groups:
        for rollout in group.rollouts:
            tokens += rollout.length
            if rollout.auxiliary_ids is None:
                continue
            fixed = plain_logprobs(student, group.prompt_ids, rollout.response_ids).detach()
            under = plain_logprobs(student, rollout.auxiliary_ids, rollout.response_ids)
            value = value + (fixed.exp() * (fixed - under)).sum()
            positions += rollout.length
    expected = expected + 0.7 * value / tokens
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(student, expected).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert sums["consistent"] == positions
    assert sums["consistency"] == pytest.approx(float(value.detach()), rel=1e-4)
    assert sums["positions"] == tokens


def test_a_context_that_several_responses_share_is_computed_once() -> None:
    plan = plan_of()
    groups = make_groups(plan)
    (batch,) = pack_step(groups, plan, 10_000)
    prompts, contexts = 2 * 4, 5 + 6 + 6  # the second group's two responses share one
    assert batch.layout.num_rows == prompts + contexts + 2 * 2 * (2 + 4)
    assert len(batch.layout.score_rows) == 2 * len(batch.tokens.sampled_ids)


def test_the_token_budget_counts_both_contexts() -> None:
    plan = plan_of()
    groups = make_groups(plan)
    sizes = [batch.layout.num_rows for batch in pack_step(groups, plan, 30)]
    assert max(sizes) <= 30
    assert len(sizes) > len(pack_step(groups, replace(plan, auxiliary=None), 60))


def test_ranks_get_the_second_context_too(student: Student) -> None:
    plan = plan_of()
    batches = pack_step(make_groups(plan, without=0), plan, 40, shares=2)
    sent = decode_micro_batches(encode_micro_batches(batches))
    assert torch.equal(passed(student, plan, sent)[0], passed(student, plan, batches)[0])
    idle, sums = passed(student, plan, [idle_batch(batches[-1])])
    assert float(idle.detach()) == sums["consistent"] == 0


def test_training_brings_the_two_answers_together(tmp_path: Path) -> None:
    plan = plan_of(coefficient=5.0)
    own = load_student(StudentSettings(model=str(write_model(tmp_path, seed=1)), device="cpu"))
    settings = TrainingSettings.model_validate({"steps": 30, "learning_rate": 1e-2, "warmup_steps": 1})
    learner, groups = Learner(own, plan, settings), make_groups(plan)
    figures = [learner.step(groups, step).sums for step in range(15)]
    assert figures[-1]["consistency"] < 0.3 * figures[0]["consistency"]


def test_a_group_without_the_context_that_it_must_have_is_refused() -> None:
    plan = plan_of(missing="error")
    with pytest.raises(RefusedGroupError, match=r"rollouts\[0\].auxiliary_context_ids: is empty"):
        verify(make_group(0, plan), plan)
    group = make_group(0, plan)
    for rollout in group.rollouts:
        rollout.auxiliary_context_ids = pack_ids(np.array([5, 99]))
    with pytest.raises(RefusedGroupError, match="got ids from 5 to 99"):
        verify(group, plan)
    group.rollouts[0].auxiliary_context_ids = group.rollouts[1].auxiliary_context_ids = pack_ids([5, 6])
    found: TrainingRollout = verify(group, plan).rollouts[0]
    assert found.auxiliary_ids is not None
    assert found.auxiliary_ids.tolist() == [5, 6]


def test_a_response_too_long_under_the_context_is_left_out_alone() -> None:
    """As one whose privileged context is too long for a teacher, which the teacher refuses."""
    plan = plan_of()
    group = make_group(0, plan, lengths=(2, 3, 4, 9), rewards=(None, None, None, None))
    for rollout in group.rollouts[:3]:
        rollout.auxiliary_context_ids = pack_ids([5] * 6)
    group.rollouts[3].auxiliary_context_ids = b""
    whole = verify(group, plan)
    assert whole.places == (0, 1, 2, 3)
    for positions, places in ((10, (0, 1, 2, 3)), (9, (0, 1, 3)), (8, (0, 3)), (7, (3,))):
        found = verify(group, plan, positions)
        assert found.places == places
        kept = [whole.rollouts[place].response_ids.tolist() for place in places]
        assert [rollout.response_ids.tolist() for rollout in found.rollouts] == kept
    del group.rollouts[3]
    with pytest.raises(RefusedGroupError, match=r"rollouts\[0\]: got 8 tokens .* the student takes 7") as e:
        verify(group, plan, 7)
    assert e.value.reason == "no_score"


def test_the_trainer_knows_the_positions_of_its_student(student: Student) -> None:
    config = parse_run_config(
        {
            "teachers": {"big": {"model": "m"}},
            "student": {"model": "m"},
            "data": {"task": "addition"},
            "objective": {},
            "training": {"steps": 1},
        }
    )
    assert train._expectations(config, plan_of(), student).max_positions == 64


def test_the_context_must_be_another() -> None:
    for context in ("same", []):
        with pytest.raises(ValueError, match="give a template"):
            plan_of(context=context)
