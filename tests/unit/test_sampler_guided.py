"""Guided sampling of some of a group: which responses, under what, with which numbers, and what they tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.training_groups import make_expectations, make_group, make_plan, make_scores, scored
from support.view_run import SEEDS, ViewRuns, reference_logprobs, write_model
from transformers import AutoModelForCausalLM
from tutelage.v1.rollout_pb2 import Group, Rollout
from tutelage_client.codec import unpack_ids

from student_trainer.alignment import check_alignment
from student_trainer.batch import pack_step
from student_trainer.config import RunConfig, RunFileError
from student_trainer.resume import fixed_settings
from student_trainer.step_result import StepResult
from student_trainer.verify import RefusedGroupError, verify_group

CONTEXT = 'context = { user = "{solution} {prompt}" }\n'
OBJECTIVE = """
support = "student_topk"
k = 4
estimator = "pathwise"
[objective.views.expert]
weights = "initial"
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> ViewRuns:
    root = tmp_path_factory.mktemp("guided")
    write_model(root / "student", SEEDS["student"])
    made = ViewRuns(root, "redis://127.0.0.1:1")
    made.write_rows("rows.jsonl", {})
    return made


def config(runs: ViewRuns, name: str, sampling: str) -> RunConfig:
    return runs.config(name, OBJECTIVE, sampling=sampling)


def groups(runs: ViewRuns, name: str, sampling: str) -> list[Group]:
    return [each.group for each in runs.sample(config(runs, name, sampling), range(3))]


def ids(rollout: Rollout) -> list[int]:
    return unpack_ids(rollout.response_ids, "response").tolist()


def test_the_first_samples_are_guided_and_every_one_has_the_numbers_it_always_has(runs: ViewRuns) -> None:
    """What sample s of a group is depends on s and on its context alone, not on who is guided beside it."""
    mixed = groups(runs, "mixed", CONTEXT + "guided_samples = 2")
    everyone, nobody = groups(runs, "everyone", CONTEXT), groups(runs, "nobody", "")
    model = AutoModelForCausalLM.from_pretrained(runs.root / "student", dtype=torch.float32)
    for group, guided, plain in zip(mixed, everyone, nobody, strict=True):
        assert [rollout.guided for rollout in group.rollouts] == [True, True, False]
        assert [rollout.guided for rollout in guided.rollouts] == [True] * 3
        assert [rollout.guided for rollout in plain.rollouts] == [False] * 3
        names = [each.sampled_by for each in (group, guided, plain)]
        assert names == ["student@context", "student@context", "student"]
        assert [ids(rollout) for rollout in group.rollouts] == [
            *(ids(rollout) for rollout in guided.rollouts[:2]), ids(plain.rollouts[2])
        ]  # fmt: skip
        assert ids(group.rollouts[2]) != ids(guided.rollouts[2])
        prompt = unpack_ids(group.prompt_ids, "prompt")
        for rollout in group.rollouts:
            response = unpack_ids(rollout.response_ids, "response")
            own = reference_logprobs(model, prompt, response)
            recorded = np.frombuffer(rollout.behaviour_logprobs, dtype="<f4")
            assert np.allclose(recorded, own, atol=1e-4) != rollout.guided
            both = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
            with torch.inference_mode():
                logits = model(both[None]).logits[0, len(prompt) - 1 : -1]
            candidates = unpack_ids(rollout.candidate_ids, "candidates", 4)
            np.testing.assert_array_equal(candidates, logits.topk(4).indices.numpy())


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("guided_samples = 2", "guided_samples: got 2 without a context"),
        (CONTEXT + "guided_samples = 4", "got 4, allowed: at most samples_per_prompt = 3"),
        (CONTEXT + "guided_samples = 0", "guided_samples"),
    ],
)
def test_guided_samples_that_cannot_be_are_refused(runs: ViewRuns, sampling: str, message: str) -> None:
    with pytest.raises(RunFileError, match=message.replace("[", r"\[")):
        config(runs, "refused", sampling)


def test_run_that_guides_others_is_another_run(runs: ViewRuns) -> None:
    def fixed(sampling: str) -> dict[str, Any]:
        found = config(runs, "fixed", sampling)
        return fixed_settings(found, found.plan())

    assert fixed(CONTEXT + "guided_samples = 3") == fixed(CONTEXT) != fixed(CONTEXT + "guided_samples = 2")


def test_what_is_compared_with_the_trainer_are_the_responses_of_its_own_prompt(runs: ViewRuns) -> None:
    """A guided response is of another prompt; those beside it still find a misalignment."""
    assert config(runs, "some", CONTEXT + "guided_samples = 1").plan().behaviour_comparable
    assert not config(runs, "all", CONTEXT).plan().behaviour_comparable
    plan = make_plan()
    for wrong, found in ((0, 0.0), (1, 3.0)):
        group = make_group(0, plan, lengths=(3, 4))
        group.sampled_by, group.rollouts[0].guided = "student@context", True
        verified = verify_group(
            scored(group, {"teacher": make_scores(group, plan)}), make_expectations(plan), {}
        )
        batches = pack_step([verified], plan, 100)
        logprobs = batches[0].tokens.behaviour_logprobs.clone()
        logprobs[slice(0, 3) if wrong == 0 else slice(3, 7)] += 3.0
        result = StepResult(
            0.0, 0.0, 0.0, {}, tuple(batches), ({"student_logprob": logprobs},), None, unmoved=1
        )
        if found:
            with pytest.raises(Exception, match="misaligned"):
                check_alignment(result, 0)
        else:
            assert check_alignment(result, 0) == 0.0


@pytest.mark.parametrize(("name", "guided"), [("student", True), ("student@context", False)])
def test_group_whose_rollouts_say_otherwise_than_its_name_is_refused(name: str, guided: bool) -> None:
    plan = make_plan()
    group = make_group(0, plan)
    group.sampled_by, group.rollouts[1].guided = name, guided
    with pytest.raises(RefusedGroupError, match="guided in a group sampled by"):
        verify_group(scored(group, {"teacher": make_scores(group, plan)}), make_expectations(plan), {})
