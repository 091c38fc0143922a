"""What a run left on disk, read into plain values: metrics, evaluations, sampled rollouts, the outcome.

`RUN_DIR/metrics.jsonl` holds one JSON object per line: either a training step or an evaluation.
`RUN_DIR/samples/*.jsonl.gz` holds rollouts with both models' log-probabilities (nats).
`RUN_DIR/outcome.json` is written by `tutelage quickstart`; other runs have none.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
SAMPLES = "samples"
OUTCOME = "outcome.json"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step: the fields of its metrics line that are numbers."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """Exact-match accuracy of one policy version on the held-out prompts, in [0, 1]."""

    policy_version: int
    prompts: int
    greedy: float
    sampled: float

    @property
    def greedy_error(self) -> float:
        return standard_error(self.greedy, self.prompts)

    @property
    def sampled_error(self) -> float:
        return standard_error(self.sampled, self.prompts)


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """One response with what both models thought of each of its R tokens."""

    step: int
    group: str
    prompt_text: str
    token_texts: tuple[str, ...]  # [R]
    student_logprobs: tuple[float, ...]  # [R]
    teacher_logprobs: tuple[float, ...]  # [R], NaN where the teacher gave no score
    teacher_top: tuple[tuple[tuple[str, float], ...], ...]  # [R] lists of (text, log-probability)
    reward: float | None
    token_ids: tuple[int, ...] = ()  # [R]
    guided: bool = False  # sampled under [sampling] context, which is not the prompt

    @property
    def log_ratios(self) -> tuple[float, ...]:
        """log q(token) - log p(token), teacher minus student, nats [R]."""
        return tuple(q - p for p, q in zip(self.student_logprobs, self.teacher_logprobs, strict=True))


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """One line of the final table; None where it was not measured."""

    name: str
    greedy: float | None
    greedy_error: float | None
    sampled: float | None
    sampled_error: float | None
    kl: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The before/after table and the totals of a finished quickstart."""

    rows: tuple[OutcomeRow, ...]
    totals: dict[str, float]


@dataclass(frozen=True, slots=True)
class RunData:
    """Everything the report shows."""

    directory: Path
    steps: tuple[StepRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    rollouts: tuple[RolloutRecord, ...]
    outcome: Outcome | None
    skipped_lines: int  # torn or foreign lines, shown in the page's footer


def standard_error(accuracy: float, prompts: int) -> float:
    """Of a proportion over `prompts` independent prompts: sqrt(a (1 - a) / n)."""
    return math.sqrt(max(accuracy * (1.0 - accuracy), 0.0) / prompts) if prompts else math.nan


def read_run(directory: Path) -> RunData:
    """Read a run directory; a missing metrics file is an error, missing samples are not.

    Raises:
        FileNotFoundError: `directory` holds no metrics.jsonl, so it is no run directory.
    """
    metrics = directory / METRICS
    if not metrics.is_file():
        raise FileNotFoundError(f"{directory} is not a run directory: it holds no {METRICS}")
    steps: dict[int, StepRecord] = {}
    evaluations: dict[int, EvaluationRecord] = {}
    skipped = 0
    for record in _json_lines(metrics.read_bytes()):
        if record is None:
            skipped += 1
        elif (evaluation := _evaluation(record)) is not None:
            evaluations[evaluation.policy_version] = evaluation
        elif "step" in record:
            # A resumed trainer repeats the steps after its last checkpoint: the later line counts.
            steps[int(record["step"])] = StepRecord(int(record["step"]), _numbers(record))
        else:
            skipped += 1
    rollouts, torn = _read_samples(directory / SAMPLES)
    return RunData(
        directory=directory,
        steps=tuple(steps[step] for step in sorted(steps)),
        evaluations=tuple(evaluations[version] for version in sorted(evaluations)),
        rollouts=rollouts,
        outcome=read_outcome(directory),
        skipped_lines=skipped + torn,
    )


def read_outcome(directory: Path) -> Outcome | None:
    """The final table of `directory`, or None when the run has none."""
    path = directory / OUTCOME
    if not path.is_file():
        return None
    document = json.loads(path.read_text())
    return Outcome(tuple(OutcomeRow(**row) for row in document["rows"]), document["totals"])


def _json_lines(content: bytes) -> Iterator[dict[str, Any] | None]:
    """Each line's object, None for a line that is not one (the last line of a killed process)."""
    for line in content.splitlines():
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            yield None
        else:
            yield value if isinstance(value, dict) else None


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _evaluation(record: dict[str, Any]) -> EvaluationRecord | None:
    body = record.get("evaluation")
    if not isinstance(body, dict):
        return None
    return EvaluationRecord(
        policy_version=int(body["policy_version"]),
        prompts=int(body["prompts"]),
        greedy=float(body["greedy"]),
        sampled=float(body["sampled"]),
    )


def _read_samples(directory: Path) -> tuple[tuple[RolloutRecord, ...], int]:
    rollouts: dict[tuple[int, str, int], RolloutRecord] = {}
    torn = 0
    for path in sorted(directory.glob("*.jsonl.gz")):
        seen: dict[tuple[int, str], int] = {}
        try:
            content = gzip.decompress(path.read_bytes())
        except (EOFError, OSError, zlib.error):
            torn += 1
            continue
        for record in _json_lines(content):
            if record is None:
                torn += 1
                continue
            rollout = _rollout(record)
            place = (rollout.step, rollout.group)
            seen[place] = seen.get(place, 0) + 1
            rollouts[(*place, seen[place])] = rollout
    return tuple(rollouts[key] for key in sorted(rollouts)), torn


def _rollout(record: dict[str, Any]) -> RolloutRecord:
    return RolloutRecord(
        step=int(record["step"]),
        group=str(record["group"]),
        prompt_text=str(record["prompt_text"]),
        token_texts=tuple(record["token_texts"]),
        student_logprobs=_logprobs(record["student_logprobs"]),
        teacher_logprobs=_logprobs(record["teacher_logprobs"]),
        teacher_top=tuple(
            tuple((str(text), float(logprob)) for text, logprob in position)
            for position in record.get("teacher_top") or ()
        ),
        reward=None if record.get("reward") is None else float(record["reward"]),
        token_ids=tuple(int(token) for token in record["token_ids"]),
        guided=bool(record.get("guided", False)),
    )


def _logprobs(values: list[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)
