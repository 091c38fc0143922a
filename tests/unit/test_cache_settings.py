"""`tutelage teacher --cache`: off unless asked for, and clear about what it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from launcher.cli import app
from launcher.up import child_specs
from services.api.metrics import Metrics
from services.teacher.build import build_cached
from services.teacher.cache.engine import CachedEngine
from services.teacher.settings import TeacherSettings
from student_trainer.config import RunFileError, parse_run_config


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[TeacherSettings]:
    """Settings of the replicas that a command would have started."""
    settings: list[TeacherSettings] = []
    monkeypatch.setattr("services.teacher.process.main", settings.append)
    return settings


def teacher(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["teacher", "--engine", "fake", *arguments])


def test_a_teacher_has_no_cache_unless_it_is_asked_for(started: list[TeacherSettings]) -> None:
    assert teacher().exit_code == 0
    assert started[0].cache is None
    assert not isinstance(build_cached(started[0], Metrics()), CachedEngine)


@pytest.mark.parametrize(
    ("arguments", "location", "limit"),
    [
        (("--cache", "some/directory"), "some/directory", 10 * 2**30),
        (("--cache", "redis://host:6379/2"), "redis://host:6379/2", 2**30),
        (("--cache", "d", "--set", "cache.max_bytes=4096"), "d", 4096),
    ],
)
def test_a_cache_is_a_directory_or_a_server(
    started: list[TeacherSettings], arguments: tuple[str, ...], location: str, limit: int
) -> None:
    ran = teacher(*arguments)
    assert ran.exit_code == 0, ran.output
    assert started[0].cache is not None
    assert (started[0].cache.location, started[0].cache.limit) == (location, limit)
    assert isinstance(build_cached(started[0], Metrics()), CachedEngine)


def test_its_address_may_come_from_the_environment(
    started: list[TeacherSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", "rediss://:secret@host/1")
    assert teacher().exit_code == 0
    assert started[0].cache is not None
    assert started[0].cache.location == "rediss://:secret@host/1"


RUN = {
    "run": {"name": "r"},
    "student": {"model": "m"},
    "data": {"task": "addition"},
    "objective": {"preset": "exopd"},
    "training": {"steps": 1},
}


def test_a_run_file_says_whose_scores_are_kept_and_where(
    started: list[TeacherSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = {
        "expert": {"model": "big", "cache": "redis://:secret@host/1"},
        "reference": {"scores": "file.parquet"},
    }
    monkeypatch.setenv("TUTELAGE_CACHE", "meant/for/another")
    for spec in child_specs(parse_run_config({**RUN, "teachers": teachers}), Path("r.toml"), "unix:///q")[:2]:
        assert "secret" not in str(spec.arguments), "a command line is for everyone to read"
        ran = CliRunner().invoke(app, list(spec.arguments), env=dict(spec.environment))
        assert ran.exit_code == 0, ran.output
    assert [one.cache.location if one.cache else None for one in started] == ["redis://:secret@host/1", None]


def test_a_run_file_with_a_cache_beside_a_file_is_refused() -> None:
    teachers = {"expert": {"scores": "f.parquet", "cache": "d"}, "reference": {"model": "m"}}
    with pytest.raises(RunFileError, match="cache: set beside scores"):
        parse_run_config({**RUN, "teachers": teachers})


@pytest.mark.parametrize(
    "location", ["", "redis://:geheim@host:99999/0", "redis://:ge#heim@host", "s3://geheim"]
)
def test_what_is_neither_is_refused_and_not_shown(location: str) -> None:
    ran = teacher("--cache", location)
    assert ran.exit_code == 2
    assert "cache: must be a directory, or an address of the form" in ran.stderr
    assert "heim" not in ran.output


def test_a_limit_without_a_place_and_a_file_behind_a_cache_are_refused() -> None:
    assert "cache.location" in teacher("--set", "cache.max_bytes=5").stderr
    ran = CliRunner().invoke(app, ["teacher", "--engine", "file", "--scores", "f.parquet", "--cache", "d"])
    assert "engine 'file', which answers from its file alone" in ran.stderr
