"""`tutelage sample`: responses of a run's student as it is, written for `tutelage score`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tutelage_client.errors import invalid

from services.logs import log_to_stderr

if TYPE_CHECKING:
    from student_trainer.config import RunConfig
    from student_trainer.sampler.groups import GroupSampler, SampledGroup


def sample_file(run_file: Path, *, groups: int, output: Path, model: str | None = None) -> int:
    """Sample the first `groups` groups of a run, with the student before training, or with `model`.

    The prompts, their order and the random numbers are the run's. Each line has the ids of context and
    response, the behaviour's log-probabilities and its temperature, and the example's number.

    Raises:
        RunFileError: the run file cannot be used.
        TutelageError: the options or the student do not fit; nothing is written then.
    """
    from student_trainer.config import load_run_config
    from student_trainer.policy_store import PolicyVersion
    from student_trainer.sampler.build import build_sampler

    log_to_stderr(logging.WARNING)
    if output.suffix != ".jsonl":
        raise invalid(f"--output: got {str(output)!r}, must end in .jsonl")
    config = _by_student(load_run_config(run_file))
    _, sampler = build_sampler(config, PolicyVersion(0, _directory(config, model), ""))
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    try:
        with closing(sampler), temporary.open("w", encoding="utf-8") as file:
            for record in _records(config, sampler, groups):
                file.write(json.dumps(record) + "\n")
                rows += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{output}: {rows} responses to {groups} prompts")
    return 0


def _by_student(config: RunConfig) -> RunConfig:
    """The run with its student for a sampler: the file that it replays is still to be written."""
    sampling = config.sampling.model_copy(update={"sampler": "student", "student_fraction": None})
    return config.model_copy(update={"sampling": sampling})


def _directory(config: RunConfig, model: str | None) -> Path:
    """The student's files on this machine."""
    name = model or config.student.model
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    revision = config.student.revision if model is None else None
    return Path(snapshot_download(name, revision=revision))


def _records(config: RunConfig, sampler: GroupSampler, groups: int) -> Iterator[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    size = max(1, config.sampling.batch_size // config.sampling.samples_per_prompt)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=groups)
        for start in range(0, groups, size):
            indices = range(start, min(start + size, groups))
            for index, sampled in zip(indices, sampler.sample(indices, policy_version=0), strict=True):
                yield from _lines(sampled, sampler.prompts.training_index(index))
            progress.advance(task, len(indices))


def _lines(sampled: SampledGroup, example: int) -> Iterator[dict[str, Any]]:
    group = sampled.group
    for place, rollout in enumerate(group.rollouts):
        yield {
            "id": f"{group.index}/{place}",
            "example": example,
            "context_ids": np.frombuffer(group.prompt_ids, "<i4").tolist(),
            "response_ids": np.frombuffer(rollout.response_ids, "<i4").tolist(),
            "behaviour_logprobs": np.frombuffer(rollout.behaviour_logprobs, "<f4").tolist(),
            "sampling_temperature": group.temperature,
            "finished": rollout.finished,
            "text": rollout.text,
        }
