"""Rock tokens: whose divergence stays, how much of the whole they are, and what the page says of them."""

from __future__ import annotations

import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.run_directory import rollout_line, step_line, write_run
from support.training_groups import make_expectations, make_plan, scored_group
from support.training_run import write_model

from student_trainer.learner import Learner
from student_trainer.report.page import render
from student_trainer.report.rock_tokens import FEWEST, divergence, find_rock_tokens, section
from student_trainer.report.run_data import RolloutRecord, read_run
from student_trainer.samples import write_samples
from student_trainer.sections import StudentSettings, TrainingSettings
from student_trainer.student import load_student
from student_trainer.verify import verify_group

STEPS = (0, 10, 20, 30, 40, 50)


def rollout(step: int, ratios: dict[int, float]) -> RolloutRecord:
    """One occurrence of each token with its log q − log p."""
    return RolloutRecord(
        step=step,
        group=f"run-{step}",
        prompt_text="1+2=",
        token_texts=tuple(f"t{token}" for token in ratios),
        student_logprobs=tuple(-1.0 for _ in ratios),
        teacher_logprobs=tuple(-1.0 + ratio for ratio in ratios.values()),
        teacher_top=(),
        reward=None,
        token_ids=tuple(ratios),
    )


def run_of(early: dict[int, float], late: dict[int, float], times: int = FEWEST) -> list[RolloutRecord]:
    return [rollout(step, early if step < 25 else late) for step in STEPS for _ in range(times)]


def test_a_token_that_stays_apart_is_a_rock_and_one_that_is_learned_is_not() -> None:
    found = find_rock_tokens(run_of(early={1: -2.0, 2: -2.0, 3: 0.0}, late={1: -2.0, 2: -0.1, 3: 0.0}))
    assert found is not None
    assert {token.token_id: token.rock for token in found.tokens} == {1: True, 2: False, 3: False}
    assert [token.token_id for token in found.tokens] == [1, 2, 3], "largest late share first"
    assert (found.early_steps, found.late_steps) == ((0, 10), (40, 50))


def test_guided_responses_say_nothing_about_the_students_own_tokens() -> None:
    own = run_of(early={1: -2.0, 3: 0.0}, late={1: -2.0, 3: 0.0})
    guided = [replace(each, guided=True) for each in run_of(early={2: -9.0}, late={2: -9.0})]
    assert find_rock_tokens([*own, *guided]) == find_rock_tokens(own)
    assert find_rock_tokens(guided) is None


def test_a_token_that_is_still_the_worst_but_half_learned_is_no_rock() -> None:
    found = find_rock_tokens(run_of(early={1: -4.0, 2: -0.1}, late={1: -2.0, 2: -0.1}))
    assert found is not None
    assert found.tokens[0].token_id == 1
    assert found.tokens[0].late.mean > found.late_mean
    assert not found.tokens[0].rock


def test_shares_are_of_all_divergence_and_means_per_occurrence() -> None:
    found = find_rock_tokens(run_of(early={1: -2.0, 2: -2.0}, late={1: -2.0, 2: -1.0}))
    assert found is not None
    one, two = found.tokens
    assert one.early.share == two.early.share == pytest.approx(0.5)
    high, low = math.exp(-2.0) + 1.0, math.exp(-1.0)  # e^r − 1 − r at −2 and at −1
    assert (one.late.mean, two.late.mean) == (pytest.approx(high), pytest.approx(low))
    assert one.late.share == pytest.approx(high / (high + low))
    assert found.rock_share == one.late.share
    assert one.late.count == 2 * FEWEST


def test_a_token_seen_too_rarely_is_called_nothing() -> None:
    found = find_rock_tokens(run_of(early={1: -3.0, 2: 0.0}, late={1: -3.0, 2: 0.0}, times=1))
    assert found is not None
    assert not any(token.rock for token in found.tokens)


def test_the_estimate_is_the_divergence() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    estimate = sum(p[v] * divergence(math.log(q[v] / p[v])) for v in range(3))
    assert estimate == pytest.approx(float((p * np.log(p / q)).sum()))


def test_positions_without_a_score_count_nowhere() -> None:
    found = find_rock_tokens(run_of(early={1: math.nan, 2: -1.0}, late={1: math.nan, 2: -1.0}))
    assert found is not None
    assert [token.token_id for token in found.tokens] == [2]


def test_one_recorded_step_says_nothing() -> None:
    assert find_rock_tokens([rollout(0, {1: -1.0})]) is None
    assert section([rollout(0, {1: -1.0})]) == ""


def test_the_page_names_the_token_by_text_and_id(tmp_path: Path) -> None:
    lines = [rollout_line(step=step, group=f"run-{n}") for step in STEPS for n in range(FEWEST)]
    directory = write_run(tmp_path / "run", [step_line(1)], [])
    with gzip.open(directory / "samples" / "step-00000010.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = render(read_run(directory))
    text = re.sub(r"<[^>]+>", " ", page[page.index("Rock tokens") :])
    assert "1 of 3 tokens are rocks" in text, "the fourth is not scored"
    row = re.search(r'<tr class="rock"><td>(.*?)</td><td>(\d+)</td>', page)
    assert row is not None
    assert row.groups() == ("9", "5")


def test_what_a_trainer_records_is_enough(tmp_path: Path) -> None:
    """Real steps of a real model: a loss on three positions leaves the later ones as they were."""
    plan = make_plan(
        support="teacher_topk", k=16, estimator="pathwise", tokens={"keep_first_n": 3}, divergence="jeffreys"
    )
    student = load_student(StudentSettings(model=str(write_model(tmp_path / "model", seed=1)), device="cpu"))
    settings = TrainingSettings(steps=12, learning_rate=1e-2, warmup_steps=1)
    learner = Learner(student, plan, settings)
    directory = write_run(tmp_path / "run", [step_line(1)], [])
    for step in range(12):
        groups = [verify_group(scored_group(i, plan), make_expectations(plan), {}) for i in range(12)]
        result = learner.step(groups, step, traces=True)
        write_samples(directory / "samples", step, result, student.tokenizer, max_groups=12)
    run = read_run(directory)
    found = find_rock_tokens(run.rollouts)
    assert found is not None
    assert found.late_mean < found.early_mean, "the student came closer where it was trained"
    recorded = [token for rollout in run.rollouts for token in rollout.token_ids]
    assert {token.token_id for token in found.tokens} <= set(recorded)
    assert sum(token.late.share for token in found.tokens) == pytest.approx(1.0)
    assert "Rock tokens" in render(run)
