"""Rollouts for the report: every token with what student and teacher thought of it.

RUN_DIR/samples/step-00000010.jsonl.gz holds one JSON object per rollout: {step, group, prompt_text,
token_texts, token_ids, student_logprobs, teacher_logprobs, teacher_top, reward, guided}.
teacher_top has up to five [text, log-probability] per position, or is [] where none were asked for; guided
says that it was sampled under [sampling] context, though student_logprobs are under the prompt.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tutelage_client.types import PAD_ID, SequenceScore

from student_trainer.batch import Member
from student_trainer.step_result import StepResult
from student_trainer.verify import TrainingRollout

ALTERNATIVES = 5
_NAME = re.compile(r"step-(\d+)\.jsonl\.gz")


def write_samples(directory: Path, step: int, result: StepResult, tokenizer: Any, max_groups: int) -> Path:
    """Write the rollouts of the first `max_groups` groups of a step that was run with traces."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:08d}.jsonl.gz"
    temporary = path.with_name(f".{path.name}.tmp")
    groups: set[str] = set()
    with gzip.open(temporary, "wt", encoding="utf-8") as file:
        for member, logprobs in _members(result):
            if member.group.id not in groups and len(groups) == max_groups:
                break
            groups.add(member.group.id)
            file.write(json.dumps(_record(step, member, logprobs, tokenizer)) + "\n")
    os.replace(temporary, path)
    return path


def discard_samples_above(directory: Path, step: int) -> None:
    """Delete what a killed trainer wrote after the checkpoint that is being resumed."""
    for path in directory.glob("step-*.jsonl.gz"):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) > step:
            path.unlink()


def _members(result: StepResult) -> Iterator[tuple[Member, npt.NDArray[np.float32]]]:
    """Each rollout with the student's log-probabilities [R] at the step's weights."""
    for micro_batch, traces in zip(result.micro_batches, result.per_token, strict=False):
        values = traces["student_logprob"].cpu().numpy()
        start = 0
        for member in micro_batch.members:
            yield member, values[start : start + member.rollout.length]
            start += member.rollout.length


def _record(step: int, member: Member, logprobs: npt.NDArray[np.float32], tokenizer: Any) -> dict[str, Any]:
    rollout = member.rollout
    score = next(iter(rollout.scores.values()), None)
    teacher = np.full(rollout.length, np.nan) if score is None or score.sampled is None else score.sampled
    return {
        "step": step,
        "group": member.group.id,
        "prompt_text": member.group.prompt_text,
        "token_ids": rollout.response_ids.tolist(),
        "token_texts": [_text(tokenizer, token) for token in rollout.response_ids.tolist()],
        "student_logprobs": _numbers(logprobs),
        "teacher_logprobs": _numbers(teacher),
        "teacher_top": [] if score is None else _alternatives(rollout, score, tokenizer),
        "reward": rollout.reward,
        "guided": rollout.guided,
    }


def _alternatives(rollout: TrainingRollout, score: SequenceScore, tokenizer: Any) -> list[list[list[Any]]]:
    """The ids the teacher finds most probable among those it was asked for, per position."""
    if score.top_ids is not None and score.top_logprobs is not None:
        ids, logprobs = score.top_ids, score.top_logprobs
    elif rollout.candidate_ids is not None and score.candidate_logprobs is not None:
        ids, logprobs = rollout.candidate_ids, score.candidate_logprobs
    else:
        return []
    usable = np.where((ids != PAD_ID) & np.isfinite(logprobs), logprobs.astype(np.float32), -np.inf)
    order = np.argsort(-usable, axis=1, kind="stable")[:, :ALTERNATIVES]
    return [
        [[_text(tokenizer, int(ids[t, k])), float(usable[t, k])] for k in row if np.isfinite(usable[t, k])]
        for t, row in enumerate(order)
    ]


def _text(tokenizer: Any, token: int) -> str:
    """The token's own text; <id> for one that has none (a padded row of the vocabulary)."""
    text: str = "" if tokenizer is None else tokenizer.decode([token])
    return text or f"<{token}>"


def _numbers(values: npt.NDArray[Any]) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
