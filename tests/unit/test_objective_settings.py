"""Settings are strict, presets are data with a source, and signals follow from the objective."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from support.preset_problem import required
from tutelage_client.types import Limits, Signal

from student_trainer.objective import presets
from student_trainer.objective.compile import check_limits, compile_plan
from student_trainer.objective.settings import ObjectiveError, ObjectiveSettings


def plan_of(teachers: tuple[str, ...] = ("big",), temperature: float = 1.0, **settings: Any) -> Any:
    chosen = ObjectiveSettings.model_validate(settings)
    return compile_plan(chosen, student_temperature=temperature, teachers=teachers)


def test_unknown_keys_are_refused_at_every_level() -> None:
    for settings in (
        {"divergense": "jsd"},
        {"views": {"teacher": {"weight": "teacher"}}},
        {"correction": {"kind": "ppo", "cap": 2.0}},
        {"tokens": {"skip": 3}},
    ):
        with pytest.raises(ValidationError, match=r"extra|Extra"):
            ObjectiveSettings.model_validate(settings)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_compiles_and_says_where_it_comes_from(name: str) -> None:
    preset = presets.load(name)
    assert preset.name == name
    assert len(preset.source) > 20
    named = [view["weights"].partition(":")[2] for view in preset.objective.get("views", {}).values()]
    writers = (required(name)["audit"]["teacher"],) if "audit.teacher" in preset.requires else ()
    teachers = (tuple(filter(None, named)) or ("big",)) + writers
    assert plan_of(preset=name, teachers=teachers, **required(name)).preset == name


def test_presets_are_the_published_rows() -> None:
    assert set(presets.names()) >= {"thinking-machines", "gkd", "many-faces", "grpo"}
    thinking = plan_of(preset="thinking-machines")
    assert (thinking.divergence, thinking.support, thinking.estimator, thinking.horizon) == (
        "kl_student_teacher",
        "sampled",
        "score_function",
        0,
    )
    assert (thinking.correction.kind, thinking.correction.cap) == ("importance", None)
    gkd = plan_of(preset="gkd")
    assert (gkd.divergence, gkd.beta, gkd.support, gkd.tail, gkd.estimator) == (
        "jsd",
        0.5,
        "teacher_topk",
        "bucket",
        "pathwise",
    )
    faces = plan_of(preset="many-faces")
    assert (faces.divergence, faces.support, faces.tail) == (
        "kl_student_teacher",
        "student_topk",
        "stop_gradient",
    )


def test_set_keys_override_the_preset_and_orphaned_preset_keys_are_dropped() -> None:
    assert plan_of(preset="gkd", beta=0.25, k=8).beta == 0.25
    full = plan_of(preset="gkd", support="full")
    assert (full.support, full.k, full.in_process, full.view_requests) == ("full", 0, True, {})
    assert plan_of(preset="gkd", divergence="kl_student_teacher").divergence == "kl_student_teacher"


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ObjectiveError, match="did you mean 'many-faces'"):
        plan_of(preset="many-face")


@pytest.mark.parametrize(
    ("settings", "signal", "student_candidates"),
    [
        ({"preset": "thinking-machines"}, Signal(), 0),
        ({"preset": "gkd", "k": 16, "monitor": False}, Signal(sampled=False, top_k=16), 0),
        ({"preset": "gkd", "k": 16}, Signal(top_k=16), 0),
        ({"preset": "many-faces", "k": 9, "monitor": False}, Signal(sampled=False, candidates=True), 9),
        (
            {"preset": "gkd", "k": 7, "support": "union", "monitor": False},
            Signal(sampled=False, top_k=7, candidates=True),
            7,
        ),
        ({"tokens": {"teacher_entropy_above": 0.5}}, Signal(entropy=True), 0),
        ({"mix": "multiply", "entropy_factor": 0.5, "ratio_gate": "rewarded"}, Signal(entropy=True), 0),
        ({"preset": "ta-opd", "k": 5}, Signal(candidates=True), 5),
        ({"preset": "iw-opd"}, Signal(), 0),
    ],
)
def test_signals_are_compiled_from_the_objective(
    settings: dict[str, Any], signal: Signal, student_candidates: int
) -> None:
    plan = plan_of(**settings)
    assert plan.view_requests == {"teacher": ("big", signal)}
    assert plan.student_candidates == student_candidates


def test_reward_only_control_needs_no_teacher() -> None:
    plan = plan_of(preset="grpo", teachers=())
    assert not plan.needs_teacher
    assert plan.needs_reward
    assert plan.view_requests == {}
    assert plan.views == {}


def test_teacher_is_asked_at_the_sampling_temperature() -> None:
    assert plan_of(preset="gkd", temperature=0.7).view_requests["teacher"][1].temperature == 0.7
    assert plan_of(preset="gkd", temperature=0.7, **{}).temperature == 0.7
    with pytest.raises(ObjectiveError, match=r"objective\.temperature: got 1\.0"):
        compile_plan(ObjectiveSettings(preset="thinking-machines", temperature=1.0), student_temperature=0.7)
    separate = compile_plan(ObjectiveSettings(preset="gkd", temperature=1.1), student_temperature=0.7)
    assert separate.temperature == 1.1
    assert not separate.behaviour_comparable
    assert "objective.temperature = 1.1 is not sampling.temperature = 0.7" in separate.warnings[0]
    assert plan_of(preset="gkd", temperature=0.7).behaviour_comparable
    with pytest.raises(ObjectiveError, match="must be positive"):
        plan_of(temperature=0.0)


def test_jsd_ends_are_the_two_divergences() -> None:
    assert plan_of(preset="gkd", beta=0.0).divergence == "kl_teacher_student"
    assert plan_of(preset="gkd", beta=1.0).divergence == "kl_student_teacher"


def test_alpha_ends_are_the_two_divergences_and_heavy_tails_warn() -> None:
    assert plan_of(divergence="alpha", alpha=0.0).divergence == "kl_student_teacher"
    assert plan_of(divergence="alpha", alpha=1.0).divergence == "kl_teacher_student"
    assert "tail is heavy" in plan_of(divergence="alpha", alpha=1.5).warnings[0]
    for name in ("kl_teacher_student", "jeffreys", "chi_square_student_teacher"):
        assert "tail is heavy" in plan_of(divergence=name).warnings[0]
        assert plan_of(divergence=name, advantage_clip=5.0).warnings == ()
    for name in ("kl_student_teacher", "jsd", "hellinger", "total_variation", "alpha"):
        assert plan_of(divergence=name).warnings == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "score_function", "support": "teacher_topk"}, "objective.support"),
        ({"estimator": "pathwise", "support": "sampled"}, "zero mean"),
        ({"tail": "raw"}, "objective.tail: set to 'raw'"),
        ({"k": 4}, "objective.k"),
        ({"beta": 0.3}, "objective.beta"),
        ({"alpha": 0.3}, "objective.alpha"),
        ({"score_weight": "stopped"}, "objective.score_weight"),
        ({"entry_clip": 0.1}, "objective.entry_clip"),
        ({"weights": {"teacher_entropy": True}}, "objective.weights.teacher_entropy"),
        ({"weights": {"surprise": True}}, "objective.weights.surprise"),
        ({"preset": "gkd", "weights": {"prefix": 0.5}}, "objective.weights.prefix"),
        ({"mix": "multiply", "weights": {"prefix": 0.5}}, "objective.weights.prefix"),
        ({"tokens": {"top_fraction": 0.5}}, "objective.tokens.top_fraction"),
        ({"preset": "gkd", "mix": "add", "tokens": {"top_fraction": 0.5}}, "objective.tokens.top_fraction"),
        ({"preset": "gkd", "support": "full", "tokens": {"top_fraction": 0.5}}, "tokens.top_fraction"),
        ({"gate": {"entropy_on": 1.0}}, "objective.gate: set to"),
        ({"mix": "add", "distill_coefficient": 0, "gate": {"entropy_on": 1.0}}, "objective.gate: is set"),
        ({"ratio": "student_over_teacher"}, "objective.ratio"),
        ({"mix": "add", "ratio_gate": "rewarded"}, "objective.ratio_gate"),
        ({"mix": "add", "entropy_factor": 0.5}, "objective.entropy_factor"),
        ({"mix": "multiply", "entropy_window": 2}, "objective.entropy_window"),
        ({"preset": "many-faces", "entry_clip": 0.1}, "objective.tail: got 'stop_gradient' with entry_clip"),
        ({"preset": "gkd", "discount": 0.5}, "objective.discount"),
        ({"preset": "gkd", "advantage_clip": 0.5}, "objective.advantage_clip"),
        ({"preset": "gkd", "horizon": 2, "tail": "stop_gradient_mean"}, "objective.horizon: got 2 with tail"),
        (
            {"preset": "gkd", "horizon": 2, "weights": {"surprise": True}},
            "horizon: got 2 with weights.surprise",
        ),
        (
            {"preset": "gkd", "horizon": 1, "tokens": {"top_fraction": 0.5}},
            "horizon: got 1 with tokens.top_fra",
        ),
        (
            {"preset": "gkd", "charge": "cross_entropy"},
            "objective.charge: set to 'cross_entropy', but it only",
        ),
        ({"preset": "distil", "tail": "bucket"}, "objective.charge: .*, tail 'bucket'"),
        ({"preset": "distil", "divergence": "jsd", "tail": "renormalise"}, "objective.charge: .*; got 'jsd'"),
        ({"preset": "gkd", "log_ratio": "student"}, "objective.log_ratio: set to"),
        ({"preset": "gkd", "support": "full", "tokens": {"evidence_above": 0}}, "over the wire"),
        ({"mix": "add", "distill_coefficient": 0, "tokens": {"reward_above": 0}}, "tokens.reward_above"),
        ({"tokens": {"reward_above": 0.5, "reward_below": 0.5}}, "tokens.reward_below: got 0.5 with"),
        (
            {"preset": "gkd", "support": "full", "mix": "add", "gate": {"entropy_of": "teacher"}},
            "gate.entropy_of: needs a teacher that is asked over the wire",
        ),
        ({"preset": "rlsd", "ratio": "first_over_second"}, "allowed: two views, each with coefficient 1"),
        ({"preset": "gkd", "tail": "renormalise_teacher"}, 'objective.tail: got "renormalise_teacher"'),
        ({"preset": "gkd", "correction": {"kind": "ppo"}}, "objective.correction"),
        ({"preset": "gkd", "mix": "multiply"}, "objective.mix"),
        ({"distill_coefficient": 0.0}, "nothing would be trained"),
        ({"mix": "add", "distill_coefficient": 0.0, "reward_coefficient": 0.0}, "nothing would be trained"),
        ({"mix": "multiply", "distill_coefficient": 1.5}, r"\[0, 1\]"),
        ({"mix": "multiply", "horizon": 1}, "objective.horizon"),
        ({"reward_coefficient": 2.0}, "objective.reward_coefficient"),
        ({"views": {"a": {"weights": "emma"}}}, "objective.views.a.weights"),
        ({"views": {"a": {"weights": "teacher:bigg"}}}, "did you mean 'big'"),
        ({"preset": "gkd", "support": "full", "tokens": {"teacher_entropy_above": 1}}, "over the wire"),
    ],
)
def test_combinations_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        plan_of(**settings)


def test_ambiguous_teacher_is_refused() -> None:
    with pytest.raises(ObjectiveError, match='"teacher:big", "teacher:other"'):
        plan_of(teachers=("big", "other"))


TWO_VIEWS = {
    "expert": {"weights": "teacher:big", "coefficient": 1.25},
    "base": {"weights": "teacher:reference", "coefficient": -0.25},
}


def test_log_linear_target_is_allowed_where_its_constant_cancels() -> None:
    plan = plan_of(views=TWO_VIEWS, teachers=("big", "reference"))
    assert dict(plan.views) == {"expert": 1.25, "base": -0.25}
    assert {name for name, _ in plan.view_requests.values()} == {"big", "reference"}


FULL = {"estimator": "pathwise", "support": "full"}
TOP_K = {"estimator": "pathwise", "support": "student_topk", "tail": "bucket"}
BOTH = {"expert": {"weights": "teacher:big"}, "base": {"weights": "teacher:reference"}}


def weighed(first: float, second: float, **more: Any) -> dict[str, Any]:
    return {
        "expert": {"weights": "teacher:big", "coefficient": first},
        "base": {"weights": "teacher:reference", "coefficient": second, **more},
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 1}, "objective.views: got .*constant only cancels"),
        ({"divergence": "kl_teacher_student"}, "objective.views: got .*constant only cancels"),
        ({"divergence": "jsd"}, "objective.views: got .*constant only cancels"),
        ({"mix": "multiply"}, "objective.views: got .*constant only cancels"),
        ({**TOP_K, "tail": "stop_gradient"}, "objective.tail: got 'stop_gradient'.*must be normalised"),
        ({**TOP_K, "support": "teacher_topk"}, "objective.support: got 'teacher_topk'.*same ids"),
        ({"target": "mixture"}, r"coefficients \{expert: 1.25, base: -0.25\}.*above 0"),
        ({"target": "losses", "views": weighed(1, 0)}, "allowed: above 0"),
        ({"target": "mixture", "views": BOTH}, "allowed: a sum of 1"),
        (
            {**TOP_K, "support": "union", "target": "mixture", "views": weighed(0.5, 0.5)},
            "objective.support: got 'union'",
        ),
        ({"target": "losses", "views": BOTH, "mix": "multiply"}, "objective.target"),
        ({"views": {"one": {"weights": "teacher:big"}}, "target": "mixture"}, "objective.target: set to"),
        ({"target": "mixture", "views": weighed(0.5, 0.5, clip=1.0)}, "objective.views.base.clip"),
        ({"views": {"one": {"weights": "teacher:big", "clip": 1.0}}}, "objective.views.one.clip"),
        ({"missing_view": "renormalise"}, "objective.missing_view: got .*not above 0"),
        (
            {"missing_view": "renormalise", "views": weighed(1, 1, clip=1.0)},
            "objective.missing_view: got .*clip",
        ),
        (
            {**FULL, "missing_view": "renormalise", "views": weighed(1, 1)},
            "missing_view: got .*full",
        ),
        (
            {**FULL, "views": weighed(1, 1, weight_field="w")},
            "views.base.weight_field: set with support",
        ),
        (
            {"views": {"one": {"weights": "teacher:big", "weight_field": "w"}}, "mix": "multiply"},
            "constant only cancels",
        ),
    ],
)
def test_targets_of_several_views_are_refused_where_they_mean_nothing(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ObjectiveError, match=message):
        plan_of(**{"views": TWO_VIEWS, **settings}, teachers=("big", "reference"))


def test_several_views_compile_to_one_request_each() -> None:
    rows: list[tuple[dict[str, Any], Signal]] = [
        (TOP_K, Signal(candidates=True)),
        ({**TOP_K, "target": "mixture", "views": weighed(0.5, 0.5), "tail": "raw"}, Signal(candidates=True)),
        (
            {**TOP_K, "target": "losses", "views": weighed(1, 2), "support": "teacher_topk", "k": 5},
            Signal(top_k=5),
        ),
        ({"target": "mixture", "views": weighed(0.5, 0.5), "divergence": "jsd", "horizon": 3}, Signal()),
        ({"target": "losses", "views": weighed(1, 2), "divergence": "kl_teacher_student"}, Signal()),
        ({"views": weighed(0, 1, clip=2.0)}, Signal()),
    ]
    for row, signal in rows:
        plan = plan_of(**{"views": TWO_VIEWS, **row}, teachers=("big", "reference"))
        assert plan.view_requests == {"expert": ("big", signal), "base": ("reference", signal)}
    alone = plan_of(**TOP_K, views={"one": {"weights": "teacher:big", "coefficient": 0.8}})
    assert dict(alone.views) == {"one": 0.8}


def test_guided_sampling_compares_with_the_students_own_probabilities() -> None:
    weighed = {"correction": {"kind": "importance"}}

    def guided(**settings: Any) -> Any:
        chosen = ObjectiveSettings.model_validate(settings)
        return compile_plan(chosen, student_temperature=1.0, guided=True)

    plan = guided(**weighed)
    assert (plan.log_ratio, plan.needs_behaviour, plan.behaviour_comparable) == ("student", True, False)
    assert guided(estimator="pathwise", support="teacher_topk").log_ratio == "behaviour"
    with pytest.raises(ObjectiveError, match=r"objective.correction: got .none. with .sampling. context"):
        guided()
    with pytest.raises(ObjectiveError, match=r"objective.log_ratio: got .behaviour. with .sampling. context"):
        guided(**weighed, log_ratio="behaviour")


def test_limits_of_a_teacher_are_checked_before_the_first_score() -> None:
    small = Limits(max_top_k=8, max_candidates=4, entropy=False, temperature=False)
    plan = plan_of(
        preset="gkd",
        support="union",
        k=16,
        temperature=0.5,
        tokens={"teacher_entropy_below": 1.0},
    )
    problems = check_limits(plan, "big", small)
    assert len(problems) == 4
    assert "k = 16 asks for top_k above the teacher's limit 8" in problems[0]
    assert "candidates above the teacher's limit 4" in problems[1]
    assert "entropy" in problems[2]
    assert "temperature 0.5" in problems[3]
    assert check_limits(plan, "big", Limits()) == []
    assert check_limits(plan, "another", small) == []


def test_biased_tail_warns() -> None:
    raw = {
        "divergence": "kl_student_teacher",
        "estimator": "pathwise",
        "support": "teacher_topk",
        "tail": "raw",
    }
    assert "truncates the sum" in plan_of(**raw).warnings[0]
    assert plan_of(**{**raw, "tail": "bucket"}).warnings == ()
    assert plan_of(**{**raw, "divergence": "jsd"}).warnings == ()


def test_compiling_an_objective_imports_no_torch() -> None:
    code = "import sys, student_trainer.objective.compile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
