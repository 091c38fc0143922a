"""Run files in which a judge or a writer is asked for what it cannot answer, or for more than it does."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from services.models.writer_settings import WriterSettings
from services.teacher.settings import TeacherSettings
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.config_errors import RunFileError

WRITER: dict[str, Any] = {"model": "w", "writer": {"max_continuations": 4, "max_chunks": 12}}
JUDGE: dict[str, Any] = {"model": "j", "judge": {}}
AUDITED: dict[str, Any] = {"preset": "omniopd", "audit": {"teacher": "author", "continuations": 4}}
JUDGED: dict[str, Any] = {"mix": "add", "judge": "author"}


def run_file(teachers: dict[str, Any], objective: dict[str, Any]) -> RunConfig:
    return parse_run_config(
        {
            "teachers": teachers,
            "student": {"model": "s"},
            "data": {"path": "x.jsonl", "answer_field": "answer", "tag_field": "tag"},
            "objective": objective,
            "training": {"steps": 1},
        }
    )


@pytest.mark.parametrize(
    ("silent", "objective"), [(WRITER, AUDITED), (JUDGE, JUDGED)], ids=["writer", "judge"]
)
@pytest.mark.parametrize(
    ("view", "others", "allowed"),
    [
        ({}, {}, "a further teacher"),  # no other teacher, to which it would fall
        ({"weights": "teacher:author"}, {}, "a further teacher"),
        ({"route": {"a": "author", "b": "big"}}, {"big": {"model": "m"}}, "big"),
    ],
    ids=["alone", "named", "routed"],
)
def test_nobody_who_judges_or_writes_is_asked_for_log_probabilities(
    silent: dict[str, Any],
    objective: dict[str, Any],
    view: dict[str, Any],
    others: dict[str, Any],
    allowed: str,
) -> None:
    with pytest.raises(RunFileError) as refusal:
        run_file({"author": silent, **others}, {**objective, "views": {"t": view}})
    assert str(refusal.value).startswith("run file: objective.views.t: asks author for log-probabilities")
    assert f"allowed: {allowed}" in str(refusal.value)


def test_a_view_beside_them_has_a_teacher_or_weights_of_the_students() -> None:
    found = run_file({"author": WRITER, "big": {"model": "m"}}, {**AUDITED, "views": {"t": {}}})
    assert found.plan().teachers["t"] == "big"
    assert run_file({"author": WRITER}, AUDITED).plan().teachers["reference"] == "run.initial"
    with pytest.raises(RunFileError, match="asks author for log-probabilities"):  # an objective without views
        run_file({"author": JUDGE}, JUDGED)


@pytest.mark.parametrize(("key", "most"), [("chunks", 12), ("continuations", 4)])
def test_an_audit_asks_for_no_more_than_its_writer_writes(key: str, most: int) -> None:
    for asked in (most, most + 1):
        objective = {**AUDITED, "audit": {**AUDITED["audit"], key: asked}}
        if asked == most:
            assert run_file({"author": WRITER}, objective).plan().audit is not None
            continue
        with pytest.raises(RunFileError) as refusal:
            run_file({"author": WRITER}, objective)
        assert str(refusal.value) == (
            f"run file: objective.audit.{key}: got {asked}, allowed: 1 to {most}, "
            f"[teachers.author.writer] max_{key}"
        )


@pytest.mark.parametrize("temperature", [0.009, 2.1])
def test_vllm_writes_at_the_temperatures_that_it_samples_at(temperature: float) -> None:
    """It takes another one without a word, or refuses every request."""
    writer = {"temperature": temperature}
    with pytest.raises(RunFileError, match=r"writer\.temperature: got .* which samples from 0\.01 to 2\.0"):
        run_file({"author": {**WRITER, "engine": "vllm", "writer": writer}}, AUDITED)
    with pytest.raises(
        ValidationError, match=r"writer\.temperature: got .* which samples from 0\.01 to 2\.0"
    ):
        TeacherSettings(model="w", engine="vllm", writer=WriterSettings(**writer))
    other = TeacherSettings(model="w", writer=WriterSettings(**writer))
    assert other.writer is not None
    assert other.writer.temperature == temperature
