"""How a writer is set up: on a command line, in a run file, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from services.models.judge_settings import JudgeSettings
from services.models.writer_settings import WriterSettings
from services.teacher.settings import TeacherSettings


def test_the_default_asks_the_prompt_as_it_is() -> None:
    settings = WriterSettings()
    assert settings.question("1+1={x}") == "1+1={x}"
    assert (settings.temperature, settings.max_continuations, settings.similarity) == (1.0, 16, "edit")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"user": "Solve"}, "user: got the fields [], must name ['prompt']"),
        ({"user": "{prompt} {response}"}, "user: got the fields ['prompt', 'response']"),
        ({"user": "{prompt"}, "a template that cannot be read"),
        ({"temperature": 0}, "greater than 0"),
        ({"max_continuations": 0}, "greater than or equal to 1"),
        ({"similarity": "meaning"}, "Input should be 'edit'"),
        ({"largest": 9}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        WriterSettings(**settings)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"engine": "fake"}, "writer: got one, the engine 'fake' generates nothing"),
        ({"model": "m", "cache": {"location": "d"}}, "with writer, which goes without"),
        ({"follow": "d"}, "with writer, which goes without"),
        ({"model": "m", "engine": "vllm", "vllm": {"implementation": "stock"}}, "a writer generates"),
        ({"model": "m", "judge": JudgeSettings()}, "writer: got one beside judge; a teacher is one of them"),
    ],
)
def test_a_writer_needs_an_engine_that_generates_and_weights_that_stay(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError) as refusal:
        TeacherSettings(writer=WriterSettings(), **settings)
    assert reason in str(refusal.value)
