"""A judge's judgements as the rewards of a run: how the plan asks for them, and what may become a reward."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.training_groups import IDENTITY, make_expectations, make_group, make_scores, scored
from tutelage_client.types import Identity, Limits, Score, SequenceError, SequenceScore, Signal

from student_trainer.batch import pack_step
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.config_errors import RunFileError
from student_trainer.objective.compile import check_limits, compile_plan
from student_trainer.objective.plan import Plan
from student_trainer.objective.settings import ObjectiveError, ObjectiveSettings
from student_trainer.verify import RefusedGroupError, TrainingGroup, verify_group

REFEREE = replace(IDENTITY, name="referee", engine="transformers-judge")


def make_plan(**settings: Any) -> Plan:
    row = ObjectiveSettings.model_validate({"judge": "referee", **settings})
    return compile_plan(row, student_temperature=1.0, teachers=["big", "referee"])


ALONE = make_plan(preset="grpo")
BESIDE = make_plan(mix="add", reward_coefficient=0.5)


def judged(*judgements: float | None, identity: Identity = REFEREE) -> Score:
    silent = SequenceError("OUT_OF_RANGE", "judge: last line is ''")
    answers = [
        SequenceScore(str(place), silent) if judgement is None
        else SequenceScore(str(place), judgement=judgement, verdict="Score")
        for place, judgement in enumerate(judgements)
    ]  # fmt: skip
    return Score(tuple(answers), identity)


def verified(
    plan: Plan, score: Score | None, *, errors: dict[str, str] | None = None, rewards: Any = None
) -> TrainingGroup:
    group = make_group(0, plan, lengths=(3, 5, 2), rewards=rewards)
    scores = {view: make_scores(group, plan, view) for view in plan.view_requests}
    if score is not None:
        scores["judge"] = score
    return verify_group(scored(group, scores, errors), make_expectations(plan), {})


def test_the_judge_is_asked_beside_the_views_and_no_view_falls_to_it() -> None:
    asked = ("referee", Signal(sampled=False, judgement=True))
    assert dict(ALONE.requests) == {"judge": asked}
    assert not ALONE.view_requests
    assert dict(BESIDE.requests) == {"teacher": ("big", Signal()), "judge": asked}
    assert BESIDE.scoring_teachers == ("big", "referee")
    assert ALONE.teacher_of("judge", "any tag") == "referee"


def test_judgements_are_the_rewards_in_place_of_the_checkers() -> None:
    for plan in (ALONE, BESIDE):
        group = verified(plan, judged(0.0, 1.0, 0.25), rewards=(1.0, 0.0, 0.0))
        assert group.rewards == (0.0, 1.0, 0.25)
        assert [rollout.reward for rollout in group.rollouts] == [0.0, 1.0, 0.25]
        assert "judge" not in group.rollouts[0].scores


def test_a_response_without_a_judgement_has_no_reward_and_is_no_zero() -> None:
    group = verified(ALONE, judged(0.5, None, 1.0))
    assert group.rewards == (0.5, None, 1.0)
    (micro_batch,) = pack_step([group], ALONE, 1000)
    advantages = [member.advantage for member in micro_batch.members]
    assert advantages[1] != advantages[1], "NaN: it is not trained on"
    assert advantages[0] == -advantages[2] != 0


def test_a_group_of_which_nothing_was_judged_is_refused() -> None:
    with pytest.raises(
        RefusedGroupError, match="no rollout was judged: view 'judge': OUT_OF_RANGE"
    ) as refusal:
        verified(ALONE, judged(None, None, None))
    assert refusal.value.reason == "no_score"
    with pytest.raises(RefusedGroupError, match="view 'judge': dead") as refusal:
        verified(make_plan(mix="add", views=TWO, missing_view="renormalise"), None, errors={"judge": "dead"})
    assert refusal.value.reason == "failed"


TWO = {"a": {"weights": "teacher:big", "coefficient": 0.5}, "b": {"weights": "initial", "coefficient": 0.5}}


@pytest.mark.parametrize(
    ("score", "reason", "message"),
    [
        (None, "shape", "view 'judge': there is no score"),
        (judged(0.5, 0.5), "shape", "got 2 scores for 3 rollouts"),
        (judged(0.5, 1.5, 0.5), "shape", "judgement: got 1.5"),
        (judged(0.5, float("nan"), 0.5), "shape", "judgement: got nan"),
        (judged(0.5, 0.5, 0.5, identity=IDENTITY), "identity", "asked of 'referee'"),
        (
            judged(0.5, 0.5, 0.5, identity=replace(REFEREE, tokenizer_fingerprint="0" * 64)),
            "identity",
            "token ids of one mean other text",
        ),
    ],
)
def test_what_is_no_judgement_of_this_group_is_refused(
    score: Score | None, reason: str, message: str
) -> None:
    with pytest.raises(RefusedGroupError, match=message) as refusal:
        verified(ALONE, score)
    assert refusal.value.reason == reason


def test_log_probabilities_are_no_judgement() -> None:
    group = make_group(0, BESIDE, lengths=(3, 5, 2))
    score = replace(make_scores(group, BESIDE), identity=REFEREE)
    with pytest.raises(RefusedGroupError, match="judgement: got None"):
        verified(ALONE, score)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "thinking-machines"}, "objective.judge: set to 'referee', but it only acts with a mix"),
        (
            {"preset": "grpo", "judge": "nobody"},
            "objective.judge: got teacher 'nobody', allowed: big, referee",
        ),
        ({"mix": "add", "views": {"judge": {}}}, "the name is taken"),
        (
            {"mix": "add", "views": {"t": {"weights": "teacher:referee"}}},
            "got teacher 'referee', allowed: big",
        ),
    ],
)
def test_an_objective_that_cannot_be_judged_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        make_plan(**settings)


def test_only_a_judge_judges_and_it_does_nothing_else() -> None:
    judge, teacher = Limits(judge=True), Limits()
    assert check_limits(ALONE, "referee", judge) == []
    assert check_limits(ALONE, "referee", teacher) == ["objective.judge: teacher 'referee' is no judge"]
    assert check_limits(BESIDE, "big", teacher) == []
    (problem,) = check_limits(BESIDE, "big", judge)
    assert "the teacher is a judge, which answers no log-probability" in problem


def config(objective: dict[str, Any], *, task: str | None = "addition", **referee: Any) -> RunConfig:
    return parse_run_config(
        {
            "teachers": {"big": {"model": "m"}, "referee": {"model": "j", **referee}},
            "student": {"model": "s"},
            "data": {"path": "x.jsonl"} if task is None else {"task": task},
            "sampling": {"samples_per_prompt": 2},
            "objective": objective,
            "training": {"steps": 1},
        }
    )


@pytest.mark.parametrize("document", ["other-teachers.md", "vllm.md"])
def test_every_piece_of_a_run_file_in_the_guides_is_one(document: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / document).read_text()
    pieces = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    for piece in pieces:
        parse_run_config(
            {
                "teachers": {"big": {"model": "m"}},
                "student": {"model": "s"},
                "data": {"path": "x.jsonl"},
                "sampling": {"samples_per_prompt": 2},
                "objective": {"views": {"teacher": {"weights": "teacher:math"}}},
                "training": {"steps": 1},
                **tomllib.loads(piece),
            }
        )
    assert pieces


def test_a_run_file_names_its_judge_and_needs_no_answers_then() -> None:
    judge = {"largest": 5}
    plan = config({"preset": "grpo", "judge": "referee"}, task=None, judge=judge).plan()
    assert (plan.judge, plan.scoring_teachers) == ("referee", ("referee",))
    with pytest.raises(RunFileError, match=r"or objective\.judge"):
        config({"preset": "grpo"}, task=None, judge=judge)
    with pytest.raises(RunFileError, match=r"needs a section \[teachers\.referee\.judge\]"):
        config({"preset": "grpo", "judge": "referee"})
    with pytest.raises(RunFileError, match="a judge answers no log-probability"):
        config({"views": {"t": {"weights": "teacher:referee"}}}, judge=judge)
