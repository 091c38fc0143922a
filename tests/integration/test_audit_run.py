"""A student learns to write as a writer does, of which only text is known; on tiny models."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from support.preset_problem import required
from support.preset_run import Stage

from student_trainer.config import parse_run_config

STEPS = 40


def test_the_student_comes_to_agree_with_the_writer(tmp_path: Path) -> None:
    """The student is random, the writer says letters and a digit: sampler, queue, writer and trainer."""
    with Stage(tmp_path) as stage:
        document: dict[str, Any] = stage.config("omniopd", required("omniopd")).model_dump(
            mode="json", exclude_unset=True
        )
        document["student"]["model"] = str(stage.models["small"])
        document["teachers"]["writer"]["model"] = str(stage.models["student"])
        document["objective"]["audit"]["continuations"] = 8
        document["sampling"]["samples_per_prompt"] = 6
        document["training"] |= {"steps": STEPS, "prompts_per_step": 6, "learning_rate": 5e-3}
        records = stage.run(parse_run_config(document)).metrics()
    agreement = [record["agreement"] for record in records]
    assert len(agreement) == STEPS
    first, last = fmean(agreement[:8]), fmean(agreement[-8:])
    assert last > 2.5 * first, (first, last)
    assert all(record["dropped_audit"] == 0 for record in records)
