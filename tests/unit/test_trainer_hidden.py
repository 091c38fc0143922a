"""The hidden-state loss against its formula in plain torch, from what the queue brings on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import SMALL, tiny_model
from support.training_groups import (
    make_expectations,
    make_group,
    make_plan,
    make_scores,
    scored,
)
from support.training_run import write_model
from tutelage_client.types import Limits, Score, Signal

from services.models.packed import layer_states
from student_trainer.batch import MicroBatch, pack_step
from student_trainer.exchange import decode_micro_batches, encode_micro_batches
from student_trainer.learner import Learner
from student_trainer.objective.compile import check_limits
from student_trainer.objective.hidden import hidden_loss
from student_trainer.objective.plan import Plan
from student_trainer.objective.settings import ObjectiveError
from student_trainer.sections import StudentSettings, TrainingSettings
from student_trainer.student import load_student
from student_trainer.verify import Expectations, RefusedGroupError, TrainingGroup, verify_group

LENGTHS, WIDTH = (3, 6), SMALL.hidden
HIDDEN = {"layers": [1, 2], "coefficient": 3.0, "positions": 4}


def plan_of(**settings: Any) -> Plan:
    return make_plan(**{"hidden": HIDDEN, **settings})


PLAN = plan_of()


def directions(random: np.random.Generator, length: int, width: int = WIDTH) -> np.ndarray[Any, Any]:
    states = random.standard_normal((length, 2, width))
    return (states / np.linalg.norm(states, axis=-1, keepdims=True)).astype(np.float16)


def answered(group: Any, width: int = WIDTH) -> Score:
    random = np.random.default_rng(group.index)
    score = make_scores(group, PLAN)
    sequences = [
        replace(s, hidden=directions(random, length, width))
        for s, length in zip(score.sequences, LENGTHS, strict=True)
    ]
    return replace(score, sequences=tuple(sequences))


def expectations(width: int = WIDTH) -> Expectations:
    return replace(make_expectations(PLAN), hidden_size=width)


def trained(score: Score | None = None) -> TrainingGroup:
    group = make_group(1, PLAN, lengths=LENGTHS)
    return verify_group(scored(group, {"teacher": score or answered(group)}), expectations(), {})


def one_batch(group: TrainingGroup) -> MicroBatch:
    (micro_batch,) = pack_step([group], PLAN, 1000)
    return micro_batch


def test_the_plan_asks_its_only_view_for_the_layers() -> None:
    assert PLAN.view_requests["teacher"] == ("big", Signal(hidden_layers=(1, 2)))
    assert check_limits(PLAN, "big", Limits(hidden_layers=2, hidden_size=WIDTH)) == []
    (problem,) = check_limits(PLAN, "big", Limits(hidden_layers=1))
    assert "asks for layer 2, the teacher answers 1 layers" in problem


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"hidden": {"layers": []}}, ValueError, "at least 1 item"),
        ({"hidden": {"layers": [2, 1]}}, ValueError, "must be in ascending order"),
        ({"hidden": {"layers": [0, 1]}}, ValueError, "greater than 0"),
        ({"mix": "add", "distill_coefficient": 0.0}, ObjectiveError, "goes with one view"),
        (
            {"views": {"a": {"weights": "teacher:big"}, "b": {"weights": "initial"}}},
            ObjectiveError,
            "got 2 views",
        ),
    ],
)
def test_layers_and_views_that_do_not_go_together_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_of(**settings)


@pytest.mark.parametrize("width", [WIDTH // 2, 2 * WIDTH])
def test_states_of_another_width_are_refused(width: int) -> None:
    group = make_group(1, PLAN, lengths=LENGTHS)
    with pytest.raises(RefusedGroupError, match=r"hidden: got shape .* the student's states are"):
        verify_group(scored(group, {"teacher": answered(group, width)}), expectations(), {})
    with pytest.raises(RefusedGroupError, match="hidden: got shape None"):
        verify_group(scored(group, {"teacher": make_scores(group, PLAN)}), expectations(), {})


def test_loss_and_gradient_are_the_formulas_on_the_students_own_layers() -> None:
    """Packed student, teacher's float16; the last 4 of 3 and 6 positions, one of which has no score."""
    group = make_group(1, PLAN, lengths=LENGTHS)
    score = answered(group)
    second = score.sequences[1]
    assert second.valid is not None
    valid = second.valid.copy()
    valid[4] = False
    score = replace(score, sequences=(score.sequences[0], replace(second, valid=valid)))
    micro_batch = one_batch(trained(score))
    (micro_batch,) = decode_micro_batches(encode_micro_batches([micro_batch]))  # as another rank gets it

    model = tiny_model(seed=3)
    _, layers = layer_states(model, micro_batch.layout, (1, 2))
    states = {layer: found[micro_batch.layout.score_rows] for layer, found in layers.items()}
    output = hidden_loss(states, micro_batch.tokens, PLAN)
    output.loss.backward()
    gradient = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad.clone()

    model.zero_grad()
    prompt = np.frombuffer(group.prompt_ids, np.int32)
    expected, count = torch.zeros(()), 0
    for rollout, answer in zip(group.rollouts, score.sequences, strict=True):
        response = np.frombuffer(rollout.response_ids, np.int32)
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        plain = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        both = [plain.hidden_states[1][0], plain.last_hidden_state[0]]
        assert answer.hidden is not None
        assert answer.valid is not None
        for t in range(len(response)):
            if len(response) - t > 4 or not answer.valid[t]:
                continue
            count += 1
            for layer, rows in enumerate(both):
                student = rows[len(prompt) - 1 + t]
                difference = student / student.norm() - torch.from_numpy(answer.hidden[t, layer]).float()
                expected = expected + difference.square().sum() / WIDTH / 2
    scored_positions = sum(LENGTHS) - 1
    (3.0 * expected / scored_positions).backward()
    assert output.metrics["hidden_positions"] == count == 6
    torch.testing.assert_close(output.loss, 3.0 * expected / scored_positions)
    torch.testing.assert_close(torch.tensor(output.metrics["hidden"]), expected.detach())
    torch.testing.assert_close(gradient, model.get_parameter("model.layers.0.mlp.up_proj.weight").grad)


def test_equal_directions_cost_nothing_whatever_their_size() -> None:
    micro_batch = one_batch(trained())
    hidden = micro_batch.tokens.views["teacher"].hidden
    assert hidden is not None
    states = {layer: 7.0 * hidden[:, place].float() for place, layer in enumerate((1, 2))}
    assert float(hidden_loss(states, micro_batch.tokens, PLAN).loss) < 1e-6


def test_a_step_of_the_learner_adds_the_loss_to_the_objectives(tmp_path: Path) -> None:
    """The same student and groups, with the loss and without."""
    write_model(tmp_path / "student", seed=1)
    student, training = StudentSettings(model=str(tmp_path / "student")), TrainingSettings(steps=1)
    group, results = trained(), {}
    for name, plan in (("with", PLAN), ("without", replace(PLAN, hidden=None))):
        results[name] = Learner(load_student(student), plan, training).step([group], 0)
    beside = results["with"].sums["hidden"] / results["with"].sums["positions"]
    assert results["with"].sums["hidden_positions"] == 3 + 4
    assert results["with"].loss - results["without"].loss == pytest.approx(3.0 * beside, rel=1e-4)
    assert beside > 0.01
    assert "hidden" not in results["without"].sums
