"""The optimizer step on tiny real models: it learns, it can be resumed bitwise, it refuses nonsense."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import save_tiny_model
from support.training_groups import make_expectations, make_plan, scored_group, teacher_logprobs
from support.training_run import write_model
from transformers import AutoModelForCausalLM
from tutelage_client.errors import TutelageError

from services.models.head import head_of
from services.models.packed import build_layout, hidden_states
from student_trainer.alignment import check_alignment
from student_trainer.checkpoint import CheckpointStore, load_tensors
from student_trainer.learner import Learner
from student_trainer.ledger import Ledger
from student_trainer.objective.compile import Plan
from student_trainer.optimizer import learning_rate
from student_trainer.sections import LoraSettings, StudentSettings, TrainingSettings
from student_trainer.student import Student, load_student
from student_trainer.verify import TrainingGroup, verify_group

DISTILL = make_plan(support="teacher_topk", k=16, tail="bucket", estimator="pathwise")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("student"), seed=1)


def settings(**changes: object) -> TrainingSettings:
    values = {"steps": 40, "learning_rate": 1e-2, "warmup_steps": 2, "micro_batch_tokens": 64} | changes
    return TrainingSettings.model_validate(values)


def make_learner(
    model: Path, plan: Plan = DISTILL, *, lora: LoraSettings | None = None, **changes: object
) -> Learner:
    torch.manual_seed(3)
    student = load_student(StudentSettings(model=str(model), device="cpu", lora=lora))
    return Learner(student, plan, settings(**changes))


def groups_of(step: int, plan: Plan = DISTILL, count: int = 4) -> list[TrainingGroup]:
    rewards = (1.0, 0.0) if plan.needs_reward else None
    return [
        verify_group(scored_group(step * count + i, plan, rewards=rewards), make_expectations(plan), {})
        for i in range(count)
    ]


def divergence(student: Student) -> float:
    """Mean KL(student‖teacher) over the whole vocabulary on fresh responses, nats."""
    teacher = torch.from_numpy(teacher_logprobs())
    held_out = groups_of(1000)
    layout = build_layout(
        [group.prompt_ids for group in held_out],
        [(i, g.rollouts[0].response_ids) for i, g in enumerate(held_out)],
    )
    with torch.no_grad():
        rows = hidden_states(student.model, layout)[layout.score_rows]
        logp = head_of(student.model).logits(rows).log_softmax(-1)
    return float((logp.exp() * (logp - teacher)).sum(-1).mean())


def test_student_moves_to_its_teacher(model: Path) -> None:
    learner = make_learner(model)
    before = divergence(learner.student)
    losses = [learner.step(groups_of(step), step).loss for step in range(40)]
    after = divergence(learner.student)
    assert before > 1.0
    assert after < 0.1 * before
    assert losses[-1] < 0.1 * losses[0]


def test_adapters_learn_and_the_weights_below_them_do_not_move(model: Path, tmp_path: Path) -> None:
    learner = make_learner(model, lora=LoraSettings(rank=8, alpha=32.0), learning_rate=3e-2)
    frozen = {
        n: p.detach().clone() for n, p in learner.student.model.named_parameters() if not p.requires_grad
    }
    before = divergence(learner.student)
    for step in range(40):
        learner.step(groups_of(step), step)
    after = divergence(learner.student)
    assert after < 0.5 * before
    for name, parameter in learner.student.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert all("lora_" in name for name in learner.state_tensors() if name.startswith("model."))

    learner.student.export(tmp_path / "merged")
    merged = load_student(StudentSettings(model=str(tmp_path / "merged"), device="cpu"))
    assert divergence(merged) == pytest.approx(after, abs=1e-5)
    assert not any("lora" in name for name in merged.model.state_dict())
    learner.student.export_adapter(tmp_path / "adapter")
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(str(model))
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = torch.randint(3, 30, (1, 9))
    exported = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, exported(ids).logits, rtol=0, atol=1e-4)


def test_every_update_of_a_step_trains_its_own_groups(model: Path) -> None:
    whole, halves = make_learner(model, updates_per_step=2), make_learner(model)
    groups = groups_of(0)
    result = whole.step(groups, 0)
    parts = [halves.step(part, 0) for part in (groups[:2], groups[2:])]
    assert result.loss == pytest.approx(sum(part.loss for part in parts) / 2)
    assert result.gradient_norm == max(part.gradient_norm for part in parts)
    assert result.sums["positions"] == sum(part.sums["positions"] for part in parts)
    for (name, one), (_, other) in zip(whole.student.trained(), halves.student.trained(), strict=True):
        assert torch.equal(one, other), name
    uneven = make_learner(model, updates_per_step=3).step(groups_of(0), 0, traces=True)
    assert [len(batch.members) for batch in uneven.micro_batches[: uneven.unmoved]] == [2]
    assert sum(len(batch.members) for batch in uneven.micro_batches) == 8


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, dropout=0.5)], ids=["full", "dropout"])
def test_later_updates_are_compared_with_the_student_as_the_step_began(
    model: Path, lora: LoraSettings | None
) -> None:
    plan = make_plan(correction={"kind": "importance"}, weights={"rollout_cap": 1e9})
    learner = make_learner(
        model, plan, lora=lora, updates_per_step=2, learning_rate=1.0, micro_batch_tokens=999
    )
    training = [module.training for module in learner.student.model.modules()]
    groups = groups_of(0, plan)
    old = [start_logprobs(learner.student, group) for group in groups]
    result = learner.step(groups, 5, traces=True)
    assert [module.training for module in learner.student.model.modules()] == training
    for part, (batch, traces) in enumerate(zip(result.micro_batches, result.per_token, strict=True)):
        began = torch.cat(old[2 * part : 2 * part + 2])
        weight = (began - batch.tokens.behaviour_logprobs).exp()
        torch.testing.assert_close(traces["rollout_weight"], weight)
        if lora is None:  # dropout draws anew in the pass that is trained
            ratio = (traces["student_logprob"] - began).exp()
            torch.testing.assert_close(traces["ratio"], ratio)
            assert bool((ratio - 1).abs().max() > 1e-3) == (part == 1)


def start_logprobs(student: Student, group: TrainingGroup) -> torch.Tensor:
    """log p of a group's response tokens, without dropout: an untrained adapter changes nothing."""
    responses = [rollout.response_ids for rollout in group.rollouts]
    layout = build_layout([group.prompt_ids], [(0, ids) for ids in responses])
    with torch.no_grad():
        rows = hidden_states(student.model, layout)[layout.score_rows]
        logp = head_of(student.model).logits(rows).log_softmax(-1)
    return logp.gather(1, torch.from_numpy(np.concatenate(responses)).long()[:, None])[:, 0]


