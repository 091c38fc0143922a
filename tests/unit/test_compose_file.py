"""docker-compose.yml against its own explanation: every variable documented, nothing published, nothing root.

`docker compose` itself checks the file where it is installed; what is read here needs no engine.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli import app
from launcher.stack_secrets import make_secrets
from services.teacher.settings import TeacherSettings
from student_trainer.config import load_run_config

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::?-([^}]*))?\}")


def services() -> dict[str, dict[str, Any]]:
    document: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return document["services"]  # type: ignore[no-any-return]


def expand(text: str, given: dict[str, str]) -> str:
    """`text` as compose sees it when only the variables in `given` are set."""
    return VARIABLE.sub(lambda found: given.get(found[1], found[2] or ""), text)


def documented() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_every_variable_is_explained_with_its_default() -> None:
    used = {name: default or "" for name, default in VARIABLE.findall(FILE.read_text())}
    explained = documented()
    assert used == {name: explained[name] for name in used}
    assert set(explained) - set(used) == {"COMPOSE_PROFILES"}
    assert explained["COMPOSE_PROFILES"] == "cpu"
    assert (ROOT / ".env").read_text().splitlines()[-1] == "COMPOSE_PROFILES=cpu"


def test_nothing_is_published_beyond_the_loopback_and_teachers_can_be_scaled() -> None:
    for name, service in services().items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), (name, port)
        assert "container_name" not in service, name
        if name.startswith("teacher"):
            # host port left to the engine: one replica more must not want the same
            assert all(port.startswith("127.0.0.1::") for port in service["ports"]), name
            assert "--token-file" in service["command"], name


@pytest.mark.parametrize("name", sorted(services()))
def test_no_service_is_root_or_may_become_it_or_writes_to_its_image(name: str) -> None:
    service = services()[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["profiles"]


@pytest.mark.parametrize("name", sorted(services()))
def test_every_service_that_stays_has_a_health_check(name: str) -> None:
    service = services()[name]
    if "restart" not in service:
        assert name in {"secrets", "models"}  # they end
    elif service["build"]["target"] == "trainer":
        assert service["healthcheck"]["test"]
    else:
        stage = dockerfile_stage(service["build"]["target"])
        assert re.search(r"^HEALTHCHECK --interval", stage, re.M), name


@pytest.mark.parametrize("target", ["teacher", "teacher-cuda", "trainer", "queue"])
def test_every_image_has_a_user_labels_and_no_floating_tag(target: str) -> None:
    stage = dockerfile_stage(target)
    assert re.search(r"^USER 10001:10001$", stage, re.M)
    assert stage.rindex("USER 10001:10001") > stage.rindex("RUN ")
    for label in ("title", "description", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{label}=" in stage, label
    for default in re.findall(r"^ARG \w+_IMAGE=(\S+)$", dockerfile(), re.M):
        repository, _, tag = default.rpartition(":")
        assert repository, default
        assert re.search(r"\d", tag), default


def dockerfile() -> str:
    return (ROOT / "deploy/docker/Dockerfile").read_text()


def dockerfile_stage(target: str) -> str:
    (stage,) = re.findall(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM |\Z)", dockerfile(), re.M | re.S)
    return str(stage)


@pytest.mark.parametrize("options", [None, "--engine transformers"])
@pytest.mark.parametrize("name", ["teacher", "teacher-gpu"])
def test_teachers_start_with_what_they_are_given(
    name: str, options: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[TeacherSettings] = []
    monkeypatch.setattr("services.teacher.process.main", started.append)
    given = {} if options is None else {"CPU_TEACHER_OPTIONS": options, "TEACHER_OPTIONS": options}
    words = shlex.split(expand(services()[name]["command"], given))
    ran = CliRunner().invoke(app, words, env={"TUTELAGE_TOKEN": ""})
    assert ran.exit_code == 0, ran.output
    (settings,) = started
    assert settings.service.host == "0.0.0.0"
    assert settings.engine == ("vllm" if options is None else "transformers")
    recipe = {"teacher": "RUN_FILE", "teacher-gpu": "GPU_RUN_FILE"}[name]
    config = load_run_config(ROOT / documented()[recipe])
    assert settings.heartbeat_seconds == config.queue.heartbeat_seconds
    entry = config.teachers[settings.name]
    assert (settings.model, settings.dtype) == (entry.model, entry.dtype)


@pytest.mark.parametrize("name", ["trainer", "trainer-gpu", "sampler", "sampler-gpu", "report", "report-gpu"])
def test_the_processes_of_a_run_read_its_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, ...]] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("student_trainer.train.main", lambda *arguments: started.append(arguments))
    monkeypatch.setattr("student_trainer.sampler.process.main", lambda *arguments: started.append(arguments))
    service = services()[name]
    known = {key: expand(value, {}) for key, value in service["environment"].items()} | {"HOSTNAME": "box"}
    if name.startswith("report"):
        assert load_run_config(Path(expand(service["command"][0], {})))
        assert service["healthcheck"]["test"][-1] == service["command"][-1]
        return
    if name.startswith("sampler"):
        words = shlex.split(service["command"][0].removeprefix("exec tutelage "))
        words = [re.sub(r"\$\$(\w+)", lambda name: known[name[1]], word) for word in words]
    else:
        words = [expand(word, {}) for word in service["command"]]
    assert CliRunner().invoke(app, words).exit_code == 0
    ((config, *sampler),) = started
    assert config.run.name in known["RUN_FILE"]
    assert sampler == (["box"] if name.startswith("sampler") else [])


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "secrets"
    make_secrets(directory, "queue:6379")
    first = {path.name: path.read_text().strip() for path in directory.iterdir()}
    assert first.keys() == {"queue-password", "queue-url", "token"}
    assert first["queue-url"] == f"redis://:{first['queue-password']}@queue:6379/0"
    assert len(first["token"]) == len(first["queue-password"]) == 48
    assert first["token"] != first["queue-password"]
    assert all(path.stat().st_mode & 0o777 == 0o400 for path in directory.iterdir())
    make_secrets(directory, "elsewhere:6380")
    second = {path.name: path.read_text().strip() for path in directory.iterdir()}
    assert second["token"] == first["token"]
    assert second["queue-url"] == f"redis://:{first['queue-password']}@elsewhere:6380/0"
