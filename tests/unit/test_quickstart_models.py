"""The quickstart's models: right examples, repeatable training, whole directories, found again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.quickstart_models import TrainingFailedError, content_key, prepare
from launcher.quickstart_recipes import RECIPES, STUDENT, ModelRecipe
from launcher.quickstart_training import IGNORED, PROMPT_TOKENS, _Batches, train
from student_trainer.tasks import Example
from student_trainer.tasks.addition import Addition

TINY = ModelRecipe(layers=1, hidden=32, heads=1, feed_forward=32, steps=4, batch=8, warmup_steps=2)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_batches_teach_the_answer_and_its_end_on_training_pairs_only(name: str) -> None:
    task, batches = Addition(), _Batches(RECIPES[name], seed=0)
    tokenizer, held_out, right = batches.tokenizer, task.held_out(), []
    for _ in range(5):
        ids, labels = batches.next()
        for row, learned in zip(ids, labels, strict=True):
            prompt = tokenizer.decode(row[:PROMPT_TOKENS])
            first, second = int(prompt[:3]), int(prompt[4:7])
            assert not held_out[(first - 100) * 900 + second - 100]
            assert (learned[:PROMPT_TOKENS] == IGNORED).all()
            answer = learned[PROMPT_TOKENS:]
            answer = answer[answer != IGNORED]
            assert answer[-1] == tokenizer.eos_token_id
            np.testing.assert_array_equal(answer, row[PROMPT_TOKENS : PROMPT_TOKENS + len(answer)])
            text = tokenizer.decode(answer[:-1])
            right.append(task.reward(Example(prompt, str(first + second)), text))
    if name == "teacher":
        assert min(right) == 1.0
    else:
        assert 0.25 < np.mean(right) < 0.6, "a carry in five is remembered"


def test_the_student_sees_the_same_sloppy_examples_again_and_again() -> None:
    batches = _Batches(STUDENT, seed=0)
    assert len(batches.fixed) == len(set(batches.fixed)) == STUDENT.sloppy_examples


def test_training_is_a_function_of_recipe_and_seed() -> None:
    losses: list[float] = []
    threads = torch.get_num_threads()
    try:
        models = [train(TINY, seed, lambda _, loss: losses.append(loss)) for seed in (1, 1, 2)]
    finally:
        torch.set_num_threads(threads)
    one, same, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(losses) == 3 * TINY.steps
    assert losses[TINY.steps - 1] < losses[0]


def test_models_that_exist_are_found_at_once(tmp_path: Path) -> None:
    for name in RECIPES:
        (tmp_path / f"{name}-{content_key(name, 7)}").mkdir()
    started = time.monotonic()
    teacher, student = prepare(tmp_path, 7, lambda look: pytest.fail(f"trained again: {look}"))
    assert time.monotonic() - started < 0.5
    assert teacher.name.startswith("teacher-")
    assert student.name.startswith("student-")
    assert content_key("teacher", 7) != content_key("teacher", 8)


def test_a_training_that_fails_says_why(tmp_path: Path) -> None:
    student = tmp_path / f"student-{content_key('student', -1)}"
    student.mkdir()
    with pytest.raises(TrainingFailedError, match="training the teacher ended with status 1") as caught:
        prepare(tmp_path, -1)
    assert "non-negative" in str(caught.value)
    assert list(tmp_path.iterdir()) == [student]


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.quickstart_models", "--only", "student"]
    process = subprocess.Popen(
        [*command, "--directory", str(tmp_path / "student")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        look = json.loads(process.stdout.readline())
        process.kill()
    assert look["step"] == 10
    assert look["steps"] == STUDENT.steps
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_teacher_is_perfect_and_the_student_is_sloppy(tmp_path: Path) -> None:
    from student_trainer.config import parse_run_config
    from student_trainer.policy_store import PolicyVersion
    from student_trainer.sampler.build import build_sampler
    from student_trainer.sampler.evaluation import evaluate

    accuracy = {}
    for name, path in zip(("teacher", "student"), prepare(tmp_path), strict=True):
        config = parse_run_config(
            {
                "teachers": {"t": {"model": str(path)}},
                "student": {"model": str(path)},
                "data": {"task": "addition"},
                "sampling": {"max_new_tokens": 20},
                "objective": {"preset": "thinking-machines"},
                "training": {"steps": 1},
            }
        )
        _, sampler = build_sampler(config, PolicyVersion(0, path, "test"))
        accuracy[name] = evaluate(sampler, prompts=500, policy_version=0)["greedy"]["accuracy"]
    print(accuracy)
    assert accuracy["teacher"] >= 0.99
    assert 0.2 <= accuracy["student"] <= 0.4
