"""Learner steps on several ranks: each job is run by processes that meet over gloo, or by this one alone."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from student_trainer.checkpoint import Checkpoint, CheckpointStore
from student_trainer.follower import follow
from student_trainer.learner import Learner
from student_trainer.ledger import Ledger
from student_trainer.objective.compile import Plan
from student_trainer.ranks import Ranks, join
from student_trainer.sections import LoraSettings, StudentSettings, TrainingSettings
from student_trainer.step_result import StepResult
from student_trainer.student import load_student
from student_trainer.verify import TrainingGroup, TrainingRollout, verify_group
from support.tiny_models import tiny_config
from support.training_groups import make_expectations, make_plan, scored_group

DISTILL = {"support": "teacher_topk", "k": 16, "tail": "bucket", "estimator": "pathwise"}
UNSEEN = 2  # a token id that `make_group` never draws
STEPS = 3


@dataclass(frozen=True)
class Job:
    """A few steps of one learner, from one of `models` or from a checkpoint, and what is watched."""

    name: str
    model: str = "plain"
    objective: dict[str, Any] = field(default_factory=lambda: dict(DISTILL))
    lora: LoraSettings | None = None
    dtype: str = "float32"
    groups: int = 5
    lengths: tuple[int, ...] = (3, 5)
    micro_batch_tokens: int = 64
    ema: bool = False
    updates: int = 1
    distill_open: bool | None = None
    poisoned: int | None = None  # in step 1, this group meets a token whose embedding is infinite
    infinite_rank: int | None = None  # in step 1, this rank's gradients are infinite
    checkpoint: Path | None = None
    first: int = 0
    steps: int = STEPS


def save_models(root: Path) -> None:
    """models/plain, tied and moe: random, with a vocabulary that holds every id of the groups."""
    for name, architecture, changes in (
        ("plain", "qwen3", {}),
        ("tied", "qwen3", {"tie_word_embeddings": True}),
        ("moe", "qwen3_moe", {}),
    ):
        torch.manual_seed(1)
        config = tiny_config(architecture)
        for key, value in changes.items():
            setattr(config, key, value)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / name)


def run_job(job: Job, models: Path, out: Path, ranks: Ranks) -> None:
    """Every rank's part; rank 0 writes OUT/figures.json, trace-*.safetensors, student/ and checkpoints/."""
    learner = _learner(job, models, ranks)
    if not ranks.leads:
        _spoil(job, learner, ranks)
        follow(learner, ranks)
        return
    if job.checkpoint is not None:
        learner.load(Checkpoint.read(job.checkpoint))
    _spoil(job, learner, ranks)
    plan = learner.plan
    figures = []
    for step in range(job.first, job.first + job.steps):
        result = learner.step(_groups(job, plan, step), step, traces=True, distill_open=job.distill_open)
        figures.append(_figures(result))
        if traces := {str(i): part["student_logprob"] for i, part in enumerate(result.per_token)}:
            save_file(traces, out / f"trace-{step}.safetensors")
    (out / "figures.json").write_text(json.dumps(figures))
    CheckpointStore(out / "checkpoints", ranks).save(
        learner.state_tensors(), Ledger(settings={}, step=job.first + job.steps)
    )
    learner.export(out / "student")
    if job.lora is not None:
        learner.export_adapter(out / "adapter")
    if job.ema:
        learner.export_ema(out / "ema")
    ranks.tell("end", finished=True)


def run_alone(job: Job, models: Path, out: Path) -> Result:
    out.mkdir(parents=True)
    with join("cpu", 60.0) as ranks:
        run_job(job, models, out, ranks)
    return Result(out)


