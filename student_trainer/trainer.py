"""The training loop: collect, step, log, checkpoint, acknowledge, publish, order more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from tutelage_client.errors import TutelageError

from services import tracing
from services.queue import Queue
from student_trainer.alignment import check_alignment
from student_trainer.channels import Channels, channels_of
from student_trainer.checkpoint import CheckpointStore
from student_trainer.collect import Collector
from student_trainer.config import RunConfig
from student_trainer.durable import atomic_directory
from student_trainer.evaluations import Evaluations
from student_trainer.learner import Learner
from student_trainer.ledger import Ledger
from student_trainer.metrics import SamplingRates, step_record
from student_trainer.objective.weights import HysteresisGate
from student_trainer.pacing import Pacer
from student_trainer.recording import Recorder
from student_trainer.spans import record_trained
from student_trainer.step_result import StepResult
from student_trainer.verify import TrainingGroup
from student_trainer.waiting import Watch

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Parts:
    """What the loop works with."""

    config: RunConfig
    queue: Queue
    learner: Learner
    ledger: Ledger
    checkpoints: CheckpointStore
    channels: Channels
    pacer: Pacer
    collector: Collector
    evaluations: Evaluations
    recorder: Recorder
    watch: Watch
    stop: asyncio.Event


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the clock was made."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last


class Trainer:
    """One run, from where its ledger stands to its end or to a request to stop."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger = parts.ledger
        self._settings = parts.config.training
        self._saved_step = parts.ledger.step
        self._diverged_in_a_row = 0
        self._alignment_checked = not parts.learner.plan.behaviour_comparable
        self._sampling = SamplingRates()
        self._own_weights = channels_of(parts.learner.plan, parts.config.run.name)
        self._clock = Clock()

    async def run(self) -> bool:
        """Train to the last step; False when asked to stop before (a checkpoint is saved then)."""
        parts = self._parts
        await self._begin()
        self._clock.lap()
        while self._ledger.step < self._settings.steps:
            with tracing.span("step", parent="", attributes=self._step_attributes()):
                groups = await self._collect()
                if groups is None:
                    return await self._stopped()
                collected = self._clock.lap()
                result = self._step(groups)
                await self._record(groups, result, collected, self._clock.lap())
                await self._save_and_publish()
        while self._ledger.pending_evaluations:
            if parts.stop.is_set():
                return await self._stopped()
            await self._await_evaluation()
        await self._finish()
        return True

    async def _begin(self) -> None:
        """Publish the policy the ledger stands at and order what is missing."""
        parts, version = self._parts, self._ledger.step
        parts.channels.begin()
        await parts.recorder.status("training", self._ledger)
        await parts.evaluations.order(resuming=True)
        await parts.pacer.place_ahead(version)
        await parts.pacer.place_missing_replacements(version)

    def _step_attributes(self) -> tracing.Attributes:
        return {"tutelage.run": self._parts.config.run.name, "tutelage.step": self._ledger.step + 1}

    async def _collect(self) -> list[TrainingGroup] | None:
        """The step's groups; what the trainer waits for is shown meanwhile."""
        shown = "training"

        async def show(status: str) -> None:
            nonlocal shown
            if status != shown:
                shown = status
                await self._parts.recorder.status(status, self._ledger)

        with tracing.span("collect"):
            groups = await self._parts.collector.collect(show)
        if groups is not None:
            await show("training")
        return groups

    def _step(self, groups: list[TrainingGroup]) -> StepResult:
        """One optimizer step, and its entry in the ledger."""
        parts, ledger, settings = self._parts, self._ledger, self._settings
        comparable = not self._alignment_checked and any(group.distance == 0 for group in groups)
        every = settings.sample_every
        sampled = every > 0 and (ledger.step == 0 or (ledger.step + 1) % every == 0)
        began_ns = time.time_ns()
        gate = self._gate()
        result = parts.learner.step(
            groups,
            ledger.step,
            traces=sampled or comparable,
            distill_open=None if gate is None else gate.open,
        )
        if gate is not None:
            ledger.gate = gate.after(result.mean_entropy(gate.settings.entropy_of)).state
        if comparable and result.refused is None:
            check_alignment(result, ledger.step)
            self._alignment_checked = True
        for group in groups:
            ledger.applied.add(group.index)
            ledger.tokens_sampled += group.num_tokens
            ledger.tokens_scored += group.num_scores
            ledger.missing_views.update(group.missing_views)
        ledger.step += 1
        refused = None if result.refused is None else result.refused.reason
        record_trained(groups, began_ns, step=ledger.step, refused=refused)
        self._count_refusal(result)
        if sampled:
            parts.recorder.samples(ledger.step, result)
        return result

    def _gate(self) -> HysteresisGate | None:
        """The plan's gate as the steps so far have left it; None without one."""
        settings = self._parts.learner.plan.gate
        return None if settings is None else HysteresisGate(settings, **self._ledger.gate)

    async def _record(
        self, groups: list[TrainingGroup], result: StepResult, collected: float, trained: float
    ) -> None:
        """Log the step. Before its checkpoint: a run resumed from there must not lack the line."""
        parts = self._parts
        # Saving and publishing the step before this one is part of the wait.
        seconds = {"wait": collected, "train": trained}
        self._ledger.seconds += collected + trained
        progress = await parts.queue.read_progress(parts.config.run.name)
        record = step_record(groups, result, self._ledger, seconds, self._own_weights)
        record |= self._sampling.rates(progress)
        await parts.recorder.step(record, self._ledger)
        await self._log_evaluations(progress)

    def _count_refusal(self, result: StepResult) -> None:
        """Count every refusal; only numbers that are not finite, step after step, end the run."""
        refused = result.refused
        if refused is None:
            self._diverged_in_a_row = 0
            return
        self._ledger.refused_steps += 1
        log.warning("step refused, weights unchanged", step=self._ledger.step, reason=refused.reason)
        self._diverged_in_a_row += refused.diverged
        if refused.diverged and self._diverged_in_a_row >= self._settings.max_refused_steps:
            raise TutelageError(
                "FAILED_PRECONDITION",
                f"{self._diverged_in_a_row} steps in a row were refused, the last one because "
                f"{refused.reason}; lower [training] learning_rate, or look for the cause in metrics.jsonl",
            )

    async def _save_and_publish(self) -> None:
        """Make the step count: checkpoint and acknowledge when due, publish, order, evaluate."""
        parts, version = self._parts, self._ledger.step
        parts.evaluations.note(version)
        if self._checkpoint_is_due():
            await self._checkpoint()
        with tracing.span("publish", attributes={"tutelage.policy_version": version}):
            parts.channels.publish()
            parts.channels.prune(self._oldest_needed(), pinned=self._ledger.pending_evaluations)
        await parts.pacer.place_ahead(version)
        await parts.evaluations.order()

    def _checkpoint_is_due(self) -> bool:
        """By number, at the end, or because the queue's memory holds too much of what is trained."""
        step, settings = self._ledger.step, self._settings
        held = self._parts.collector.consumed_bytes()
        return (
            step % settings.checkpoint_every == 0
            or step == settings.steps
            or held > settings.max_unacknowledged_bytes
        )

    async def _checkpoint(self) -> None:
        """Save, then acknowledge exactly what the saved ledger knows."""
        parts = self._parts
        with tracing.span("checkpoint"):
            parts.checkpoints.save(parts.learner.state_tensors(), self._ledger)
            self._saved_step = self._ledger.step
            parts.checkpoints.prune(self._settings.keep_checkpoints)
            await parts.collector.acknowledge()

    def _oldest_needed(self) -> int:
        """Oldest policy version that an order may still ask for.

        A deterministic run may be resumed from its oldest checkpoint and then needs the exact
        versions of that time.
        """
        staleness = self._settings.max_staleness
        if self._parts.config.run.deterministic:
            return min(self._parts.checkpoints.steps()) - staleness
        return self._ledger.step - staleness - 1

    async def _log_evaluations(self, progress: Mapping[str, Any]) -> None:
        for evaluation in self._parts.evaluations.collect(progress):
            await self._parts.recorder.evaluation(evaluation)

    async def _await_evaluation(self) -> None:
        """Wait a moment for the answers still open after the last step."""
        parts = self._parts
        open_before = len(self._ledger.pending_evaluations)
        await self._log_evaluations(await parts.queue.read_progress(parts.config.run.name))
        if len(self._ledger.pending_evaluations) < open_before:
            parts.watch.news()
            return
        status = await parts.watch.look("evaluation")
        if status is not None:
            await parts.recorder.status(status, self._ledger)
            if await parts.watch.idle([]) and not await parts.evaluations.order_again():
                log.error("evaluations are left out", reason=await parts.watch.given_up())
        await asyncio.sleep(POLL_SECONDS)

    async def _stopped(self) -> bool:
        if self._ledger.step > self._saved_step:
            await self._checkpoint()
        await self._parts.recorder.status("stopped", self._ledger)
        log.info("stopped; the same command continues the run", step=self._ledger.step)
        return False

    async def _finish(self) -> None:
        """Write the trained student where `from_pretrained` finds it."""
        parts = self._parts
        directory = parts.config.run.directory
        with atomic_directory(directory / "student") as temporary:
            parts.learner.export(temporary)
        if parts.learner.student.lora:
            with atomic_directory(directory / "adapter") as temporary:
                parts.learner.export_adapter(temporary)
        await parts.recorder.status("finished", self._ledger)
        log.info("finished", steps=self._ledger.step, student=str(directory / "student"))


def describe(parts: Parts) -> dict[str, Any]:
    """What a person wants to know when the trainer starts."""
    trained = sum(parameter.numel() for _, parameter in parts.learner.student.trained())
    return {
        "run": parts.config.run.name,
        "directory": str(parts.config.run.directory),
        "device": str(parts.learner.student.device),
        "trained_parameters": trained,
        "step": parts.ledger.step,
        "steps": parts.config.training.steps,
    }
