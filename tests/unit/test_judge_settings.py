"""How a judge is asked and how strictly its reply is read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from services.models.judge_settings import JudgeSettings
from services.teacher.settings import TeacherSettings

DEFAULT = JudgeSettings()


@pytest.mark.parametrize(
    ("reply", "judgement"),
    [
        ("Score: 0", 0.0),
        ("It is right.\nScore: 9", 1.0),
        ("Score: 2, at first sight.\nIt is better.\n\n  Score: 6  \n\n", 6 / 9),
    ],
)
def test_the_last_line_decides(reply: str, judgement: float) -> None:
    assert DEFAULT.read(reply) == judgement


@pytest.mark.parametrize(
    "reply",
    ["", "9", "Score:", "Score: 10", "Score: -1", "Score: 4.5", "Score: 4/9", "Score: 4.", "score: 4",
     "Score: 4\nThank you.", "My Score: 4", "Score: ٤", "Score: four"],
)  # fmt: skip
def test_anything_else_is_no_score(reply: str) -> None:
    with pytest.raises(ValueError, match="must be 'Score: 0 … 9'"):
        DEFAULT.read(reply)


def test_the_line_is_taken_literally() -> None:
    settings = JudgeSettings(reply="[[{score}]] (of {{5}})", largest=5)
    assert settings.read("[[4]] (of {5})") == 0.8
    with pytest.raises(ValueError, match="last line"):
        settings.read("4 (of {5})")


def test_the_question_shows_prompt_response_and_scale() -> None:
    asked = JudgeSettings(largest=5).question("1+1={x}", "{response}")
    assert "Question:\n1+1={x}\n" in asked
    assert "Response:\n{response}\n" in asked
    assert "from 0 (worst) to 5 (best)" in asked
    assert "\nScore: N\n" in asked


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"user": "{prompt}"}, "user: got the fields ['prompt'], must name ['response']"),
        ({"user": "{response} {answer}"}, "user: got the fields ['answer', 'response']"),
        ({"reply": "Score"}, "reply: got the fields [], must name ['score']"),
        ({"reply": "{score} of {score}"}, "must have {score} once and as it is"),
        ({"reply": "Score: {score:02}"}, "must have {score} once and as it is"),
        ({"user": "{response} }"}, "a template that cannot be read"),
        ({"largest": 0}, "greater than or equal to 1"),
        ({"scale": 9}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        JudgeSettings(**settings)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"engine": "fake"}, "the engine 'fake' generates nothing"),
        ({"model": "m", "cache": {"location": "d"}}, "with judge, which goes without"),
        ({"follow": "d"}, "with judge, which goes without"),
        ({"model": "m", "engine": "vllm", "vllm": {"implementation": "stock"}}, "a way to score"),
    ],
)
def test_a_judge_needs_an_engine_that_generates_and_weights_that_stay(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError) as refusal:
        TeacherSettings(judge=JudgeSettings(), **settings)
    assert reason in str(refusal.value)