def test_an_update_that_diverges_is_refused_alone(model: Path) -> None:
    learner = make_learner(model, updates_per_step=2)
    _, parameter = learner.student.trained()[0]
    passes = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return gradient * math.inf if passes == 1 else gradient

    parameter.register_hook(spoil)
    only = make_learner(model, updates_per_step=1)
    groups = groups_of(0)
    result = learner.step(groups, 0)
    assert result.refused is not None
    assert result.refused.diverged
    only.step(groups[2:], 0)
    assert torch.equal(parameter, only.student.trained()[0][1])


def test_export_is_loaded_by_transformers_with_the_trained_weights(model: Path, tmp_path: Path) -> None:
    learner = make_learner(model)
    learner.step(groups_of(0), 0)
    learner.student.export(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    for (name, trained), exported in zip(
        learner.student.model.named_parameters(), loaded.parameters(), strict=True
    ):
        assert torch.equal(trained, exported), name


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, dropout=0.3)], ids=["full", "lora with dropout"])
def test_resumed_learner_continues_bitwise(model: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    whole = make_learner(model, lora=lora)
    for step in range(3):
        whole.step(groups_of(step), step)
    CheckpointStore(tmp_path).save(whole.state_tensors(), Ledger(settings={}, step=3))
    expected = [whole.step(groups_of(step), step).loss for step in range(3, 6)]

    resumed = make_learner(model, lora=lora)
    torch.rand(17)  # another history of random numbers
    found, _ = CheckpointStore(tmp_path).newest()
    assert found is not None
    tensors = resumed.state_tensors()
    load_tensors(found, tensors)
    resumed.restore_random_state(tensors)
    assert [resumed.step(groups_of(step), step).loss for step in range(3, 6)] == expected
    for name, tensor in whole.state_tensors().items():
        assert torch.equal(tensor, resumed.state_tensors()[name]), name


def test_bfloat16_forward_trains_float32_weights(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    student = load_student(StudentSettings(model=str(model), device="cpu", dtype="bfloat16"))
    learner = Learner(student, DISTILL, settings())
    assert all(parameter.dtype == torch.float32 for _, parameter in student.trained())
    exact = make_learner(model).step(groups_of(0), 0)
    half = learner.step(groups_of(0), 0)
    assert half.loss == pytest.approx(exact.loss, rel=0.02)
    assert half.loss != exact.loss
    for step in range(1, 40):
        learner.step(groups_of(step), step)
    assert divergence(student) < 0.2
    student.export(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype="auto")
    assert exported.get_input_embeddings().weight.dtype == torch.bfloat16


def test_cutting_a_step_into_micro_batches_changes_only_rounding(model: Path) -> None:
    whole, cut = make_learner(model, micro_batch_tokens=10_000), make_learner(model, micro_batch_tokens=20)
    first, second = whole.step(groups_of(0), 0), cut.step(groups_of(0), 0)
    assert len(first.micro_batches) == 1 < len(second.micro_batches)
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert first.gradient_norm == pytest.approx(second.gradient_norm, rel=1e-4)


def test_reward_alone_raises_the_probability_of_rewarded_responses(model: Path) -> None:
    plan = make_plan(preset="grpo")
    learner = make_learner(model, plan, learning_rate=1e-3)
    groups = groups_of(0, plan)

    def on_policy(values: list[TrainingGroup]) -> list[TrainingGroup]:
        # Behaviour log-probabilities of the policy itself, so that the first ratio is 1.
        traces = learner.step(values, 0, traces=True)
        flat = torch.cat([trace["student_logprob"] for trace in traces.per_token]).numpy()
        result, start = [], 0
        for group in values:
            rollouts = []
            for rollout in group.rollouts:
                part = flat[start : start + rollout.length].astype(np.float32)
                rollouts.append(replace(rollout, behaviour_logprobs=part))
                start += rollout.length
            result.append(replace(group, rollouts=tuple(rollouts)))
        return result

    groups = on_policy(groups)

    def preference() -> float:
        traces = learner.step(groups, 10**6, traces=True)
        total = 0.0
        for micro_batch, values in zip(traces.micro_batches, traces.per_token, strict=True):
            start = 0
            for member in micro_batch.members:
                stop = start + member.rollout.length
                total += float(values["student_logprob"][start:stop].sum()) * (
                    1 if member.advantage > 0 else -1
                )
                start = stop
        return total

    before = preference()
    for step in range(5):
        learner.step(groups, step + 5)
    assert preference() > before + 1.0


def test_gradient_that_is_not_finite_leaves_the_weights_alone(model: Path) -> None:
    learner = make_learner(model)
    learner.step(groups_of(0), 0)
    before = {name: tensor.clone() for name, tensor in learner.state_tensors().items()}
    _, parameter = learner.student.trained()[0]
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    result = learner.step(groups_of(1), 1)
    hook.remove()
    assert result.refused is not None
    assert "gradient norm" in result.refused.reason
    assert result.refused.diverged
    for name, tensor in learner.state_tensors().items():
        assert torch.equal(tensor, before[name]), name
    assert learner.step(groups_of(2), 2).refused is None


def test_diverged_student_is_refused_and_not_trained_on(model: Path) -> None:
    learner = make_learner(model)
    with torch.no_grad():
        learner.student.trained()[0][1].fill_(math.nan)
    result = learner.step(groups_of(0), 0)
    assert result.refused is not None
    assert result.refused.diverged
    assert math.isnan(result.loss), "of a step that was not computed"


@pytest.mark.parametrize(
    "tokens", [{"teacher_entropy_above": 50.0}, {"skip_first_n": 50}], ids=["gate", "place"]
)
def test_step_without_a_position_to_train_on_moves_nothing(model: Path, tokens: dict[str, float]) -> None:
    """AdamW would move the weights by momentum and decay alone."""
    learner = make_learner(model, weight_decay=0.1)
    learner.step(groups_of(0), 0)
    before = {name: tensor.clone() for name, tensor in learner.state_tensors().items()}
    closed = make_plan(support="teacher_topk", k=16, tail="bucket", estimator="pathwise", tokens=tokens)
    learner.plan = closed
    result = learner.step(groups_of(1, closed), 1, traces=True)
    assert result.refused is not None
    assert not result.refused.diverged
    for name, tensor in learner.state_tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_micro_batch_without_a_position_to_train_on_is_traced_as_such(model: Path) -> None:
    plan = make_plan(
        support="teacher_topk", k=16, tail="bucket", estimator="pathwise", tokens={"skip_first_n": 4}
    )
    learner = make_learner(model, plan, micro_batch_tokens=8)
    result = learner.step(groups_of(0, plan, count=1), 0, traces=True)
    assert [member.rollout.length for batch in result.micro_batches for member in batch.members] == [3, 5]
    assert result.refused is None
    short, long = (traces["student_logprob"] for traces in result.per_token)
    assert torch.isnan(short).all()
    assert torch.isfinite(long).tolist() == [False] * 4 + [True]
    check_alignment(result, 1)


def test_dropout_of_the_model_stays_off(tmp_path: Path) -> None:
    """GPT-2 comes with dropout; log-probabilities must be those that the policy samples with."""
    learner = make_learner(save_tiny_model(tmp_path / "gpt2", "gpt2"), learning_rate=1e-12)
    first = learner.step(groups_of(0), 0)
    second = learner.step(groups_of(0), 0)
    assert first.loss == pytest.approx(second.loss, rel=1e-6)


# Trainer and sampler must mean the same positions.


def with_own_logprobs(learner: Learner, shift: int) -> list[TrainingGroup]:
    """Groups that carry the student's own log-probabilities, moved by `shift` positions."""
    result = []
    for group in groups_of(0):
        layout = build_layout([group.prompt_ids], [(0, rollout.response_ids) for rollout in group.rollouts])
        with torch.no_grad():
            rows = hidden_states(learner.student.model, layout)[layout.score_rows]
            logprobs = head_of(learner.student.model).logits(rows).log_softmax(-1)
        own = logprobs.gather(1, layout.response_ids[:, None]).squeeze(1).numpy()
        rollouts = [
            replace(rollout, behaviour_logprobs=np.roll(part, shift))
            for rollout, part in zip(group.rollouts, np.split(own, layout.offsets[1:-1]), strict=True)
        ]
        result.append(replace(group, rollouts=tuple(rollouts)))
    return result


def test_misaligned_log_probabilities_stop_the_run(model: Path) -> None:
    learner = make_learner(model, learning_rate=1e-12)
    with torch.no_grad():  # a decided student, whose neighbouring tokens differ by nats
        head_of(learner.student.model).weight.mul_(8)
    straight = learner.step(with_own_logprobs(learner, 0), 0, traces=True)
    difference = check_alignment(straight, 0)
    assert difference is not None
    assert difference < 1e-4
    shifted = learner.step(with_own_logprobs(learner, 1), 0, traces=True)
    with pytest.raises(TutelageError, match="disagree on the log-probabilities of policy version 0"):
        check_alignment(shifted, 0)
    assert check_alignment(shifted, 7) is None  # other weights: nothing to compare


# Learning rates.


def test_schedules_warm_up_and_decay_to_a_tenth() -> None:
    for schedule in ("constant", "linear", "cosine"):
        chosen = settings(steps=100, warmup_steps=10, schedule=schedule, learning_rate=1.0)
        rates = [learning_rate(chosen, step) for step in range(101)]
        assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert rates[10] == pytest.approx(1.0)
        assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
        assert all(earlier >= later for earlier, later in pairwise(rates[10:]))
    linear = settings(steps=100, warmup_steps=0, schedule="linear", learning_rate=1.0)
    assert learning_rate(linear, 50) == pytest.approx(0.55)
