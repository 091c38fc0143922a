"""Every preset equals its published formula, written out in plain torch, and asks for what it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import preset_formulas, reward_formulas, self_distillation_formulas
from support.preset_problem import (
    LOGITS,
    V,
    make_batch,
    plan_of,
    random_problem,
    required,
    trained,
    written_out,
)
from tutelage_client.types import Signal

from benchmarks.learning.experiments import EXPERIMENTS
from student_trainer.objective import presets
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.loss import objective_loss
from student_trainer.objective.settings import ObjectiveError, ObjectiveSettings

FORMULAS = preset_formulas.FORMULAS | self_distillation_formulas.FORMULAS | reward_formulas.FORMULAS


@pytest.mark.parametrize("name", presets.names())
def test_preset_is_its_formula(name: str) -> None:
    loss, gradient = trained(plan_of(name))
    expected, slope = written_out(FORMULAS[name])
    assert slope.abs().max() > 1e-4
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, slope)


ASKED = {
    "thinking-machines": {"teacher": "teacher: sampled"},
    "qwen3-strong-to-weak": {"teacher": "teacher: candidates 64"},
    "gkd": {"teacher": "teacher: top_k 64"},
    "typhoon-s": {"teacher": "teacher: top_k 64"},
    "many-faces": {"teacher": "teacher: candidates 32"},
    "grpo": {},
    "opd-plus": {"teacher": "teacher: sampled"},
    "g-opd": {"teacher": "teacher: sampled"},
    "exopd": {"expert": "expert: sampled", "reference": "reference: sampled"},
    "ta-opd": {"teacher": "teacher: candidates 32"},
    "iw-opd": {"teacher": "teacher: sampled"},
    "lightning": {"teacher": "teacher: sampled"},
    "mad-opd": {
        "first": "first, told debate: top_k 64",
        "second": "second, told debate: top_k 64",
    },
    "opsd": {"solution": "run.initial, told solution: top_k 64"},
    "opsd-top50": {"solution": "run.initial, told solution: top_k 50"},
    "opsd-sampled": {"solution": "run.initial, told solution: sampled"},
    "opsd-ema": {"solution": "run.ema, told solution: top_k 64"},
    "opsd-clip": {"solution": "run.initial, told solution: top_k 64"},
    "rgsd": {"rubric": "run.initial, told rubric: top_k 128"},
    "sdft-paper": {"demonstration": "run.ema, told demonstration: candidates 64"},
    "sdft-tinker": {"demonstration": "run.initial, told demonstration: top_k 20"},
    "sdft-trl": {"demonstration": "run.initial, told demonstration: candidates 100"},
    "sdpo": {"hindsight": "run.ema, told success or feedback: candidates 100"},
    "opcd": {"context": "run.initial, told context: candidates 256"},
    "credit": {
        "feedback": "run.ema, told feedback: sampled",
        "elsewhere": "run.ema, told feedback other_prompt: sampled",
    },
    "purified-opsd": {
        "base": "run.initial: candidates 64",
        "solution": "run.initial, told solution: candidates 64",
        "solution_alone": "run.initial, told solution: candidates 64",
    },
    "ar-opd": {
        "hint": "run.initial, told hint: candidates 64",
        "solution": "run.initial, told solution: candidates 64",
    },
    "msd": {"english": "run.initial, told english: candidates 64"},
    "vpd": {"feedback": "run.live, told feedback or success: candidates 64"},
    "distil": {"feedback": "run.live, told feedback or success: top_k 64"},
    "rock-tokens": {"teacher": "teacher: sampled"},
    "consistency": {"context": "run.initial, told context: candidates 64"},
    "cepo": {
        "right": "run.live, told answer: sampled",
        "wrong": "run.live, told failure or answer: sampled",
    },
    "rlsd": {"answer": "run.live, told answer: sampled"},
    "rlrt": {"informed": "run.live, told success: sampled"},
    "egrsd": {"answer": "run.live, told answer: sampled, entropy"},
    "cl-egrsd": {"answer": "run.live, told answer: sampled, entropy"},
    "antisd": {
        "informed": "run.live, told feedback success or success or feedback solution or solution: "
        "sampled, entropy"
    },
    "kepo": {"teacher": "teacher: top_k 64"},
    "pi-play": {"path": "run.ema, told path: candidates 64"},
    "edge-opd": {"private": "run.live, told context: sampled"},
    "omniopd": {"reference": "run.initial: top_k 64"},
    "pbsd": {"solution": "run.live, told solution: sampled"},
}


@pytest.mark.parametrize("name", presets.names())
def test_preset_asks_each_view_for_what_its_loss_needs(name: str) -> None:
    row = {"preset": name, "monitor": False, **required(name)}
    plan = compile_plan(ObjectiveSettings.model_validate(row), student_temperature=1.0)
    assert {view: _asked(plan, view, *asked) for view, asked in plan.view_requests.items()} == ASKED[name]


def _asked(plan: Plan, view: str, teacher: str, signal: Signal) -> str:
    """Of whom, what it is told beyond the prompt, and the signals, in words."""
    told = " or ".join(
        " ".join(sorted(template.fields - {"prompt"})) for template in plan.contexts.get(view, ())
    )
    signals = [name for name in ("sampled", "entropy") if getattr(signal, name)]
    signals += [f"top_k {signal.top_k}"] if signal.top_k else []
    signals += [f"candidates {plan.student_candidates}"] if signal.candidates else []
    return f"{teacher or 'teacher'}{', told ' + told if told else ''}: {', '.join(signals)}"


@pytest.mark.parametrize("name", presets.names())
def test_only_a_view_that_may_go_without_its_context_leaves_responses_out(name: str) -> None:
    plan = plan_of(name)
    assert plan.tokens.marked_only <= any(missing == "same" for missing in plan.missing.values())


def test_cepo_leaves_a_response_without_a_failed_sibling_its_plain_advantage() -> None:
    contexts = plan_of("cepo").contexts
    assert contexts["wrong"][-1] == contexts["right"][0]  # the same q twice: w = 1
    assert "failure" in contexts["wrong"][0].fields


@pytest.mark.parametrize("name", ["g-opd", "exopd", "lightning", "sdpo", "omniopd"])
def test_the_student_as_a_step_of_one_update_starts_is_the_one_that_is_updated(name: str) -> None:
    plan, x = plan_of(name), random_problem()
    assert plan.uses_old
    leaf = LOGITS.clone().requires_grad_()
    batch = replace(make_batch(plan, x), old_logprobs=None)
    objective_loss(leaf, torch.eye(V, dtype=torch.float64), None, batch, plan).loss.backward()
    own = LOGITS.clone().requires_grad_()
    FORMULAS[name](replace(x, old=x.of(x.student)), own.log_softmax(-1)).backward()
    torch.testing.assert_close(leaf.grad, own.grad)


def settings(**row: Any) -> ObjectiveSettings:
    return presets.resolve(ObjectiveSettings.model_validate(row))


def test_a_views_keys_are_laid_over_the_presets() -> None:
    row = settings(preset="opsd", views={"solution": {"context": {"user": "{prompt} {solution}"}}})
    view = row.views["solution"]
    assert (view.weights, view.context.user) == ("initial", "{prompt} {solution}")
    row = settings(preset="exopd", views={"expert": {"coefficient": 1.5}})
    assert (row.views["expert"].weights, row.views["expert"].coefficient) == ("teacher:expert", 1.5)
    assert row.views["reference"].coefficient == -0.25


def test_a_route_takes_the_place_of_the_presets_weights() -> None:
    row = settings(preset="gkd", views={"teacher": {"route": {"math": "a", "code": "b"}}})
    assert row.views["teacher"].route == {"math": "a", "code": "b"}
    assert "weights" not in row.views["teacher"].model_fields_set


def test_views_of_other_names_take_the_place_of_all_of_the_presets() -> None:
    row = settings(preset="exopd", views={"mine": {"weights": "teacher:big"}})
    assert list(row.views) == ["mine"]


def test_a_table_is_laid_over_key_by_key_but_a_correction_is_one_choice() -> None:
    row = settings(preset="ta-opd", tokens={"skip_first_n": 2})
    assert (row.tokens.top_fraction, row.tokens.skip_first_n) == (0.05, 2)
    row = settings(preset="g-opd", correction={"kind": "importance"})
    assert row.correction.model_dump() == {"kind": "importance", "cap": None}


def test_a_preset_is_refused_without_what_only_its_user_knows() -> None:
    with pytest.raises(ObjectiveError, match=r"objective\.tokens\.skip_ids: missing; preset 'rock-tokens'"):
        settings(preset="rock-tokens", tokens={"skip_first_n": 1})
    assert settings(preset="rock-tokens", tokens={"skip_ids": [7]}).tokens.skip_ids == (7,)


def test_unknown_key_inside_a_presets_view_is_refused() -> None:
    with pytest.raises(ValueError, match="coeficient"):
        settings(preset="opsd", views={"solution": {"coeficient": 2}})


def test_every_preset_has_a_row_in_the_table_of_methods() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.count(" | ") > 5]
    rows = {cells[1].strip("`"): cells[4] for cells in lines if cells[1].startswith("`")}
    assert rows == {preset.name: preset.read for preset in map(presets.load, presets.names())}


def test_an_experiment_stands_beside_a_preset_only_where_its_settings_were_trained() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.count(" | ") > 5]
    named = [
        (cells[1].strip(" `"), letter.strip())
        for cells in lines
        if cells[1].strip().startswith("`")
        for letter in cells[6].strip().split(", ")
        if len(letter.strip()) == 1  # with a bracket it says what was otherwise
    ]
    assert ("sdpo", "e") in named
    trained = {
        (experiment.name[0], _kind(ObjectiveSettings.model_validate(arm.objective)))
        for experiment in EXPERIMENTS.values()
        for arm in experiment.arms
    }
    wrong = [
        (name, letter) for name, letter in named if (letter, _kind(settings(preset=name))) not in trained
    ]
    assert not wrong


def _kind(row: ObjectiveSettings) -> tuple[object, ...]:
    """What makes a method of a row: all but its numbers, wording and names."""
    row = presets.resolve(row)
    return (
        row.distill_coefficient != 0 and (row.divergence, row.support, row.tail, len(row.views) or 1),
        row.estimator, row.correction, row.log_ratio, row.mix, row.ratio, row.tokens, row.weights,
        row.ema_rate, "ema" in {view.weights for view in row.views.values()},
    )  # fmt: skip
