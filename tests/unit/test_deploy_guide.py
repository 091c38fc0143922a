"""docs/deploy.md says what compose file, manifests and command line really have."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kubernetes import objects
from typer.testing import CliRunner

from launcher.cli import app
from launcher.queue_address import QUEUE_URL_FILE_VARIABLE
from services.teacher.settings import TeacherSettings

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/deploy.md").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def commands(start: str) -> list[list[str]]:
    """The words of every command in the guide that begins with `start`."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)).replace("\\\n", " ")
    found = [shlex.split(line) for line in blocks.splitlines() if line.startswith(start)]
    assert found, start
    return found


def test_every_service_profile_and_volume_that_compose_is_told_of_exists() -> None:
    services = COMPOSE["services"]
    profiles = {profile for service in services.values() for profile in service["profiles"]}
    for words in commands("docker compose"):
        for option, value in itertools.pairwise(words):
            if option == "--profile":
                assert value in {*profiles, "*"}, words
            if option == "--scale":
                assert value.partition("=")[0] in services, words
        if {"logs", "port", "exec", "cp"} & set(words):
            assert {word.partition(":")[0] for word in words} & set(services), words
    assert set(re.findall(r"--profile (\w+)", GUIDE)) <= profiles
    volumes = {
        name for row in re.findall(r"^\| (`.*?`) \|", GUIDE, re.M) for name in re.findall(r"`(\w+)`", row)
    }
    assert volumes == {"runs", "queue", "secrets", "models", "cache"}
    assert volumes <= set(COMPOSE["volumes"])


def test_every_variable_it_names_is_explained() -> None:
    explained = re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.M)
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)", GUIDE)) - {"RUN_DIR"}
    assert named
    assert named <= {*explained, QUEUE_URL_FILE_VARIABLE}


def test_every_object_that_kubectl_is_told_of_exists() -> None:
    rendered = {f"{thing['kind'].lower()}/{thing['metadata']['name']}" for thing in objects("gpu")}
    for words in commands("kubectl"):
        for word in words:
            if word.startswith(("job/", "deployment/")):
                assert word in rendered, words
            if word.startswith("deploy/"):
                assert (ROOT / word / "kustomization.yaml").is_file(), words
    (secret,) = (words for words in commands("kubectl") if "secret" in words)
    assert {word.partition("=")[2].partition("=")[0] for word in secret if word.startswith("--from")} == {
        "queue-password",
        "token",
    }


def test_the_second_teacher_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[TeacherSettings] = []
    monkeypatch.setattr("services.teacher.process.main", started.append)
    (words,) = commands("TEACHER_GPUS=2 docker compose")
    assert "${TEACHER_GPUS:-" in str(COMPOSE["services"]["teacher-gpu"]["deploy"])
    options = words[words.index("teacher") + 1 :]
    options = [word for word in options if word not in ("--token-file", "/run/tutelage/token")]
    ran = CliRunner().invoke(app, ["teacher", *options], env={"TUTELAGE_TOKEN": "secret"})
    assert ran.exit_code == 0, ran.output
    assert started[0].name == "qwen3-14b"


def test_every_other_command_exists() -> None:
    for words in commands("tutelage"):
        ran = CliRunner().invoke(app, [words[1], "--help"])
        assert ran.exit_code == 0, ran.output
        for option in (word for word in words if word.startswith("--")):
            assert option in ran.output, words
