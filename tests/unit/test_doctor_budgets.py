"""What the doctor says of token budgets: a group whose pairs are compared is trained in one pass."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.doctor_checks import check_budgets
from student_trainer.config import parse_run_config

PAIRS: dict[str, Any] = {"preset": "pbsd"}
CONTEXT = {"context": {"user": "{prompt} {solution}"}, "guided_samples": 2}


@pytest.mark.parametrize(
    ("objective", "sampling", "budget", "warned"),
    [(PAIRS, CONTEXT, 399, True), (PAIRS, CONTEXT, 400, False), ({}, {}, 399, False)],
    ids=["too large", "fits", "may be cut"],
)
def test_a_group_of_pairs_that_is_larger_than_a_micro_batch_is_named(
    objective: dict[str, Any], sampling: dict[str, Any], budget: int, warned: bool
) -> None:
    config = parse_run_config(
        {
            "teachers": {} if objective else {"big": {"model": "m"}},
            "student": {"model": "s"},
            "data": {"path": "x.jsonl"},
            "sampling": {"samples_per_prompt": 4, "max_new_tokens": 100, **sampling},
            "objective": objective,
            "training": {"steps": 1, "micro_batch_tokens": budget},
        }
    )
    found = [(finding.level, finding.subject) for finding in check_budgets(config)]
    assert found == [("warn", "training")] * warned
