"""Nothing that a process prints, logs or starts shows a token or a password."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import ValidationError
from typer.testing import CliRunner

from launcher.cli import app
from launcher.doctor import check_queue
from launcher.up import child_specs
from services.exporter.process import ExporterSettings
from services.logs import log_to_stderr
from services.queue.connection import without_secrets
from services.queue_address import queue_address
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


def test_up_gives_the_queue_to_every_process_through_the_environment(run_file: Path) -> None:
    specs = child_specs(load_run_config(run_file), run_file, URL)
    assert {spec.role for spec in specs} == {"teacher", "trainer", "sampler"}
    for spec in specs:
        assert not any(SECRET in argument for argument in spec.arguments)
        assert spec.environment["TUTELAGE_QUEUE_URL"] == URL


COMMANDS = {
    "teacher": ("services.teacher.process.main", ["teacher", "--engine", "fake"]),
    "rollout": ("student_trainer.sampler.process.main", ["rollout", "RUN.toml"]),
    "train": ("student_trainer.train.main", ["train", "RUN.toml"]),
}


@pytest.mark.parametrize("role", COMMANDS)
@pytest.mark.parametrize("where", ["option", "environment", "file"])
def test_a_process_takes_the_queue_from_outside_its_run_file(
    role: str, where: str, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    main, command = COMMANDS[role]
    monkeypatch.setattr(main, lambda *arguments: started.append(arguments[0]))
    other = "redis://:open-sesame@other:6379/0"
    secret = run_file.with_name("queue-url")
    secret.write_text(f"{other}\n")
    given = {
        "option": (["--queue", other], {"TUTELAGE_QUEUE_URL_FILE": str(secret.with_name("absent"))}),
        "environment": ([], {"TUTELAGE_QUEUE_URL": other}),
        "file": ([], {"TUTELAGE_QUEUE_URL": "", "TUTELAGE_QUEUE_URL_FILE": str(secret)}),
    }
    options, environment = given[where]
    arguments = [argument.replace("RUN.toml", str(run_file)) for argument in command]
    ran = CliRunner().invoke(app, [*arguments, *options], env=environment)
    assert ran.exit_code == 0, ran.output
    (found,) = [settings.queue_url if role == "teacher" else settings.queue.url for settings in started]
    assert found == other


@pytest.mark.parametrize("content", [None, "", f"https://:{SECRET}@host"])
def test_a_file_without_an_address_is_refused_in_one_line(content: str | None, run_file: Path) -> None:
    secret = run_file.with_name("queue-url")
    if content is not None:
        secret.write_text(content)
    environment = {"TUTELAGE_QUEUE_URL_FILE": str(secret)}
    ran = CliRunner().invoke(app, ["train", str(run_file)], env=environment)
    assert ran.exit_code == 2, ran.output
    assert len(ran.stderr.splitlines()) == 1
    assert SECRET not in ran.output


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
        ("redis://u:pw@[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://:s3cr#et@h", "redis://h"),
        ("redis://:s3cr?et@h:1", "redis://h:1"),
        ("redis://:s3/cret@localhost:6399/0", "redis://localhost:6399/0"),
        ("redis://:s3@c/r#et@h:1/0", "redis://h:1/0"),
        ("redis://host/2?password=s3@cret", "(address not shown)"),
        ("redis://:s3cret", "(address not shown)"),
        ("redis:/:s3cret@h", "(address not shown)"),
        ("s3cret", "(address not shown)"),
    ],
)
def test_a_url_is_shown_without_user_password_and_query(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


MALFORMED = [
    "redis://:s3cr#et@localhost:6399/0",
    "redis://:s3cr/et@localhost:6399/0",
    "redis://:s3cr?et@localhost:6399/0",
    "redis://s3cr:12#et@localhost:6399/0",
    "redis://s3cr:12/et@localhost:6399/0",
    "redis://s3cr:12?et@localhost:6399/0",
    "redis://s3cr:12?e=t@localhost:6399/0",
    "redis://:s3cr",
    "redis://:pw@[s3cr",
    "reddis://:s3cr@h",
    "redis:/:s3cr@h",
    "s3cr",
]
TAKING_A_QUEUE = [
    ["status", "--once"], ["exporter", "--port", "0"], ["teacher", "--engine", "fake"], ["up", "RUN.toml"],
    ["rollout", "RUN.toml"], ["train", "RUN.toml"], ["doctor", "RUN.toml"],
]  # fmt: skip


def refuses(arguments: list[str], environment: dict[str, str] | None = None) -> bool:
    ran = CliRunner().invoke(app, arguments, env=environment)
    assert ran.exit_code == 2, ran.output
    assert "s3cr" not in ran.output
    assert "percent-encode" in ran.stderr
    return len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_address_is_one_line_that_does_not_show_it(url: str, run_file: Path) -> None:
    assert refuses(["status", "--once", "--queue", url])
    assert refuses(["teacher", "--engine", "fake", "--set", f"queue_url={url}"])
    run_file.write_text(RUN_FILE.replace(URL, url))
    assert refuses(["status", "--once", str(run_file)])


@pytest.mark.parametrize("command", TAKING_A_QUEUE, ids=lambda words: words[0])
@pytest.mark.parametrize("where", ["option", "environment", "file"])
def test_every_command_refuses_a_malformed_address(command: list[str], where: str, run_file: Path) -> None:
    secret = run_file.with_name("queue-url")
    secret.write_text(MALFORMED[0])
    command = [word.replace("RUN.toml", str(run_file)) for word in command]
    if where == "option":
        assert refuses([*command, "--queue", MALFORMED[0]])
    elif where == "environment":
        assert refuses(command, {"TUTELAGE_QUEUE_URL": MALFORMED[0]})
    else:
        assert refuses(command, {"TUTELAGE_QUEUE_URL_FILE": str(secret)})


def test_a_refused_address_of_the_exporter_is_not_shown() -> None:
    with pytest.raises(ValidationError, match="percent-encode") as refusal:
        ExporterSettings(queue_url=MALFORMED[0])
    assert "s3cr" not in refusal.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:6379/",
        "rediss://u:s3cr%23et@[::1]:6379/0?ssl_cert_reqs=none",
        "redis://queue.svc.cluster.local:6379/2?password=s3cr%40et",
        "unix:///tmp/a b/queue.sock?db=1",
    ],
)
def test_a_good_address_is_taken_as_it_is(url: str) -> None:
    assert queue_address(url) == url


@pytest.mark.parametrize("command", TAKING_A_QUEUE, ids=lambda words: words[0])
def test_help_says_where_a_password_belongs(command: list[str]) -> None:
    ran = CliRunner().invoke(app, [command[0], "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert "TUTELAGE_QUEUE_URL_FILE instead" in " ".join(ran.output.replace("│", " ").split())


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
