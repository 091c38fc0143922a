"""Metrics: one flat record per step and per evaluation, handed to every tracker.

RUN_DIR/metrics.jsonl is always written: one JSON object per line. A resumed run cuts it back to the
checkpoint, so no step appears twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import structlog

from services import strict_json
from student_trainer.channels import weights_lags
from student_trainer.config import RunConfig
from student_trainer.evaluations import Evaluation
from student_trainer.ledger import Ledger
from student_trainer.sampler.settings import STUDENT
from student_trainer.step_result import StepResult
from student_trainer.verify import TrainingGroup

log = structlog.get_logger(__name__)


COUNTED = ("positions", "gated_reward", "renormalised", "audited", "pairs", "groups_unpaired")


class Tracker(Protocol):
    """Somewhere figures go."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def step_record(
    groups: list[TrainingGroup],
    result: StepResult,
    ledger: Ledger,
    seconds: dict[str, float],
    channels: Mapping[str, str],
) -> dict[str, float]:
    """The figures of the step that made policy version `ledger.step`.

    Means are over trained positions. `kl` is the mean of log p(y) - log q(y) over tokens that the
    student sampled, in nats, where the teacher's log q(y) is known; else, and where another model or a
    guided student sampled (that mean would estimate something else), the mean divergence of the objective.

    Args:
        channels: of the teachers with the student's own weights, by which their lag is told.
    """
    positions = max(1.0, result.sums.get("positions", 0.0))
    sums = dict(result.sums)
    counts = {name: sums.pop(name) for name in list(sums) if name.startswith("dropped_") or name in COUNTED}
    monitored, known = sums.pop("monitored", 0.0), sums.pop("entropy_known", 0.0)
    consistent, states = sums.pop("consistent", 0.0), sums.pop("hidden_positions", 0.0)
    record: dict[str, float] = {"step": ledger.step, "policy_version": ledger.step, "loss": result.loss}
    for name, total in sums.items():
        share = monitored if name in ("sampled_kl", "teacher_logprob") else positions
        share = counts.get("pairs", 0.0) if name.startswith("preference_") else share
        share = {"teacher_entropy": known, "consistency": consistent, "hidden": states}.get(name, share)
        share = counts.get("audited", 0.0) if name in ("agreement", "audit_weight") else share
        if share:
            record[name] = total / share
    on_policy = all(group.sampled_by == STUDENT for group in groups)
    for name in ("sampled_kl", "divergence") if on_policy else ("divergence",):
        if name in record:
            record["kl"] = record[name]
            break
    staleness = [float(group.distance) for group in groups]
    rewards = [reward for group in groups for reward in group.rewards if reward is not None]
    tokens = sum(group.num_tokens for group in groups)
    total_seconds = sum(seconds.values())
    record |= {
        **counts,
        "gradient_norm": result.gradient_norm,
        "learning_rate": result.learning_rate,
        "staleness_mean": fmean(staleness),
        "staleness_max": max(staleness),
        "groups": len(groups),
        "responses_left_out": sum(len(group.rewards) - len(group.rollouts) for group in groups),
        "response_tokens": tokens,
        "tokens_per_second": tokens / total_seconds if total_seconds else 0.0,
        "trained_tokens_per_second": tokens / seconds["train"] if seconds.get("train") else 0.0,
        "tokens_sampled": ledger.tokens_sampled,
        "tokens_scored": ledger.tokens_scored,
        "refused_steps": ledger.refused_steps,
    }
    if ledger.gate:
        record["gate_open"] = float(ledger.gate["open"])  # for the next step
    if lags := weights_lags(groups, channels, ledger.step - 1):
        record |= {"weights_lag_mean": fmean(lags), "weights_lag_max": max(lags)}
    score_seconds = sum(group.score_seconds for group in groups)
    if score_seconds > 0.0:
        record["scored_tokens_per_second"] = sum(group.num_scores for group in groups) / score_seconds
    if rewards:
        record["reward_mean"] = fmean(rewards)
    record |= {f"seconds_{name}": value for name, value in seconds.items()}
    record |= {f"groups_dropped_{reason}": count for reason, count in sorted(ledger.drop_counts.items())}
    record |= {f"groups_without_{view}": count for view, count in sorted(ledger.missing_views.items())}
    return record


class SamplingRates:
    """Samplers publish running totals in the run's progress; this turns them into a rate."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def rates(self, progress: Mapping[str, Any]) -> dict[str, float]:
        """Tokens per second of sampling time since the last call; empty when nothing was sampled."""
        totals = [value for name, value in progress.items() if name.startswith("sampler:")]
        tokens = float(sum(total["tokens"] for total in totals))
        seconds = float(sum(total["sample_seconds"] for total in totals))
        last, self._last = self._last, (tokens, seconds)
        if last is None or tokens <= last[0] or seconds <= last[1]:
            return {}
        return {"sampled_tokens_per_second": (tokens - last[0]) / (seconds - last[1])}


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """As the report reads it."""
    return {
        "evaluation": {
            "policy_version": evaluation.policy_version,
            "prompts": evaluation.prompts,
            "greedy": evaluation.greedy,
            "sampled": evaluation.sampled,
        }
    }


class MetricsFile:
    """RUN_DIR/metrics.jsonl, cut back to what a checkpoint covers when it is opened."""

    def __init__(self, path: Path, *, step: int, pending_evaluations: Iterable[int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_back(path, step, set(pending_evaluations))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(strict_json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint that survives a power failure has its lines

    def close(self) -> None:
        self._file.close()


def _cut_back(path: Path, step: int, pending: set[int]) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a killed process
        evaluation = record.get("evaluation")
        version = record["step"] if evaluation is None else evaluation["policy_version"]
        if version <= step and not (evaluation is not None and version in pending):
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def open_trackers(config: RunConfig, step: int) -> list[Tracker]:
    """The trackers that the run file names; one that is not installed is an error with the remedy."""
    from student_trainer.trackers import TRACKERS

    return [TRACKERS[name](config, step) for name in config.training.trackers]
