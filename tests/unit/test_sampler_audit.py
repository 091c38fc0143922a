"""The sampler of a run whose responses are audited: the student says where, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training_run import write_model
from transformers import AutoModelForCausalLM
from tutelage.v1.rollout_pb2 import SampleOrder
from tutelage_client.codec import unpack_ids

from student_trainer.config import parse_run_config
from student_trainer.policy_store import PolicyStore
from student_trainer.sampler import read_back
from student_trainer.sampler.build import build_sampler
from student_trainer.sampler.groups import SampledGroup

CHUNKS, SIZE, TEMPERATURE = 2, 2, 0.8
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "student": ({}, {"support": "teacher_topk"}),
    "student, candidates": ({}, {"support": "student_topk"}),
    "another model": ({"sampler": "teacher:big", "student_fraction": 0.5}, {"support": "student_topk"}),
    "guided": (
        {"context": {"user": "1+{prompt}"}, "guided_samples": 1},
        {"support": "student_topk", "weights": {"rollout_cap": 2.0}},
    ),
    "selected positions": ({}, {"support": "teacher_topk", "tokens": {"skip_first_n": 2}}),
}


def sampled(root: Path, sampling: dict[str, Any], objective: dict[str, Any]) -> list[SampledGroup]:
    """Eight groups, by the student's weights of version 2, which were loaded in place of the first."""
    for seed, name in enumerate(("student", "big", "first")):
        write_model(root / name, seed)
    config = parse_run_config(
        {
            "run": {"directory": str(root / "run"), "threads": 1},
            "teachers": {
                "big": {"model": str(root / "big")},
                "writer": {"address": "writer.example:50051"},
            },
            "student": {"model": str(root / "student"), "device": "cpu"},
            "data": {"task": "addition"},
            "sampling": {
                "samples_per_prompt": 3, "max_new_tokens": 6, "temperature": TEMPERATURE, **sampling,
            },
            "objective": {
                "mix": "route", "estimator": "pathwise", "k": 4,
                "views": {"teacher": {"weights": "teacher:big"}},
                "audit": {"teacher": "writer", "chunks": CHUNKS, "chunk_tokens": SIZE}, **objective,
            },
            "training": {"steps": 1},
        }
    )  # fmt: skip
    store = PolicyStore(root / "run" / "policy")
    for version, name in ((1, "first"), (2, "student")):
        store.publish(version, lambda directory, name=name: _copy(root / name, directory), lineage=())
    first = store.get(1)
    assert first is not None
    policy, sampler = build_sampler(config, first)
    assert policy.ready(SampleOrder(id="order", policy_version=2, exact=True))
    try:
        return sampler.sample(range(8), 2)
    finally:
        sampler.close()


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def peaks(entropy: list[float], first: int) -> list[int]:
    """The definition, position by position; those before `first` are not selected."""
    taken: list[int] = []
    for _ in range(CHUNKS):
        free = [
            t for t in range(first, len(entropy) - SIZE + 1) if all(abs(t - other) >= SIZE for other in taken)
        ]
        if free:
            taken.append(max(free, key=lambda t: (entropy[t], -t)))
    return sorted(taken)


@pytest.mark.parametrize("case", CASES)
def test_anchors_are_at_the_students_peaks_after_its_own_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    sampling, objective = CASES[case]
    forwards: list[int] = []
    forward = read_back.hidden_states
    monkeypatch.setattr(read_back, "hidden_states", lambda *given: (forwards.append(1), forward(*given))[1])
    groups = sampled(tmp_path, sampling, objective)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    sizes, writers = set(), set()
    for each in groups:
        prompt = unpack_ids(each.group.prompt_ids, "prompt")
        writers.add(each.group.sampled_by)
        assert [request.view for request in each.requests] == ["teacher", "audit"]
        audit = each.requests[1]
        assert (audit.teacher, audit.signal.chunk_tokens, audit.signal.continuations) == ("writer", SIZE, 10)
        assert [context.ids for context in audit.contexts] == [each.group.prompt_ids]
        for rollout in each.group.rollouts:
            ids = unpack_ids(rollout.response_ids, "ids")
            with torch.inference_mode():
                both = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))
                logits = student(both[None]).logits[0, len(prompt) - 1 : -1]
            entropy = torch.distributions.Categorical(logits=logits.double() / TEMPERATURE).entropy()
            expected = peaks(entropy.tolist(), 2 if "tokens" in objective else 0)
            assert rollout.HasField("anchors")
            assert unpack_ids(rollout.anchors, "anchors").tolist() == expected
            sizes.add(len(expected))
            if objective["support"] == "student_topk":
                candidates = unpack_ids(rollout.candidate_ids, "candidates", 4)
                np.testing.assert_array_equal(candidates, logits.topk(4).indices.numpy())
            else:
                assert not rollout.candidate_ids
    assert CHUNKS in sizes
    assert len(forwards) == len(writers) if case == "another model" else 1, "one forward for both"
