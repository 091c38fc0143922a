"""The learning experiments: arms that run, are repeatable and have equal budgets; a page that is computed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.learning.__main__ import findings_of, whole_of
from benchmarks.learning.arms import START, Answered, Arm, Claim, Experiment, Measure, Sizes, arm_key
from benchmarks.learning.crew import Crew
from benchmarks.learning.experiments import EXPERIMENTS, chosen
from benchmarks.learning.loop import Course, Session
from benchmarks.learning.models import MODELS, ModelSpec, Part, make_model, model_path
from benchmarks.learning.report import page, sentence, write
from benchmarks.learning.skills import ADDITION, SUBTRACTION, held_out, problem, subtracted, training_pairs
from benchmarks.learning.tasks import plan_tasks, read_result, write_result
from benchmarks.learning.verdicts import Findings, judge
from launcher.quickstart_recipes import ModelRecipe
from student_trainer.config import parse_run_config

SIZES = Sizes(steps=2, responses=8, evaluation_prompts=4)
TINY = ModelRecipe(layers=1, hidden=32, heads=1, feed_forward=32, steps=2, batch=8, warmup_steps=1)
SPECS: Mapping[str, ModelSpec] = {
    name: replace(spec, recipe=replace(TINY, hidden=spec.recipe.hidden // 3)) for name, spec in MODELS.items()
}
NAMED = [(e.name, arm.name) for e in EXPERIMENTS.values() for arm in e.arms]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learning")
    threads = torch.get_num_threads()
    try:
        for name in SPECS:
            make_model(path / "models", name, 0, lambda step, steps: None, SPECS)
    finally:
        torch.set_num_threads(threads)
    return path


def course(experiment: Experiment, arm: Arm, directory: Path, sizes: Sizes = SIZES) -> Course:
    session = Session(experiment, arm, 0, directory, sizes, specs=SPECS)
    return asyncio.run(session.run(lambda step, steps: None))


@pytest.mark.parametrize(("experiment", "arm"), NAMED)
def test_every_arm_is_a_run_file(experiment: str, arm: str, directory: Path) -> None:
    document = EXPERIMENTS[experiment].arm(arm).document(0, directory, SIZES, SPECS)
    assert parse_run_config(document).plan().temperature == 1.0


@pytest.mark.parametrize(
    ("experiment", "arm"),
    [
        ("a-strong-to-weak", "penalty, no teacher"),
        ("b-extrapolation", "λ = 1.25"),
        ("c-privileged-context", "told the solution"),
        ("d-second-skill", "supervised on answers"),
        ("e-feedback", "success, else the solution"),
        ("f-two-experts", "routed by skill"),
        ("g-cached", "cached, start of right sums"),
        ("h-token-budgets", "10% by entropy"),
        ("i-reward-mixing", "inverse ratio, no gate"),
    ],
)
def test_an_arm_runs_to_its_end(experiment: str, arm: str, directory: Path) -> None:
    found = EXPERIMENTS[experiment]
    done = course(found, found.arm(arm), directory)
    assert [look["step"] for look in done.looks] == list(SIZES.looks)
    assert list(done.looks[-1]["sets"]) == [answered.name for answered in found.sets]
    assert ("kl" in done.looks[-1]) == (found.judge is not None)
    assert done.tokens_used > 0


def test_an_arm_is_a_function_of_its_settings_and_seed(directory: Path) -> None:
    found = EXPERIMENTS["a-strong-to-weak"]
    first, second = (course(found, found.arm("on-policy distillation"), directory) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    assert first.looks[0]["kl"] != first.looks[-1]["kl"], "something was trained"


def test_budgets_count_what_is_used_trained_written_and_scored(directory: Path) -> None:
    found, budgets = EXPERIMENTS["a-strong-to-weak"], EXPERIMENTS["h-token-budgets"]
    whole = course(found, found.arm("on-policy distillation"), directory)
    assert whole.tokens_used == whole.tokens_trained == whole.tokens_written == whole.tokens_scored
    assert course(found, found.arm("GRPO, no teacher"), directory).tokens_scored == 0
    half = course(budgets, budgets.arm("50% by chance"), directory)
    assert half.tokens_scored == half.tokens_used
    assert half.tokens_trained == pytest.approx(half.tokens_used / 2, abs=SIZES.steps)
    again = replace(EXPERIMENTS["g-cached"].arm("live, start of sloppy sums"), fixed=1)
    cached = course(EXPERIMENTS["g-cached"], again, directory)
    assert cached.tokens_written == cached.tokens_scored == cached.tokens_used / SIZES.steps


@pytest.mark.parametrize(("arm", "fixed"), [("live", False), ("cached", True)])
def test_the_student_writes_with_its_new_weights_unless_the_start_writes_all(
    directory: Path, arm: str, fixed: bool
) -> None:
    found = EXPERIMENTS["g-cached"]
    session = Session(found, found.arm(f"{arm}, start of right sums"), 0, directory, SIZES, specs=SPECS)
    start = [p.clone() for p in session.generator.model.parameters()]
    asyncio.run(session.run(lambda step, steps: None))
    writer = list(session.generator.model.parameters())
    trained = [p.detach() for p in session.learner.student.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(writer, start if fixed else trained, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(start, trained, strict=True))


def test_supervised_training_is_the_cross_entropy_of_the_answers(directory: Path) -> None:
    found = EXPERIMENTS["a-strong-to-weak"]
    session = Session(found, found.arm("supervised on answers"), 0, directory, SIZES, specs=SPECS)
    groups = asyncio.run(session._groups(0))
    result = session.learner.step(groups, 0, traces=True)
    expected = -torch.cat([traces["student_logprob"] for traces in result.per_token]).mean()
    assert result.loss == pytest.approx(float(expected), abs=1e-3)
    text = session.learner.student.tokenizer.decode(groups[0].rollouts[0].response_ids)
    assert text.endswith("<end>")
    assert ":" in text


def test_the_control_without_a_teacher_punishes_the_unlikely_and_nothing_else(directory: Path) -> None:
    found = EXPERIMENTS["a-strong-to-weak"]
    session = Session(found, found.arm("penalty, no teacher"), 0, directory, SIZES, specs=SPECS)
    for group in asyncio.run(session._groups(0)):
        for rollout in group.rollouts:
            own, told = rollout.behaviour_logprobs, rollout.scores["teacher"].sampled
            assert told is not None
            np.testing.assert_allclose(told - own, np.where(np.exp(own) < 0.5, -1.0, 0.0), atol=1e-4)


def test_differences_are_worked_out_and_a_borrow_can_be_forgotten() -> None:
    assert subtracted(585, 347) == "18,03,02:238"
    assert subtracted(585, 347, (True, False)) == "18,04,02:248"
    assert subtracted(500, 499) == "11,10,00:001"
    for index in np.random.default_rng(0).integers(810_000, size=300):
        found = problem(SUBTRACTION, int(index))
        assert int(found.answer) == found.first - found.second >= 0


def test_nothing_held_out_is_trained_on() -> None:
    pairs = set(training_pairs().tolist())
    for found in held_out(ADDITION, 200):
        assert (found.first - 100) * 900 + found.second - 100 not in pairs


def test_a_part_that_is_told_more_learns_only_its_answer(directory: Path) -> None:
    from benchmarks.learning.models import Examples
    from benchmarks.learning.skills import LETTERS
    from launcher.quickstart_training import IGNORED
    from student_trainer.tasks.characters import character_tokenizer

    spec = ModelSpec(TINY, (Part(1.0, ADDITION, given="result", jumps=True),))
    tokenizer = character_tokenizer(LETTERS)
    ids, labels = Examples(spec, 0, tokenizer).next()
    for row, learned in zip(ids, labels, strict=True):
        before, after = tokenizer.decode(row).split("=")
        result = before.split(";")[0]
        assert after.startswith(f":{result}<end>")
        assert tokenizer.decode(learned[learned != IGNORED]) == f":{result}<end>"


def test_a_models_name_changes_with_what_it_goes_on_from() -> None:
    changed = {**SPECS, "base": replace(SPECS["base"], parts=(Part(1.0, SUBTRACTION),))}
    assert model_path(Path(), "expert", 0, SPECS) != model_path(Path(), "expert", 0, changed)
    assert model_path(Path(), "expert", 0, SPECS) == model_path(Path(), "expert", 5, SPECS), "one for all"
    assert model_path(Path(), "sloppy", 0, SPECS) != model_path(Path(), "sloppy", 5, SPECS)


def test_the_same_arm_of_two_experiments_is_run_once(directory: Path) -> None:
    one, other = EXPERIMENTS["a-strong-to-weak"], EXPERIMENTS["h-token-budgets"]
    key = arm_key(one, one.arm("on-policy distillation"), 0, SIZES)
    assert key == arm_key(other, other.arm("all tokens"), 0, SIZES)
    assert key != arm_key(one, one.arm("on-policy distillation"), 1, SIZES)
    tasks = plan_tasks([one, other], [0], directory, SIZES)
    assert len({task.path for task in tasks}) == len(tasks)
    paths = {path: place for place, task in enumerate(tasks) for path in [task.path]}
    assert all(paths[need] < place for place, task in enumerate(tasks) for need in task.needs)


MEASURE = Measure("sampled")
CLAIM = Claim("left is ahead", "somebody", "left", "right", MEASURE)
ALIKE = replace(CLAIM, alike=0.05)


@pytest.mark.parametrize(
    ("claim", "more", "less", "verdict"),
    [
        (CLAIM, (0.9, 0.8, 0.9), (0.5, 0.5, 0.6), "appears"),
        (CLAIM, (0.5, 0.5, 0.6), (0.9, 0.8, 0.9), "the opposite appears"),
        (CLAIM, (0.9, 0.8, 0.5), (0.5, 0.5, 0.6), "not clear"),
        (CLAIM, (0.51, 0.90, 0.52), (0.5, 0.5, 0.5), "not clear"),
        (CLAIM, (0.51, 0.52, 0.51), (0.5, 0.5, 0.5), "not clear"),
        (ALIKE, (0.91, 0.80, 0.90), (0.9, 0.84, 0.9), "appears"),
        (ALIKE, (0.91, 0.80, 0.90), (0.9, 0.94, 0.9), "not clear"),
        (ALIKE, (0.5, 0.5, 0.5), (0.9, 0.9, 0.9), "does not appear"),
        (CLAIM, (), (), "not measured"),
    ],
)
def test_an_ordering_appears_when_every_seed_has_it_beyond_chance(
    claim: Claim, more: tuple[float, ...], less: tuple[float, ...], verdict: str
) -> None:
    assert judge(claim, dict(enumerate(more)), dict(enumerate(less)), prompts=500).verdict == verdict


PAGE = Experiment(
    name="x-known",
    title="Known figures",
    question="What?",
    arms=(Arm("left", {}), Arm("right", {}, learning_rate=1e-4)),
    claims=(CLAIM, replace(CLAIM, says="left is better than before", less=START)),
    sets=(Answered(),),
)


def known(sampled: float, tokens: int) -> dict[str, Any]:
    found = {"greedy": sampled + 0.05, "sampled": sampled, "length": 13.5}
    looks = [
        {"step": step, "sets": {ADDITION: found | extra}} for step, extra in ((0, {"sampled": 0.2}), (2, {}))
    ]
    return {
        "looks": looks, "tokens_used": tokens, "tokens_trained": tokens, "cpu_seconds": 10.0, "began": 0.0,
        "ended": 60.0, "source": "abc",
    }  # fmt: skip


def test_the_page_is_made_of_the_figures(tmp_path: Path) -> None:
    left = {seed: known(0.80 + seed / 10, 1000) for seed in range(2)}
    right = {seed: known(0.50, 1020) for seed in range(2)}
    whole = replace(whole_of([], (0, 1), SIZES), arms=4, done=4, sources={"abc": ["x"]})
    findings = [Findings(PAGE, {"left": left, "right": right}, 500)]
    written = write(findings, whole, tmp_path)
    text = (tmp_path / "learning.md").read_text()
    assert text == page(findings, whole)
    assert "All 4 arms are done." in text
    assert "Code abc;" in text
    assert whole.complete
    assert not replace(whole, sources={"abc": ["x"], "def": ["x"]}).complete
    assert "| left | 90.0 ± 7.1 | 85.0 ± 7.1 | 13.5 ± 0.0 | 1,000 | 1,000 | 10 | 2 |" in text
    assert "| *before: sloppy* | 90.0 ± 7.1 | 20.0 ± 0.0 | 13.5 ± 0.0 |  |  |  |  |" in text
    assert "left 85.0 ± 7.1, right 50.0 ± 0.0" in text
    assert "within 2.0% of one another" in text
    assert text.count("Appeared here") == 2
    assert [path.name for path in written] == ["learning.md", "learning.json", "learning-x-known.png"]
    assert json.loads((tmp_path / "learning.json").read_text())["experiments"]["x-known"]["claims"]
    assert json.loads((tmp_path / "latest.jsonl").read_text())["value"] == 2


def test_a_page_of_a_part_says_so_and_unequal_tokens_are_named(tmp_path: Path) -> None:
    arm = PAGE.arms[0]
    write_result(plan_tasks([PAGE], [0], tmp_path, SIZES)[-2].path, known(0.8, 1000))
    found = findings_of(PAGE, [0], tmp_path, SIZES)
    assert found.seeds(arm.name) == [0]
    whole = whole_of(plan_tasks([PAGE], [0], tmp_path, SIZES), (0,), SIZES)
    text = page([found], whole)
    assert "Not complete: 1 of 2 arms are done" in text
    assert not whole.complete
    assert "not measured" in text
    two = page([found], replace(whole, sources={"abc": ["x"], "def": ["y", "z"]}))
    assert "Not one run: code abc made x; code def made y, z." in two
    apart = Findings(PAGE, {"left": {0: known(0.8, 1000)}, "right": {0: known(0.5, 1500)}}, 500)
    assert "Not equal tokens: up to 40% apart" in page([apart], whole)


def test_arms_that_are_alike_in_some_seeds_are_not_said_to_differ_by_chance() -> None:
    claim = replace(CLAIM, alike=0.05)
    text = sentence(judge(claim, {0: 0.74, 1: 0.75, 2: 0.73}, {0: 0.78, 1: 0.82, 2: 0.80}, prompts=500))
    assert "alike in some seeds, and not in others" in text
    assert "chance" not in text


def test_learning_rates_that_differ_are_named() -> None:
    whole = whole_of([], (0,), SIZES)
    text = page([Findings(PAGE, {}, 4)], whole)
    assert "Not one learning rate: 0.001 for “left”; 0.0001 for “right”." in text
    alike = replace(PAGE, arms=(PAGE.arms[0], replace(PAGE.arms[1], learning_rate=1e-3)))
    assert "learning rate" not in page([Findings(alike, {}, 4)], whole)


def test_an_experiment_is_named_by_its_beginning() -> None:
    assert [experiment.name[0] for experiment in chosen(["a", "c-priv"])] == ["a", "c"]
    with pytest.raises(ValueError, match="--only: got 'z'"):
        chosen(["z"])


def test_a_crew_does_what_is_left_and_survives_a_failure(directory: Path, tmp_path: Path) -> None:
    for name in ("sloppy", "adder"):
        trained = model_path(directory / "models", name, 0, SPECS)
        shutil.copytree(trained, model_path(tmp_path / "models", name, 0))
    tasks = plan_tasks([EXPERIMENTS["a-strong-to-weak"]], [0], tmp_path, SIZES)
    wanted = [task for task in tasks if task.arm in ("GRPO, no teacher", "supervised on answers")]
    lost = replace(wanted[0], path=tmp_path / "lost.json", needs=(tmp_path / "no model",))
    broken = replace(wanted[0], arm="no such arm", path=tmp_path / "broken.json")
    crew = Crew(tmp_path, SIZES, "abc", workers=1)
    crew.do([lost, broken, *wanted])
    assert [task.done for task in wanted] == [True, True]
    assert {read_result(task.path)["source"] for task in wanted} == {"abc"}
    assert list(crew.failures) == [broken.title]
    assert "StopIteration" in crew.failures[broken.title]
    made = [task.path.stat().st_mtime_ns for task in wanted]
    crew.do(wanted)
    assert [task.path.stat().st_mtime_ns for task in wanted] == made, "what is done is not done again"
