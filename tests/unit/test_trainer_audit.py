"""Audited chunks from the plan's request through what the queue delivers to the trained step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training_groups import (
    IDENTITY,
    WRITER,
    make_agreement,
    make_expectations,
    make_group,
    make_plan,
    make_scores,
    scored,
    scored_group,
)
from support.training_run import write_model
from torch import Tensor
from tutelage.v1.rollout_pb2 import Group
from tutelage_client.codec import pack_ids
from tutelage_client.types import Limits, Score, SequenceError, SequenceScore, Signal

from launcher.doctor_checks import check_objective
from student_trainer.batch import idle_batch, pack_step
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.config_errors import RunFileError
from student_trainer.exchange import decode_micro_batches, encode_micro_batches
from student_trainer.learner import Learner
from student_trainer.objective.compile import check_limits
from student_trainer.objective.plan import Plan
from student_trainer.objective.settings import ObjectiveError
from student_trainer.objective_pass import ObjectivePass
from student_trainer.resume import fixed_settings
from student_trainer.sections import StudentSettings, TrainingSettings
from student_trainer.student import Student, load_student
from student_trainer.verify import RefusedGroupError, TrainingGroup, verify_group

C, N, ALPHA, BETA = 3, 5, 2.0, 0.5
LENGTHS = (9, 2, 7, 4)  # of the second no chunk
AUDIT: dict[str, Any] = {
    "teacher": "writer", "chunks": 2, "chunk_tokens": C, "continuations": N, "prior": ALPHA,
}  # fmt: skip
ROW: dict[str, Any] = {
    "audit": AUDIT, "mix": "route", "distill_coefficient": BETA, "divergence": "kl_teacher_student",
    "support": "teacher_topk", "k": 32, "tail": "renormalise", "estimator": "pathwise",
}  # fmt: skip
PLAN = make_plan(**ROW)
SILENT = SequenceError("OUT_OF_RANGE", "writer: nothing was said")


def groups_of(count: int = 3, plan: Plan = PLAN) -> list[TrainingGroup]:
    return [
        verify_group(scored_group(i, plan, lengths=LENGTHS), make_expectations(plan), {})
        for i in range(count)
    ]


def verified(
    answers: Score | None, *, group: Group | None = None, errors: dict[str, str] | None = None, **row: Any
) -> TrainingGroup:
    plan = make_plan(**ROW | row)
    group = make_group(0, plan, lengths=LENGTHS) if group is None else group
    scores = {view: make_scores(group, plan, view) for view in plan.view_requests}
    if answers is not None:
        scores["audit"] = answers
    return verify_group(scored(group, scores, errors), make_expectations(plan), {})


def changed(**answers: SequenceScore) -> Score:
    """The writer's answers, but for some: r0 is the first rollout's."""
    score = make_agreement(make_group(0, PLAN, lengths=LENGTHS))
    found = [answers.get(f"r{place}", answer) for place, answer in enumerate(score.sequences)]
    return replace(score, sequences=tuple(found))


# What is asked, and of whom.


def test_the_writer_is_asked_beside_the_views_and_no_view_falls_to_it() -> None:
    asked = ("writer", Signal(sampled=False, continuations=N, chunk_tokens=C))
    assert dict(PLAN.requests) == {**PLAN.view_requests, "audit": asked}
    assert PLAN.teachers == {"teacher": "big"}
    assert PLAN.scoring_teachers == ("big", "writer")
    assert PLAN.teacher_of("audit", "any tag") == "writer"
    assert not PLAN.needs_reward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix": "replace"}, r"objective\.mix: got 'replace' with objective\.audit; allowed: \"route\""),
        ({"mix": "add"}, r"objective\.mix: got 'add'"),
        ({"correction": {"kind": "ppo"}}, r"objective\.correction: got 'ppo' with objective\.audit"),
        ({"reward_coefficient": 0.0}, r"objective\.reward_coefficient: got 0\.0"),
        ({"horizon": 2}, r"objective\.horizon: got 2"),
        ({"tokens": {"evidence_above": 0.0}}, r"tokens\.evidence_above: got 0\.0 with objective\.audit"),
        (
            {"tokens": {"teacher_entropy_above": 1.0}},
            r"tokens\.teacher_entropy_above: got 1\.0 with objective\.audit",
        ),
        (
            {"tokens": {"teacher_entropy_below": 2.0}},
            r"tokens\.teacher_entropy_below: got 2\.0 with objective\.audit",
        ),
        ({"audit": {**AUDIT, "teacher": "nobody"}}, r"audit\.teacher: got 'nobody', allowed: big, writer"),
        ({"views": {"audit": {"weights": "teacher:big"}}}, r"objective\.views\.audit: .* the name is taken"),
        ({"views": {"t": {"weights": "teacher:writer"}}}, "got teacher 'writer', allowed: big"),
        ({"judge": "big"}, r"objective\.judge: set to 'big', but it only acts with .* no audit"),
        ({"route_reward": "positive"}, r"objective\.route_reward: .* no audit"),
        ({"advantage_std": True}, r"objective\.advantage_std: .* no audit"),
    ],
)
def test_an_objective_without_a_place_for_audits_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        make_plan(**ROW | change)


@pytest.mark.parametrize("field", ["chunks", "chunk_tokens", "continuations", "prior"])
def test_every_number_of_an_audit_is_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"audit.{field}"):
        make_plan(**ROW | {"audit": {**AUDIT, field: 0}})


def test_only_a_writer_writes_and_it_does_nothing_else() -> None:
    writer, teacher = Limits(max_continuations=N), Limits(max_top_k=64)
    assert check_limits(PLAN, "writer", writer) == []
    assert check_limits(PLAN, "big", teacher) == []
    (problem,) = check_limits(PLAN, "writer", teacher)
    assert problem == "objective.audit.teacher: teacher 'writer' is no writer"
    (problem,) = check_limits(PLAN, "writer", Limits(max_continuations=N - 1))
    assert problem == f"objective.audit.continuations: got {N}, teacher 'writer' writes at most {N - 1}"
    (problem,) = check_limits(PLAN, "big", writer)
    assert "the teacher is a writer, which answers no log-probability" in problem


# What may be trained on.


def test_agreements_come_to_their_rollouts() -> None:
    group = make_group(0, PLAN, lengths=LENGTHS)
    answers = make_agreement(group)
    found = verified(answers)
    for rollout, sent, answer in zip(found.rollouts, group.rollouts, answers.sequences, strict=True):
        assert rollout.anchors is not None
        assert rollout.agreement is not None
        assert rollout.anchors.tobytes() == sent.anchors
        assert answer.agreement is not None
        np.testing.assert_array_equal(rollout.agreement, answer.agreement)
    assert [rollout.anchors.size for rollout in found.rollouts if rollout.anchors is not None] == [2, 0, 2, 1]
    assert "audit" not in found.rollouts[0].scores


@pytest.mark.parametrize(
    ("answers", "reason", "message"),
    [
        (None, "shape", "view 'audit': there is no score"),
        (changed(r0=SequenceScore("0", agreement=np.zeros(1, np.float32))), "shape", r"got shape \(1,\)"),
        (changed(r0=SequenceScore("0")), "shape", "agreement: got shape None"),
        (changed(r0=SequenceScore("0", agreement=np.array([0.5, 1.5], np.float32))), "shape", r"1\.5\]"),
        (changed(r0=SequenceScore("0", agreement=np.array([-0.1, 0.5], np.float32))), "shape", r"\[-0\.1"),
        (changed(r0=SequenceScore("0", agreement=np.array([math.nan, 0.5], np.float32))), "shape", "nan"),
        (
            changed(
                r0=SequenceScore("0", agreement=np.zeros(2, np.float32), valid=np.ones(9, dtype=np.bool_))
            ),
            "shape",
            "alone",
        ),
        (replace(changed(), identity=IDENTITY), "identity", "scored by 'big', asked of 'writer'"),
        (
            replace(changed(), identity=replace(WRITER, tokenizer_fingerprint="0" * 64)),
            "identity",
            "token ids of one mean other text",
        ),
        (
            changed(**{f"r{i}": SequenceScore(str(i), SILENT) for i in (0, 2, 3)}),
            "no_score",
            "no rollout was audited: view 'audit': OUT_OF_RANGE",
        ),
    ],
)
def test_what_is_no_audit_of_this_group_is_refused(answers: Score | None, reason: str, message: str) -> None:
    with pytest.raises(RefusedGroupError, match=message) as refusal:
        verified(answers)
    assert refusal.value.reason == reason


def test_a_writer_that_fails_leaves_no_group_to_its_other_views() -> None:
    for missing in ("drop", "renormalise"):
        with pytest.raises(RefusedGroupError, match="view 'audit': dead") as refusal:
            verified(
                None,
                errors={"audit": "dead"},
                missing_view=missing,
                views={"a": {"weights": "teacher:big"}, "b": {"weights": "initial"}},
                target="losses",
            )
        assert refusal.value.reason == "failed"


@pytest.mark.parametrize(
    "anchors", [[-1], [7], [0, 2], [3, 0], [0, 3, 6]], ids=["before", "past", "overlap", "order", "too many"]
)
def test_anchors_that_are_none_are_refused(anchors: list[int]) -> None:
    group = make_group(0, PLAN, lengths=LENGTHS)
    group.rollouts[0].anchors = pack_ids(np.array(anchors, np.int32))
    with pytest.raises(RefusedGroupError, match=r"rollouts\[0\].anchors: got \["):
        verified(changed(), group=group)
    group.rollouts[0].ClearField("anchors")
    with pytest.raises(RefusedGroupError, match=r"rollouts\[0\].anchors: missing"):
        verified(changed(), group=group)


# The step.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("student"), seed=1)


@pytest.fixture(scope="module")
def student(model: Path) -> Student:
    return load_student(StudentSettings(model=str(model), device="cpu"))


def plain_logprobs(student: Student, group: TrainingGroup, place: int) -> Tensor:
    """log p [R, V] of one response alone, differentiable."""
    context, response = group.prompt_ids, group.rollouts[place].response_ids
    ids = torch.from_numpy(np.concatenate([context, response]).astype(np.int64))[None]
    logits: Tensor = student.model(input_ids=ids).logits[0]
    return logits[len(context) - 1 : -1].float().log_softmax(-1)


def written_out(student: Student, groups: list[TrainingGroup], start: list[list[Tensor]]) -> Tensor:
    """The step's loss; `start` has log p(y) [R] of every response as the step began."""
    total, tokens = torch.zeros(()), 0
    for group, began in zip(groups, start, strict=True):
        for place, rollout in enumerate(group.rollouts):
            log_p = plain_logprobs(student, group, place)
            score = rollout.scores["teacher"]
            assert score.top_ids is not None
            q = torch.zeros_like(log_p).scatter(
                1, torch.from_numpy(score.top_ids).long(), torch.from_numpy(np.exp(score.top_logprobs))
            )
            chunks = {int(a): i for i, a in enumerate(rollout.anchors if rollout.anchors is not None else ())}
            tokens, t = tokens + rollout.length, 0
            while t < rollout.length:
                if t not in chunks:
                    total = total + BETA * (q[t] * (q[t].log() - log_p[t])).sum()
                    t += 1
                    continue
                if rollout.agreement is not None:
                    confidence = began[place][t : t + C].mean().exp()
                    weight = (N * float(rollout.agreement[chunks[t]]) + ALPHA * confidence) / (N + ALPHA)
                    for at in range(t, t + C):
                        total = total - weight * log_p[at, int(rollout.response_ids[at])]
                t += C
    return total / tokens


