"""Nothing that a process prints, logs or starts shows a token or a password."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from launcher.cli import app
from launcher.doctor import check_queue
from launcher.up import child_specs
from services.logs import log_to_stderr
from services.queue.connection import without_secrets
from services.teacher.settings import TeacherSettings
from student_trainer.config import load_run_config

SECRET = "open-sesame"
URL = f"redis://worker:{SECRET}@127.0.0.1:1/0"
RUN_FILE = f"""
[queue]
url = "{URL}"
[teachers.big]
engine = "fake"
[student]
model = "student"
[data]
task = "addition"
[objective]
preset = "thinking-machines"
[training]
steps = 1
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN_FILE)
    return path


def fail_with_a_secret_at_hand() -> None:
    token = SECRET
    raise ValueError(f"{len(token)} letters are too few")


def test_a_logged_traceback_shows_no_local_variable(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    try:
        fail_with_a_secret_at_hand()
    except ValueError:
        structlog.get_logger().exception("failed")
    printed = capsys.readouterr()
    assert "ValueError: 11 letters are too few" in printed.err
    assert "fail_with_a_secret_at_hand" in printed.err
    assert SECRET not in printed.err
    assert printed.out == ""


def test_up_gives_the_queue_to_a_teacher_through_the_environment(run_file: Path) -> None:
    config = load_run_config(run_file)
    (teacher,) = [spec for spec in child_specs(config, run_file, URL) if spec.role == "teacher"]
    assert not any(SECRET in argument for argument in teacher.arguments)
    assert URL in teacher.environment.values()


def test_a_teacher_takes_the_queue_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[TeacherSettings] = []
    monkeypatch.setattr("services.teacher.process.main", started.append)
    ran = CliRunner().invoke(app, ["teacher", "--engine", "fake"], env={"TUTELAGE_QUEUE_URL": URL})
    assert ran.exit_code == 0, ran.output
    assert [settings.queue_url for settings in started] == [URL]


async def test_doctor_names_the_queue_without_its_password(run_file: Path) -> None:
    finding = await check_queue(load_run_config(run_file))
    assert finding.level == "fail"
    assert finding.message.startswith("redis://127.0.0.1:1/0: ")
    assert SECRET not in finding.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rediss://:pw@host:6379", "rediss://host:6379"),
        ("unix:///tmp/queue.sock?password=pw", "unix:///tmp/queue.sock"),
        ("redis://host/2?password=pw", "redis://host/2"),
    ],
)
def test_a_url_is_shown_without_user_password_and_query(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.mark.parametrize(
    "setting",
    [
        f"service.tokens={SECRET}",
        f"service.token={SECRET}",
        f"service.tokens.0={SECRET}",
        f"service={SECRET}",
        f"service.tokens:{SECRET}",
        f"queue_url.x={SECRET}",
    ],
)
def test_a_refused_setting_is_not_repeated(setting: str) -> None:
    ran = CliRunner().invoke(app, ["teacher", "--engine", "fake", "--set", setting])
    assert ran.exit_code == 2, ran.output
    assert ran.stderr
    assert SECRET not in ran.output
