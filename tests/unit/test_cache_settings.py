"""`tutelage teacher --cache`: off unless asked for, and clear about what it cannot be."""

from __future__ import annotations

import pytest
from click.testing import Result
from typer.testing import CliRunner

from launcher.cli import app
from services.api.metrics import Metrics
from services.teacher.build import build_cached
from services.teacher.cache.engine import CachedEngine
from services.teacher.settings import TeacherSettings


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
