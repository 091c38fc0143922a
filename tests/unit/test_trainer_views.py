"""Several views in the trainer: marks, routed teachers, factors of an example, views that did not answer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.training_groups import (
    IDENTITY,
    VOCAB,
    make_expectations,
    make_group,
    make_scores,
    scored,
    scored_group,
)
from tutelage.v1.rollout_pb2 import Group
from tutelage_client.types import Identity, Score, SequenceError, SequenceScore

from student_trainer.batch import MicroBatch, pack_step
from student_trainer.ledger import Ledger, TeacherPin
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.loss import objective_loss
from student_trainer.objective.settings import ObjectiveError, ObjectiveSettings
from student_trainer.verify import RefusedGroupError, TrainingGroup, verify_group

TEACHERS = ("big", "maths", "prose")
SAMPLED: dict[str, Any] = {"support": "sampled"}
TEACHER_TOP: dict[str, Any] = {"support": "teacher_topk", "k": 4, "estimator": "pathwise"}
STUDENT_TOP: dict[str, Any] = {"support": "student_topk", "k": 4, "estimator": "pathwise"}


def make_plan(views: dict[str, Any], **row: Any) -> Plan:
    settings = ObjectiveSettings.model_validate({"views": views, **row})
    return compile_plan(settings, student_temperature=1.0, teachers=TEACHERS, run="run")


def answered_by(name: str) -> Identity:
    return replace(IDENTITY, name=name, model=f"model of {name}")


def scores_of(group: Group, plan: Plan, view: str, teacher: str) -> Score:
    return make_scores(group, plan, view, identity=answered_by(teacher))


def verify(
    group: Group, plan: Plan, scores: dict[str, Score], errors: dict[str, str] | None = None
) -> TrainingGroup:
    return verify_group(scored(group, scores, errors), make_expectations(plan), {})


def loss_of(micro_batch: MicroBatch, plan: Plan) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, gradient and metrics of a fixed student."""
    torch.manual_seed(0)
    hidden = torch.randn(len(micro_batch.tokens.sampled_ids), 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCAB, 8, dtype=torch.float64)
    output = objective_loss(hidden, head, None, micro_batch.tokens, plan)
    output.loss.backward()
    assert hidden.grad is not None
    return float(output.loss.detach()), hidden.grad, output.metrics


# --- marks ---

MARKING = make_plan(
    {"self": {"weights": "ema", "context": {"user": "{success}"}, "missing": "same"}},
    tokens={"marked_only": True},
)


def marked_group(marks: tuple[bool, ...]) -> Group:
    group = make_group(0, MARKING, lengths=(3, 5))
    for rollout, mark in zip(group.rollouts, marks, strict=True):
        rollout.privileged_views.extend(["self"] if mark else [])
    return group


@pytest.mark.parametrize("marks", [(True, False), (False, True), (True, True)])
def test_only_responses_whose_context_was_built_are_trained_on(marks: tuple[bool, bool]) -> None:
    group = marked_group(marks)
    found = verify(group, MARKING, {"self": scores_of(group, MARKING, "self", "run.ema")})
    (micro_batch,) = pack_step([found], MARKING, 100)
    tokens = micro_batch.tokens
    assert tokens.marked is not None
    assert tokens.marked.tolist() == [marks[0]] * 3 + [marks[1]] * 5
    assert torch.equal(tokens.mask, tokens.marked)
    assert tokens.weight.sum() == pytest.approx(1.0), "the mean is over what is marked"
    assert loss_of(micro_batch, MARKING)[2]["positions"] == int(tokens.marked.sum())


def test_step_without_any_mark_has_nothing_to_train_on() -> None:
    group = marked_group((False, False))
    found = verify(group, MARKING, {"self": scores_of(group, MARKING, "self", "run.ema")})
    assert pack_step([found], MARKING, 100) == []


@pytest.mark.parametrize(("missing", "built"), [("same", ["other"]), ("error", [])])
def test_group_whose_contexts_are_not_the_plans_is_refused(missing: str, built: list[str]) -> None:
    view = {"weights": "ema", "context": {"user": "{solution}"}, "missing": missing}
    plan = make_plan({"self": view})
    group = make_group(0, plan)
    for rollout in group.rollouts:
        rollout.privileged_views.extend(built)
    with pytest.raises(RefusedGroupError, match=r"rollouts\[0\]\.privileged_views: got") as caught:
        verify(group, plan, {"self": scores_of(group, plan, "self", "run.ema")})
    assert caught.value.reason == "shape"


# --- routes ---

ROUTED = make_plan({"expert": {"route": {"algebra": "maths", "poem": "prose"}}})


def routed_group(tag: str, index: int = 0) -> Group:
    group = make_group(index, ROUTED)
    group.tag = tag
    return group