def run_together(
    jobs: list[Job], models: Path, out: Path, world: int = 2, device: str = "cpu"
) -> dict[str, Result]:
    """All jobs, one after the other, by `world` processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["student_trainer.train", __name__])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for job in jobs:
        (out / job.name).mkdir(parents=True)
    processes = [
        context.Process(target=_rank, args=(rank, world, port, device, jobs, models, out), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    logs = [(out / f"rank-{rank}.log").read_text()[-3000:] for rank in range(world)]
    assert codes == [0] * world, "\n".join(logs)
    return {job.name: Result(out / job.name) for job in jobs}


@dataclass(frozen=True)
class Result:
    """What rank 0 wrote."""

    out: Path

    def figures(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.out / "figures.json").read_text())
        return found

    def traces(self, step: int) -> torch.Tensor:
        """Log-probabilities of every position of the step, in its order."""
        parts = load_file(self.out / f"trace-{step}.safetensors")
        return torch.cat([parts[str(number)] for number in range(len(parts))])

    def weights(self, directory: str = "student") -> dict[str, torch.Tensor]:
        (file,) = (self.out / directory).glob("*.safetensors")
        return load_file(file)

    def checkpoint(self) -> Path:
        (path,) = (self.out / "checkpoints").glob("step-*")
        return path


def make_learner(job: Job, models: Path) -> Learner:
    """The job's learner in this process alone."""
    with join("cpu", 60.0) as ranks:
        return _learner(job, models, ranks)


def groups_of(job: Job, step: int) -> list[TrainingGroup]:
    return _groups(job, make_plan(**job.objective), step)


def _rank(  # noqa: PLR0917
    rank: int, world: int, port: int, device: str, jobs: list[Job], models: Path, out: Path
) -> None:
    log = os.open(out / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with join(device, 60.0) as ranks:
        for job in jobs:
            run_job(job, models, out / job.name, ranks)


def _learner(job: Job, models: Path, ranks: Ranks) -> Learner:
    torch.manual_seed(3)
    student = load_student(
        StudentSettings(model=str(models / job.model), device="cpu", dtype=job.dtype, lora=job.lora)
    )
    if job.poisoned is not None:
        with torch.no_grad():
            student.model.get_input_embeddings().weight[UNSEEN] = math.inf
    settings = TrainingSettings.model_validate(
        {
            "steps": 40,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "epsilon": 1e-3,  # or AdamW would make large updates of gradients that are rounding alone
            "micro_batch_tokens": job.micro_batch_tokens,
            "updates_per_step": job.updates,
        }
    )
    return Learner(student, make_plan(**job.objective), settings, ranks, with_ema=job.ema)


def _groups(job: Job, plan: Plan, step: int) -> list[TrainingGroup]:
    rewards = tuple(float(i % 2) for i in range(len(job.lengths))) if plan.needs_reward else None
    groups = [
        verify_group(
            scored_group(step * job.groups + i, plan, rewards=rewards, lengths=job.lengths),
            make_expectations(plan),
            {},
        )
        for i in range(job.groups)
    ]
    if plan.auxiliary is not None:  # of some responses
        groups[0] = replace(groups[0], rollouts=_with_contexts(groups[0]))
    if job.poisoned is not None and step == 1:
        prompt = groups[job.poisoned].prompt_ids.copy()
        prompt[0] = UNSEEN
        groups[job.poisoned] = replace(groups[job.poisoned], prompt_ids=prompt)
    return groups


def _with_contexts(group: TrainingGroup) -> tuple[TrainingRollout, ...]:
    context = group.prompt_ids[::-1].copy()
    return tuple(replace(rollout, auxiliary_ids=context) for rollout in group.rollouts)


def _spoil(job: Job, learner: Learner, ranks: Ranks) -> None:
    if job.infinite_rank is None or ranks.rank != job.infinite_rank % ranks.world:
        return
    passes = 0

    def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            output.register_hook(lambda gradient: gradient * math.inf)

    learner.student.model.model.norm.register_forward_hook(spoil)


def _figures(result: StepResult) -> dict[str, Any]:
    return {
        "loss": result.loss,
        "gradient_norm": result.gradient_norm,
        "learning_rate": result.learning_rate,
        "sums": result.sums,
        "micro_batches": len(result.micro_batches),
        "refused": None if result.refused is None else [result.refused.reason, result.refused.diverged],
    }