def begun(student: Student, groups: list[TrainingGroup]) -> list[list[Tensor]]:
    with torch.no_grad():
        return [
            [
                plain_logprobs(student, group, place).gather(
                    1, torch.from_numpy(rollout.response_ids.astype(np.int64))[:, None]
                )[:, 0]
                for place, rollout in enumerate(group.rollouts)
            ]
            for group in groups
        ]


def gradients(student: Student, loss: Tensor) -> dict[str, Tensor]:
    student.model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in student.trained() if p.grad is not None}
    student.model.zero_grad()
    return found


@pytest.mark.parametrize("budget", [10_000, 40], ids=["one", "several"])
def test_a_step_has_the_loss_and_the_gradient_of_the_formula(student: Student, budget: int) -> None:
    """Whole, in micro-batches, and as other ranks get them; one response's writer was silent."""
    groups = groups_of()
    groups[0] = verified(changed(r2=SequenceScore("2", SILENT)))
    batches = pack_step(groups, PLAN, budget)
    assert (len(batches) > 1) == (budget == 40)
    expected = written_out(student, groups, begun(student, groups))
    slopes = gradients(student, expected)
    for sent in (batches, decode_micro_batches(encode_micro_batches(batches))):
        outs = [ObjectivePass(student)(batch.layout, batch.tokens, PLAN) for batch in sent]
        loss = torch.stack([out.loss for out in outs]).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients(student, loss).items():
            torch.testing.assert_close(gradient, slopes[name], rtol=1e-3, atol=1e-6)
        sums = [out.output.metrics for out in outs if out.output is not None]
        silent = len(groups[0].rollouts[2].anchors if groups[0].rollouts[2].anchors is not None else ())
        assert sum(each["dropped_audit"] for each in sums) == silent * C > 0
    idle = idle_batch(batches[-1]).tokens
    assert idle.audit_anchor is not None
    assert len(idle.audit_anchor) == 1
    out = ObjectivePass(student)(idle_batch(batches[-1]).layout, idle, PLAN)
    assert float(out.loss.detach()) == 0


