"""Everything the trainer tells the outside: log lines, metrics, progress, status, rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import structlog

from services.queue import Queue
from student_trainer.config import RunConfig
from student_trainer.evaluations import Evaluation
from student_trainer.ledger import DropReason, Ledger
from student_trainer.metrics import MetricsFile, Tracker, evaluation_record
from student_trainer.samples import discard_samples_above, write_samples
from student_trainer.status import StatusServer
from student_trainer.step_result import StepResult

log = structlog.get_logger(__name__)

# Figures of a step that the live view and the status port show.
_SHOWN = (
    "loss",
    "kl",
    "reward_mean",
    "preference_margin",
    "preference_accuracy",
    "agreement",
    "audit_weight",
    "tokens_sampled",
    "tokens_scored",
    "tokens_per_second",
    "staleness_mean",
    "weights_lag_mean",
    "gradient_norm",
    "learning_rate",
    "refused_steps",
    "seconds_wait",
    "seconds_train",
)


class Recorder:
    """Sends each figure to everybody who wants it."""

    def __init__(
        self,
        *,
        config: RunConfig,
        queue: Queue,
        status: StatusServer,
        trackers: Sequence[Tracker],
        tokenizer: Any,
        ledger: Ledger,
    ) -> None:
        self._run = config.run.name
        self._training = config.training
        self._queue = queue
        self._status = status
        self._trackers = trackers
        self._tokenizer = tokenizer
        self._samples: Path = config.run.directory / "samples"
        discard_samples_above(self._samples, ledger.step)
        self._metrics = MetricsFile(
            config.run.directory / "metrics.jsonl",
            step=ledger.step,
            pending_evaluations=ledger.pending_evaluations,
        )

    async def step(self, record: dict[str, float], ledger: Ledger) -> None:
        """A step is over."""
        self._metrics.write(record)
        for tracker in self._trackers:
            tracker.log(ledger.step, record)
        shown = {name: record[name] for name in _SHOWN if name in record}
        log.info(
            "step",
            step=f"{ledger.step}/{self._training.steps}",
            **{name: _brief(value) for name, value in shown.items()},
        )
        await self._show({**shown, **self._place(ledger), "status": "training"})

    async def evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation has been answered."""
        self._metrics.write(evaluation_record(evaluation))
        figures = {"accuracy_greedy": evaluation.greedy, "accuracy_sampled": evaluation.sampled}
        for tracker in self._trackers:
            tracker.log(evaluation.policy_version, figures)
        log.info("evaluation", **asdict(evaluation))
        await self._show({**figures, "accuracy_version": evaluation.policy_version})

    async def status(self, status: str, ledger: Ledger) -> None:
        """What the trainer is doing: training, waiting for …, stopped, finished, failed: …"""
        await self._show({**self._place(ledger), "status": status})

    def samples(self, step: int, result: StepResult) -> None:
        """A step with traces: keep some of its rollouts for the report."""
        write_samples(self._samples, step, result, self._tokenizer, self._training.sample_groups)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        self._metrics.close()

    def _place(self, ledger: Ledger) -> dict[str, Any]:
        return {
            "run_id": ledger.run_id,
            "step": ledger.step,
            "steps": self._training.steps,
            "policy_version": ledger.step,
            "groups_dropped": {reason: ledger.drop_counts[reason] for reason in get_args(DropReason)},
            "metrics_address": self._status.address,
        }

    async def _show(self, figures: dict[str, Any]) -> None:
        self._status.update(figures)
        await self._queue.publish_progress(self._run, figures)


def _brief(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(f"{value:.4g}")
