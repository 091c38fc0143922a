"""Groups as the queue delivers them, made by hand: rollouts, and scores of every signal a plan asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tutelage.v1.rollout_pb2 import Group, Rollout
from tutelage_client.codec import pack_ids, score_to_proto
from tutelage_client.types import Identity, Score, SequenceScore, Usage

from services.queue import ScoredGroup
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.plan import AUDIT
from student_trainer.objective.settings import ObjectiveSettings
from student_trainer.verify import Expectations

RUN, VOCAB, FINGERPRINT = "run", 32, "f" * 64

IDENTITY = Identity(
    name="big",
    model="m",
    revision="r0",
    weights_version=0,
    tokenizer_fingerprint=FINGERPRINT,
    vocab_size=VOCAB,
    engine="test",
    engine_version="0",
    dtype="float32",
    head_dtype="float32",
)


WRITER = replace(IDENTITY, name="writer", engine="test-writer")


def make_plan(**settings: Any) -> Plan:
    teachers = ["big"] if settings.get("audit") is None else ["big", WRITER.name]
    return compile_plan(
        ObjectiveSettings.model_validate(settings), student_temperature=1.0, teachers=teachers
    )


def make_expectations(plan: Plan) -> Expectations:
    return Expectations(RUN, plan, 1.0, VOCAB, FINGERPRINT)


def make_group(
    index: int,
    plan: Plan,
    *,
    version: int = 0,
    lengths: tuple[int, ...] = (3, 5),
    rewards: tuple[float | None, ...] | None = None,
    prompt: int = 4,
) -> Group:
    """Random prompt, responses, behaviour log-probabilities and what else the plan asks of a sampler."""
    random = np.random.default_rng([index, version])
    group = Group(
        id=f"{RUN}-{index}",
        run=RUN,
        index=index,
        policy_version=version,
        prompt_ids=pack_ids(random.integers(3, VOCAB, prompt)),
        temperature=1.0,
        prompt_text=f"prompt {index}",
        sampled_by="student" if plan.preference is None else "student@context",
    )
    for place, length in enumerate(lengths):
        rollout = Rollout(
            response_ids=pack_ids(random.integers(3, VOCAB, length)),
            behaviour_logprobs=random.uniform(-4, -1, length).astype("<f4").tobytes(),
            finished=True,
            guided=plan.preference is not None and place % 2 == 0,
            privileged_views=plan.contexts if plan.preference is not None else (),
        )
        if rewards is not None and rewards[place] is not None:
            rollout.reward = float(rewards[place] or 0.0)
        if plan.student_candidates:
            candidates = np.stack(
                [random.permutation(VOCAB)[: plan.student_candidates] for _ in range(length)]
            )
            rollout.candidate_ids = pack_ids(candidates)
            rollout.num_candidates = plan.student_candidates
        if plan.audit is not None:
            size = plan.audit.chunk_tokens
            starts = np.arange(length % size, length - size + 1, size)
            chosen = random.permutation(starts)[: plan.audit.chunks]
            rollout.anchors = pack_ids(np.sort(chosen).astype(np.int32))
        group.rollouts.append(rollout)
    return group


def make_scores(group: Group, plan: Plan, view: str = "teacher", identity: Identity = IDENTITY) -> Score:
    """Scores of one fixed teacher: the same distribution at every position."""
    _, signal = plan.view_requests[view]
    teacher = teacher_logprobs()
    order = np.argsort(-teacher, kind="stable").astype(np.int32)
    sequences = []
    for place, rollout in enumerate(group.rollouts):
        ids = np.frombuffer(rollout.response_ids, dtype="<i4")
        score = SequenceScore(id=str(place), sampled=teacher[ids], valid=np.ones(len(ids), dtype=np.bool_))
        if signal.entropy:
            entropy = -(np.exp(teacher) * teacher).sum()
            score = replace(score, entropy=np.full(len(ids), entropy, dtype=np.float32))
        if signal.top_k:
            top = np.tile(order[: signal.top_k], (len(ids), 1))
            score = replace(score, top_ids=top, top_logprobs=teacher[top])
        if signal.candidates:
            candidates = np.frombuffer(rollout.candidate_ids, "<i4").reshape(len(ids), -1)
            score = replace(score, candidate_logprobs=teacher[candidates])
        sequences.append(score)
    return Score(tuple(sequences), identity, Usage(compute_ms=1.0))


def make_agreement(group: Group, identity: Identity = WRITER) -> Score:
    """A writer's answers: random numbers from 0 to 1."""
    random = np.random.default_rng([group.index, 7])
    sequences = [
        SequenceScore(str(place), agreement=random.random(len(rollout.anchors) // 4).astype(np.float32))
        for place, rollout in enumerate(group.rollouts)
    ]
    return Score(tuple(sequences), identity, Usage(compute_ms=1.0))


def teacher_logprobs() -> np.ndarray[Any, np.dtype[np.float32]]:
    """[V]: a fixed, rather peaked distribution."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    return logits.log_softmax(0).numpy()


def scored(group: Group, scores: dict[str, Score], errors: dict[str, str] | None = None) -> ScoredGroup:
    return ScoredGroup(
        entry=f"{group.index}-0",
        group=group,
        scores={view: score_to_proto(score) for view, score in scores.items()},
        errors=errors or {},
    )


def scored_group(index: int, plan: Plan, **how: Any) -> ScoredGroup:
    group = make_group(index, plan, **how)
    scores = {view: make_scores(group, plan, view) for view in plan.view_requests}
    if plan.audit is not None:
        scores[AUDIT] = make_agreement(group)
    return scored(group, scores)