def test_each_tag_is_trained_on_its_own_teacher_and_pins_it() -> None:
    pins: dict[str, TeacherPin] = {}
    for index, (tag, teacher) in enumerate([("algebra", "maths"), ("poem", "prose"), ("algebra", "maths")]):
        group = routed_group(tag, index)
        score = scores_of(group, ROUTED, "expert", teacher)
        assert verify_group(scored(group, {"expert": score}), make_expectations(ROUTED), pins).rollouts
    assert {name: pin.model for name, pin in pins.items()} == {
        "maths": "model of maths",
        "prose": "model of prose",
    }
    moved = make_scores(group, ROUTED, "expert", identity=replace(answered_by("maths"), revision="r1"))
    with pytest.raises(RefusedGroupError, match=r"teacher 'maths': .* the run began with") as caught:
        verify_group(scored(group, {"expert": moved}), make_expectations(ROUTED), pins)
    assert caught.value.reason == "identity"


@pytest.mark.parametrize(
    ("tag", "teacher", "message"),
    [
        ("algebra", "prose", "scored by 'prose', asked of 'maths'"),
        ("song", "prose", "no teacher for tag 'song', allowed: algebra, poem"),
        ("", "prose", "no teacher for tag '', allowed: algebra, poem"),
    ],
)
def test_score_of_another_teacher_than_the_tags_is_refused(tag: str, teacher: str, message: str) -> None:
    group = routed_group(tag)
    with pytest.raises(RefusedGroupError, match=message) as caught:
        verify(group, ROUTED, {"expert": scores_of(group, ROUTED, "expert", teacher)})
    assert caught.value.reason == "identity"


def test_score_of_another_teacher_is_refused_without_a_route_too() -> None:
    plan = make_plan({"expert": {"weights": "teacher:maths"}})
    group = make_group(0, plan)
    with pytest.raises(RefusedGroupError, match="scored by 'prose', asked of 'maths'"):
        verify(group, plan, {"expert": scores_of(group, plan, "expert", "prose")})


# --- factors of an example ---

WEIGHTED = make_plan(
    {
        "a": {"weights": "teacher:maths", "weight_field": "trust"},
        "b": {"weights": "teacher:prose", "coefficient": 0.5},
    },
    target="losses",
)


def weighted(index: int, **factors: float) -> TrainingGroup:
    group = make_group(index, WEIGHTED)
    for view, factor in factors.items():
        group.view_weights[view] = factor
    scores = {v: scores_of(group, WEIGHTED, v, t) for v, t in (("a", "maths"), ("b", "prose"))}
    return verify(group, WEIGHTED, scores)


def test_factor_of_an_example_reaches_every_position_of_its_group() -> None:
    (micro_batch,) = pack_step([weighted(0, a=0.25), weighted(1, a=3.0)], WEIGHTED, 100)
    assert set(micro_batch.tokens.view_factors) == {"a"}
    assert micro_batch.tokens.view_factors["a"].tolist() == [0.25] * 8 + [3.0] * 8


