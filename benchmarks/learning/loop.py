"""One arm from start to end, in one process: sample, score, train, and look at held-out prompts.

The pieces are those of a run (the sampler, the engine's packed scoring, the checks, the learner and the
compiled objective). What a run has between them, queue and services, is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tutelage.v1.rollout_pb2 import ViewRequest
from tutelage_client.codec import request_from_proto, score_to_proto

from benchmarks.learning import scorers
from benchmarks.learning.arms import Arm, Experiment, Sizes
from benchmarks.learning.held_out import HeldOut, divergence
from benchmarks.learning.models import MODELS, ModelSpec, model_path
from benchmarks.learning.writers import AnswerWriter
from services.models.generate import TransformersGenerator
from services.models.load import LoadedModel, load_causal_lm
from services.queue import ScoredGroup
from services.teacher.jobs import job_request
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.learner import Learner
from student_trainer.policy_store import PolicyVersion
from student_trainer.sampler.build import build_sampler
from student_trainer.sampler.groups import SampledGroup
from student_trainer.student import load_student
from student_trainer.verify import Expectations, TrainingGroup, verify_group

Report = Callable[[int, int], None]


@dataclass
class Course:
    """What an arm came to. Tokens are response tokens; `looks` are in order of steps."""

    tokens_used: int = 0  # in the batches of all steps: the budget that arms have in common
    tokens_trained: int = 0  # of those, positions that entered the loss
    tokens_written: int = 0  # sampled for this arm, by whoever wrote
    tokens_scored: int = 0  # that a teacher was asked about
    refused_steps: int = 0
    seconds: float = 0.0
    looks: list[dict[str, Any]] = field(default_factory=list)


class Session:
    """An arm while it runs.

    Args:
        directory: with models/ and data/.
        specs: what the models' names mean.
    """

    def __init__(
        self,
        experiment: Experiment,
        arm: Arm,
        seed: int,
        directory: Path,
        sizes: Sizes,
        *,
        specs: Mapping[str, ModelSpec] = MODELS,
    ) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        config = parse_run_config(arm.document(seed, directory, sizes, specs))
        self.arm, self.sizes, self.seed = arm, sizes, seed
        self.config, self.plan = config, config.plan()
        start = Path(config.student.model)
        _, self.sampler = build_sampler(config, PolicyVersion(0, start, "learning"))
        self.learner = Learner(load_student(config.student), self.plan, config.training)
        student = self.learner.student
        self.own = LoadedModel(student.model, student.tokenizer, "live", student.vocab_size)
        assert isinstance(self.sampler.student, TransformersGenerator)
        self.generator: TransformersGenerator = self.sampler.student
        if arm.sampler == scorers.ANSWERS:
            self.sampler.student = AnswerWriter(student.tokenizer)
        self._averages: list[Any] = []
        self.teachers = self._teachers(start)
        self.expected = _expectations(config, self.learner)
        self.pins: dict[Any, Any] = {}
        self.held_out = [HeldOut(a, sizes.evaluation_prompts, student.tokenizer) for a in experiment.sets]
        judge = experiment.judge
        self.judge = (
            None if judge is None else load_causal_lm(model_path(directory / "models", judge, seed, specs))
        )
        self.course = Course()
        self._kept: dict[int, list[TrainingGroup]] = {}

    async def run(self, report: Report) -> Course:
        """All steps; `report(step, steps)` after each."""
        began = time.perf_counter()
        self._look(0)
        for step in range(self.sizes.steps if self.arm.trained else 0):
            groups = await self._groups(step)
            self.course.tokens_used += sum(group.num_tokens for group in groups)
            result = self.learner.step(groups, step)
            self.course.refused_steps += result.refused is not None
            self.course.tokens_trained += int(result.sums.get("positions", 0))
            self._follow()
            if step + 1 in self.sizes.looks:
                self._look(step + 1)
            report(step + 1, self.sizes.steps)
        self.course.seconds = time.perf_counter() - began
        return self.course

    async def _groups(self, step: int) -> list[TrainingGroup]:
        """The scored groups of a step. Those that are fixed are scored once: the teacher never changes."""
        place = step % self.arm.fixed if self.arm.fixed else step
        if place in self._kept:
            return self._kept[place]
        count = self.config.training.prompts_per_step
        indices = range(place * count, (place + 1) * count)
        sampled = self.sampler.sample(indices, step if not self.arm.fixed else 0)
        groups = await self._scored(sampled)
        self.course.tokens_written += sum(group.num_tokens for group in groups)
        self.course.tokens_scored += sum(group.num_scores for group in groups)
        if self.arm.fixed:
            self._kept[place] = groups
        return groups

    async def _scored(self, sampled: Sequence[SampledGroup]) -> list[TrainingGroup]:
        """Ask every teacher once for all the groups, then check the answers as a trainer does."""
        wanted: dict[str, list[tuple[int, ViewRequest]]] = {}
        for place, group in enumerate(sampled):
            for request in group.requests:
                wanted.setdefault(request.teacher, []).append((place, request))
        scores: list[dict[str, Any]] = [{} for _ in sampled]
        for teacher, requests in wanted.items():
            asked = [request_from_proto(job_request(sampled[at].group, request)) for at, request in requests]
            found = await self.teachers[teacher].score(asked)
            for (at, request), score in zip(requests, found, strict=True):
                scores[at][request.view] = score_to_proto(score)
        return [
            verify_group(ScoredGroup(str(at), group.group, scores[at]), self.expected, self.pins)
            for at, group in enumerate(sampled)
        ]

    def _follow(self) -> None:
        """What moves with the student: its averages, and the writer unless the start writes everything."""
        for average in self._averages:
            scorers.average_weights(self.learner.student.model, average, self.plan.ema_rate)
        if not self.arm.fixed:
            scorers.copy_weights(self.learner.student.model, self.generator.model)

    def _look(self, step: int) -> None:
        writer = self.generator
        if self.arm.fixed:  # the start goes on writing; the student answers for itself
            writer = _generator_like(self.generator, scorers.copy_model(self.generator.model))
            scorers.copy_weights(self.learner.student.model, writer.model)
        look: dict[str, Any] = {"step": step, "sets": {}}
        for prompts in self.held_out:
            found, responses = prompts.ask(writer, self.seed)
            look["sets"][prompts.name] = asdict(found)
            if self.judge is not None and "kl" not in look and step in (0, self.sizes.steps):
                look["kl"] = divergence(self.own, self.judge, prompts.prompts, responses)
        self.course.looks.append(look)

    def _teachers(self, start: Path) -> dict[str, scorers.InProcess]:
        fingerprint = self.learner.student.fingerprint
        made: dict[str, scorers.InProcess] = {}
        for name in self.plan.scoring_teachers:
            scorer = self._teacher(name, start, fingerprint)
            if self.arm.fraction < 1.0:
                random = np.random.default_rng(self.seed)
                scorer = scorers.Selecting(scorer, self.arm.fraction, self.arm.pick, random)
            made[name] = scorer
        return made

    def _teacher(self, name: str, start: Path, fingerprint: str) -> scorers.InProcess:
        kind = self.plan.implied_teachers.get(name, self.arm.teachers.get(name))
        if kind == scorers.ANSWERS:
            rows = self.learner.student.vocab_size
            return scorers.CertainOfAnswers(scorers.rule_identity(name, fingerprint, rows))
        if kind == scorers.PENALTY:
            return scorers.PenaltyOnUnlikely(scorers.PackedTeacher(self.own, name, fingerprint))
        if kind == "live":
            return scorers.PackedTeacher(self.own, name, fingerprint)
        if kind == "ema":
            average = scorers.copy_model(self.learner.student.model)
            self._averages.append(average)
            loaded = LoadedModel(average, self.own.tokenizer, "ema", self.own.vocab_size)
            return scorers.PackedTeacher(loaded, name, fingerprint)
        path = start if kind == "initial" else Path(str(self.config.teachers[name].model))
        return scorers.open_teacher(path, name, fingerprint)


def _generator_like(generator: TransformersGenerator, model: Any) -> TransformersGenerator:
    from student_trainer.sampler.policy import end_ids

    return TransformersGenerator(model, end_ids=end_ids(LoadedModel(model, None, "", 0), ""))


def _expectations(config: RunConfig, learner: Learner) -> Expectations:
    return Expectations(
        run=config.run.name,
        plan=learner.plan,
        sampling_temperature=config.sampling.temperature,
        vocab_size=learner.student.vocab_size,
        tokenizer_fingerprint=learner.student.fingerprint,
    )
