"""What the doctor says of groups that a teacher would refuse because of their size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tutelage_client.types import Limits

from launcher.doctor_requests import check_requests
from student_trainer.config import RunConfig, parse_run_config

PLAIN: dict[str, Any] = {}
JUDGED: dict[str, Any] = {"mix": "add", "judge": "author"}
AUDITED: dict[str, Any] = {
    "preset": "omniopd",
    "audit": {"teacher": "author", "continuations": 4, "chunks": 2, "chunk_tokens": 10},
}


def run_file(objective: dict[str, Any], prompt_tokens: int | None = 20) -> RunConfig:
    """Groups of 4 responses of up to 100 tokens."""
    teachers: dict[str, Any] = {"big": {"model": "m"}}
    if "judge" in objective:
        teachers["author"] = {"model": "j", "judge": {}}
    if "audit" in objective:
        teachers["author"] = {"model": "w", "writer": {}}
    return parse_run_config(
        {
            "teachers": teachers,
            "student": {"model": "s"},
            "data": {"path": "x.jsonl", "answer_field": "answer", "max_prompt_tokens": prompt_tokens},
            "sampling": {"samples_per_prompt": 4, "max_new_tokens": 100},
            "objective": objective,
            "training": {"steps": 1},
        }
    )


def found(config: RunConfig, teacher: str, limits: Limits) -> list[str]:
    findings = list(check_requests(config, {teacher: limits}))
    assert all((each.level, each.subject) == ("warn", f"teacher {teacher}") for each in findings)
    return [each.message for each in findings]


@pytest.mark.parametrize(
    ("teacher", "view", "objective", "prompt_tokens", "tokens"),
    [
        ("big", "teacher", PLAIN, 20, 4 * 100 + 20),
        ("big", "teacher", PLAIN, None, 4 * 100 + 1),
        ("author", "judge", JUDGED, 20, 4 * (100 + 20)),
        # The last two chunks begin after 80 and 90 tokens, are read after the prompt and written 4 times.
        ("author", "audit", AUDITED, 20, 4 * (100 + 80 + 90 + 2 * (20 + 4 * 10))),
    ],
    ids=["log-probabilities", "a prompt of any length", "judge", "writer"],
)
def test_a_group_of_more_tokens_than_a_request_may_have_is_named(
    teacher: str, view: str, objective: dict[str, Any], prompt_tokens: int | None, tokens: int
) -> None:
    config = run_file(objective, prompt_tokens)
    exactly = Limits(max_request_tokens=tokens)
    assert found(config, teacher, exactly) == []
    (message,) = found(config, teacher, replace(exactly, max_request_tokens=tokens - 1))
    assert message.startswith(
        f"would refuse a group of 4 responses of 100 tokens (view {view}): "
        f"request tokens: got {tokens}, allowed are {tokens - 1}; "
    )


def test_an_answer_of_more_bytes_than_a_message_may_have_is_named() -> None:
    config = run_file({"support": "teacher_topk", "k": 50, "estimator": "pathwise"})
    # Of a position: whether it is valid, ids and log-probabilities of 50 tokens, perhaps that of its own.
    fits, short = Limits(max_message_bytes=4 * 100 * 420), Limits(max_message_bytes=4 * 100 * 400)
    assert found(config, "big", fits) == []
    (message,) = found(config, "big", short)
    assert "its answer would have" in message
    assert "allowed are 160000" in message


def test_more_responses_than_a_request_may_have_are_named() -> None:
    (message,) = found(run_file(PLAIN), "big", Limits(max_sequences=3))
    assert "sequences: got 4, allowed are 1 to 3" in message


def test_nothing_is_said_of_responses_that_are_read_from_a_file() -> None:
    config = run_file(PLAIN)
    sampling = config.sampling.model_copy(update={"sampler": "file:scores.parquet"})
    assert found(config, "big", Limits(max_request_tokens=10))
    assert not found(config.model_copy(update={"sampling": sampling}), "big", Limits(max_request_tokens=10))