def test_later_updates_take_the_confidence_that_the_step_began_with(model: Path) -> None:
    """The second update's loss is the formula's at the moved weights, with π̄ of those before."""
    own = load_student(StudentSettings(model=str(model), device="cpu"))
    settings = {"steps": 9, "learning_rate": 0.3, "warmup_steps": 0, "updates_per_step": 2}
    learner = Learner(own, PLAN, TrainingSettings.model_validate(settings))
    groups = groups_of(4)
    start = begun(own, groups)
    first = written_out(own, groups[:2], start[:2])
    one = Learner(
        load_student(StudentSettings(model=str(model), device="cpu")),
        PLAN,
        TrainingSettings.model_validate({**settings, "updates_per_step": 1}),
    )
    one.step(groups[:2], 0)
    second = written_out(one.student, groups[2:], start[2:])
    moved = written_out(one.student, groups[2:], begun(one.student, groups[2:]))
    result = learner.step(groups, 0)
    assert result.loss == pytest.approx(float((first + second).detach()) / 2, rel=1e-4)
    assert abs(float((second - moved).detach())) > 1e-2, "π̄ moved too little to tell"


def test_training_makes_agreed_text_likelier(model: Path) -> None:
    own = load_student(StudentSettings(model=str(model), device="cpu"))
    settings = TrainingSettings.model_validate({"steps": 30, "learning_rate": 1e-2, "warmup_steps": 1})
    learner, groups = Learner(own, PLAN, settings), groups_of()
    before = begun(own, groups)
    for step in range(10):
        sums = learner.step(groups, step).sums
    assert sums["audited"] == C * sum(
        len(r.anchors) for g in groups for r in g.rollouts if r.anchors is not None
    )
    assert 0 < sums["agreement"] < sums["audited"]
    after = begun(own, groups)
    gains = [
        float((b[t : t + C] - a[t : t + C]).mean())
        for group, one, two in zip(groups, before, after, strict=True)
        for rollout, a, b in zip(group.rollouts, one, two, strict=True)
        for t in (rollout.anchors if rollout.anchors is not None else ())
    ]
    assert sum(gain > 0 for gain in gains) > 0.9 * len(gains)


