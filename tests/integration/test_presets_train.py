"""Every preset trains, through queue, teacher replicas, sampler and trainer, on the loss of its formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import preset_formulas, reward_formulas, self_distillation_formulas
from support.preset_problem import Formula, Problem, required
from support.preset_run import PROMPTS, STEPS, Course, Stage
from torch import Tensor
from transformers import AutoModelForCausalLM
from tutelage.v1.rollout_pb2 import Group, ViewRequest

from student_trainer.objective import presets

FORMULAS = preset_formulas.FORMULAS | self_distillation_formulas.FORMULAS | reward_formulas.FORMULAS
OVERRIDES: dict[str, dict[str, Any]] = {
    "antisd": {"gate": {"warmup_steps": 1}},
}
SECTIONS: dict[str, dict[str, Any]] = {
    "edge-opd": {"sampling": {"context": {"user": "Keep this in mind:\n{context}\n\n{prompt}"}}},
    "pbsd": {
        "sampling": {
            "context": presets.load("pbsd").objective["views"]["solution"]["context"],
            "guided_samples": 2,
        }
    },
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("presets")) as stage:
        yield stage


@pytest.mark.parametrize("name", presets.names())
def test_preset_trains_on_its_formula(stage: Stage, name: str) -> None:
    course = stage.run(stage.config(name, required(name) | OVERRIDES.get(name, {}), **SECTIONS.get(name, {})))
    records = course.metrics()
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [len(groups) for groups, _ in course.steps] == [PROMPTS] * STEPS
    for record in records:
        assert {key: n for key, n in record.items() if key.startswith("dropped") and n} == {}
        assert math.isfinite(record["loss"])
    initial = AutoModelForCausalLM.from_pretrained(stage.models["student"]).state_dict()
    assert any(not torch.equal(weights, initial[key]) for key, weights in course.weights().items())
    if course.plan.audit is not None:
        check_audits(stage, course)
    problem, log_p = first_step(stage, course)
    loss = first_formula(course)(problem, log_p)
    first = course.steps[0][1]
    assert first.loss == pytest.approx(loss.item(), rel=2e-3, abs=2e-6)
    assert first.gradient_norm == pytest.approx(slope(loss, stage.reference("student")), rel=5e-3)
    assert first.gradient_norm > 1e-4


def check_audits(stage: Stage, course: Course) -> None:
    """Anchors are at the peaks of an independent forward's entropy, and the writer likes one text more."""
    agreements = [value for _, value in audited(course)]
    assert len(agreements) >= PROMPTS
    assert min(agreements) < max(agreements)
    for group in course.steps[0][0]:
        stored, requests = course.submitted[group.index]
        assert [request.teacher for request in requests if request.view == "audit"] == ["writer"]
        for rollout in stored.rollouts:
            log_p = forward(stage, "student", ids(stored.prompt_ids), ids(rollout.response_ids)).detach()
            entropy = -(log_p.exp() * log_p).sum(-1)
            taken: list[int] = []
            for _ in range(2):
                free = [t for t in range(len(entropy) - 1) if all(abs(t - other) > 1 for other in taken)]
                taken += [max(free, key=lambda t: float(entropy[t]))] if free else []
            assert ids(rollout.anchors).tolist() == sorted(taken)


def slope(loss: Tensor, model: Any) -> float:
    """Length of the gradient by all weights of the model."""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def first_formula(course: Course) -> Formula:
    """The preset's; in the first step a gate that warms up leaves only the reward."""
    if course.plan.gate is not None:
        return reward_formulas.surrogate(lambda x: x.advantage)
    assert course.plan.preset is not None
    return FORMULAS[course.plan.preset]


def first_step(stage: Stage, course: Course) -> tuple[Problem, Tensor]:
    """The first step's groups as they were stored, with every distribution computed anew in float32.

    Returns:
        the problem, and log p [T, V], differentiable by the student's weights.
    """
    stored = [course.submitted[group.index] for (group,) in zip(course.steps[0][0], strict=True)]
    rows = [row for group, requests in stored for row in rollout_rows(stage, course, group, requests)]
    column = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    views = tuple(column[f"view:{view}"] for view in course.plan.views)
    log_p = column["student"]
    problem = Problem(
        student=log_p.detach(),
        views=views,
        sampled=column["sampled"],
        behaviour=column["behaviour"],
        old=log_p.detach().gather(1, column["sampled"][:, None])[:, 0],
        lengths=torch.tensor([len(row["sampled"]) for row in rows]),
        advantage=column["advantage"],
        paid=column["paid"],
        marked=column["marked"],
        factors=tuple(column[f"factor:{view}"] for view in course.plan.weight_fields),
        k=course.plan.k,
        groups=torch.tensor([i for i, (group, _) in enumerate(stored) for _ in group.rollouts]),
        guided=torch.tensor([rollout.guided for group, _ in stored for rollout in group.rollouts]),
        under=column.get("under"),
        chunks=audited(course),
    )
    return problem, log_p


def audited(course: Course) -> tuple[tuple[int, float], ...]:
    """Where the chunks of the first step begin in its rows, and what the writer said of them."""
    begin, found = 0, []
    for group in course.steps[0][0]:
        for rollout in group.rollouts:
            if rollout.anchors is not None and rollout.agreement is not None:
                places = (begin + rollout.anchors).tolist()
                found += list(zip(places, rollout.agreement.tolist(), strict=True))
            begin += rollout.length
    return tuple(found)


def rollout_rows(
    stage: Stage, course: Course, group: Group, requests: tuple[ViewRequest, ...]
) -> list[dict[str, Tensor]]:
    plan = course.plan
    rewards = torch.tensor([rollout.reward for rollout in group.rollouts])
    advantage = rewards - rewards.mean()
    advantage = advantage / (rewards.std() + 1e-6) if plan.advantage_std else advantage
    prompt, by_view = ids(group.prompt_ids), {request.view: request for request in requests}
    rows = []
    for place, rollout in enumerate(group.rollouts):
        response = ids(rollout.response_ids)
        size = len(response)
        row = {
            "student": forward(stage, "student", prompt, response),
            "sampled": response,
            "behaviour": torch.from_numpy(np.frombuffer(rollout.behaviour_logprobs, "<f4").copy()),
            "advantage": advantage[place].expand(size),
            "paid": rewards[place].expand(size),
            "marked": torch.tensor(set(plan.contexts) <= set(rollout.privileged_views)).expand(size),
        }
        for view in plan.views:
            contexts = by_view[view].contexts
            context = ids(contexts[place if len(contexts) > 1 else 0].ids)
            row[f"view:{view}"] = forward(stage, model_of(course, view), context, response).detach()
        if plan.auxiliary is not None:
            row["under"] = forward(stage, "student", ids(rollout.auxiliary_context_ids), response)
        for view in plan.weight_fields:
            row[f"factor:{view}"] = torch.tensor(group.view_weights[view]).expand(size)
        rows.append(row)
    return rows


def model_of(course: Course, view: str) -> str:
    """Which model had scored the first step: moving weights are those of the student as it began."""
    entry = course.config.teachers.get(course.plan.teachers[view])
    return "student" if entry is None else Path(entry.model or "").name


def ids(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<i4").astype(np.int64))


def forward(stage: Stage, model: str, context: Tensor, response: Tensor) -> Tensor:
    """log-probabilities at the positions of the response, [R, V]: one sequence, one forward."""
    whole = torch.cat([context, response])[None]
    logits = stage.reference(model)(input_ids=whole, use_cache=False).logits[0]
    return logits[len(context) - 1 : -1].log_softmax(-1)