def test_factor_scales_its_view_and_no_other() -> None:
    """Gradients are linear in the views' own losses: g(f) = f·g_a + g_b."""
    gradients = {f: loss_of(pack_step([weighted(0, a=f)], WEIGHTED, 100)[0], WEIGHTED)[1] for f in (0, 1, 4)}
    own = gradients[1] - gradients[0]
    assert own.abs().max() > 1e-3
    torch.testing.assert_close(gradients[4], gradients[0] + 4 * own, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("factors", [{}, {"a": math.nan}, {"a": -1.0}])
def test_group_without_a_usable_factor_is_refused(factors: dict[str, float]) -> None:
    with pytest.raises(RefusedGroupError, match=r"view_weights\['a'\]: got") as caught:
        weighted(0, **factors)
    assert caught.value.reason == "shape"


# --- views that did not answer ---

PAIR = {"maths": {"weights": "teacher:maths", "coefficient": 2.0}, "prose": {"weights": "teacher:prose"}}


def pair_scores(group: Group, plan: Plan, *views: str) -> dict[str, Score]:
    return {view: scores_of(group, plan, view, view) for view in views}


@pytest.mark.parametrize("row", [SAMPLED, TEACHER_TOP, STUDENT_TOP], ids=["sampled", "teacher", "student"])
def test_group_one_of_whose_views_failed_is_trained_on_the_other_with_its_whole_weight(
    row: dict[str, Any],
) -> None:
    """As if the view that answered had answered for both."""
    plan = make_plan(PAIR, target="losses", missing_view="renormalise", **row)
    group = make_group(0, plan)
    found = verify(group, plan, pair_scores(group, plan, "maths"), {"prose": "INTERNAL: gone"})
    assert found.missing_views == ("prose",)
    (micro_batch,) = pack_step([found], plan, 100)
    sampled = micro_batch.tokens.views["prose"].sampled
    assert sampled is not None
    assert torch.isnan(sampled).all()
    _, gradient, metrics = loss_of(micro_batch, plan)
    assert metrics["renormalised"] == metrics["positions"] == 8
    both = make_plan({"maths": PAIR["maths"], "prose": {"weights": "teacher:maths"}}, target="losses", **row)
    scores = {view: scores_of(group, both, view, "maths") for view in both.views}
    (expected,) = pack_step([verify(group, both, scores)], both, 100)
    torch.testing.assert_close(gradient, loss_of(expected, both)[1])


def test_response_that_one_view_could_not_score_goes_on_beside_its_siblings() -> None:
    plan = make_plan(PAIR, target="losses", missing_view="renormalise")
    group = make_group(0, plan, lengths=(3, 5))
    scores = pair_scores(group, plan, "maths", "prose")
    bad = SequenceScore(id="0", error=SequenceError("INVALID_ARGUMENT", "too long"))
    scores["prose"] = replace(scores["prose"], sequences=(bad, scores["prose"].sequences[1]))
    found = verify(group, plan, scores)
    assert (found.places, found.missing_views) == ((0, 1), ("prose",))
    (micro_batch,) = pack_step([found], plan, 100)
    sampled = micro_batch.tokens.views["prose"].sampled
    assert sampled is not None
    nowhere = torch.isnan(sampled)
    assert nowhere.tolist() == [True] * 3 + [False] * 5
    assert loss_of(micro_batch, plan)[2]["renormalised"] == 3
    dropping = make_plan(PAIR, target="losses")
    assert verify(group, dropping, scores).places == (1,), "which is what happens without the setting"


@pytest.mark.parametrize(("how", "trained"), [("drop", 7), ("renormalise", 8)])
def test_position_that_one_view_could_not_score(how: str, trained: int) -> None:
    plan = make_plan(PAIR, target="losses", missing_view=how)
    group = make_group(0, plan, lengths=(3, 5))
    scores = pair_scores(group, plan, "maths", "prose")
    first = scores["prose"].sequences[0]
    valid = np.array([True, False, True])
    scores["prose"] = replace(
        scores["prose"], sequences=(replace(first, valid=valid), scores["prose"].sequences[1])
    )
    (micro_batch,) = pack_step([verify(group, plan, scores)], plan, 100)
    assert int(micro_batch.tokens.mask.sum()) == trained
    metrics = loss_of(micro_batch, plan)[2]
    assert (metrics["positions"], metrics.get("renormalised", 0)) == (trained, trained - 7)


def test_group_is_dropped_where_no_view_answered_or_the_plan_says_so() -> None:
    group = make_group(0, make_plan(PAIR, target="losses"))
    for how, views in (("drop", ("maths",)), ("renormalise", ())):
        plan = make_plan(PAIR, target="losses", missing_view=how)
        errors = {view: "INTERNAL: gone" for view in plan.views if view not in views}
        with pytest.raises(RefusedGroupError, match="view 'prose': INTERNAL: gone") as caught:
            verify(group, plan, pair_scores(group, plan, *views), errors)
        assert caught.value.reason == "failed"


def test_ledger_keeps_how_many_groups_went_without_a_view() -> None:
    ledger = Ledger(settings={})
    ledger.missing_views.update(("prose", "prose"))
    assert Ledger.from_json(ledger.to_json()).missing_views == {"prose": 2}


def test_plain_plans_are_as_they_were() -> None:
    plan = make_plan({"teacher": {"weights": "teacher:big"}})
    found = verify_group(scored_group(0, plan), make_expectations(plan), {})
    tokens = pack_step([found], plan, 100)[0].tokens
    assert (tokens.marked, dict(tokens.view_factors), found.missing_views) == (None, {}, ())


# --- what would make a step of one example not finite ---


@pytest.mark.parametrize("target", ["mixture", "losses"])
def test_example_whose_factors_are_all_zero_is_trained_on_its_reward_alone(target: str) -> None:
    """It has nothing to distil, and must not make the student look as if it had diverged."""
    views = {
        name: {"weights": f"teacher:{name}", "coefficient": 0.5, "weight_field": "trust"}
        for name in ("maths", "prose")
    }
    plan = make_plan(views, target=target, mix="route", **STUDENT_TOP)
    found = {}
    for factor in (0.0, 1.0):
        group = make_group(0, plan, rewards=(1.0, 0.0))
        group.view_weights.update(dict.fromkeys(views, factor))
        group_scores = pair_scores(group, plan, "maths", "prose")
        found[factor] = loss_of(pack_step([verify(group, plan, group_scores)], plan, 100)[0], plan)
    assert found[0.0][2]["distilled"] == 0
    assert found[0.0][2]["positions"] == 8
    torch.testing.assert_close(found[0.0][1], found[1.0][1])  # where the reward decides, factors do not


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"missing_view": "renormalise"}, 'missing_view: got "renormalise" with ratio'),
        ({"views": {"weight_field": "trust"}}, r"objective.views.prose.weight_field: set with ratio"),
        ({"views": {"clip": 1.0}}, r"objective.views.prose.clip: set with ratio"),
    ],
)
def test_ratio_of_two_views_needs_both_as_they_are(row: dict[str, Any], named: str) -> None:
    """One that did not answer would leave NaN, and factors would do nothing."""
    row = dict(row)
    views = {
        "maths": {"weights": "teacher:maths"},
        "prose": {"weights": "teacher:prose", **row.pop("views", {})},
    }
    with pytest.raises(ObjectiveError, match=named):
        make_plan(views, ratio="first_over_second", mix="multiply", **row)