# The run file.


def config(objective: dict[str, Any] = ROW, *, sampled: int = 8, **writer: Any) -> RunConfig:
    return parse_run_config(
        {
            "teachers": {"big": {"model": "m"}, "writer": {"model": "w", **writer}},
            "student": {"model": "s"},
            "data": {"path": "x.jsonl"},
            "sampling": {"max_new_tokens": sampled},
            "objective": objective,
            "training": {"steps": 1},
        }
    )


def test_a_run_file_names_its_writer_and_needs_no_answers_then() -> None:
    """One sample of a prompt is enough, too: nothing is compared with siblings."""
    assert config(writer={}).plan().audit == PLAN.audit
    assert config({"preset": "omniopd", "audit": AUDIT}, writer={}).plan().audit == PLAN.audit
    with pytest.raises(RunFileError, match=r"needs a section \[teachers\.writer\.writer\]"):
        config()
    with pytest.raises(RunFileError, match="a writer answers no log-probability"):
        config({"views": {"t": {"weights": "teacher:writer"}}}, writer={})
    with pytest.raises(RunFileError, match=r"chunk_tokens: got 3 with \[sampling\] max_new_tokens = 2"):
        config(sampled=2, writer={})


def test_a_run_goes_on_only_with_the_audit_that_it_began_with() -> None:
    run = config(writer={})
    before = fixed_settings(run, run.plan())
    assert before["objective.audit"] == AUDIT
    for key, value in (("chunk_tokens", 4), ("chunks", 3), ("continuations", 6), ("prior", 1.0)):
        other = config({**ROW, "audit": {**AUDIT, key: value}}, writer={})
        assert fixed_settings(other, other.plan()) != before, key


def test_doctor_says_what_the_writer_will_be_asked() -> None:
    run = config(writer={})
    findings = list(check_objective(run, {"writer": Limits(), "big": Limits(max_top_k=64)}))
    assert any("writer writes 5 continuations at each of up to 2 chunks" in f.message for f in findings)
    assert [f.message for f in findings if f.level == "fail"] == [
        "objective.audit.teacher: teacher 'writer' is no writer"
    ]
    served = check_objective(run, {"writer": Limits(max_continuations=N)})
    assert [f.message for f in served if f.subject == "teacher writer"] == ["serves the objective (writes)"]
    alone = config({"mix": "route", "distill_coefficient": 0.0, "audit": AUDIT}, writer={})
    assert "an audit alone" in next(iter(check_objective(alone, {}))).message
