"""What `tutelage doctor` sees of a run's data: whether it can be read, and what its first rows lack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tutelage_client.errors import TutelageError

from launcher.doctor_checks import Finding

if TYPE_CHECKING:
    from student_trainer.config import RunConfig

FIRST = 64  # examples that are looked at


def check_data(config: RunConfig) -> Finding:
    """Where prompts come from; on this machine every prompt is read, as samplers do."""
    from student_trainer.sampler.data import load_prompts

    data = config.data
    if data.task is not None:
        return Finding("ok", "data", f"built-in task {data.task!r}")
    if data.path is not None and not data.path.is_file():
        return Finding("fail", "data", f"{data.path}: there is no such file")
    if data.dataset is not None and not Path(data.dataset).is_dir():
        return Finding("unknown", "data", f"{data.dataset}: a hub data set, not fetched to check it")
    try:
        prompts = load_prompts(data.model_copy(update={"max_prompt_tokens": None}), seed=config.run.seed)
        for group in range(min(FIRST, len(prompts.training))):
            prompts.example(group)
    except TutelageError as error:
        return Finding("fail", "data", error.message)
    count, held_out = len(prompts.training), len(prompts.evaluation)
    return Finding("ok", "data", f"{data.path or data.dataset}: {count:,} prompts, {held_out:,} are held out")
