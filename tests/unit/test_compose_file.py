"""docker-compose.yml against its own explanation: every variable documented, nothing published, nothing root.

`docker compose` itself checks the file where it is installed; what is read here needs no engine.
"""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
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
        assert name in {"secrets", "models", "observability-volumes"}  # they end
    elif name == "otel-collector":  # an image of one file: nothing in it could ask
        assert "otel-collector" in scraped()
    elif "build" not in service or service["build"]["target"] == "trainer":
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


@pytest.mark.parametrize("name", ["prometheus", "grafana", "otel-collector"])
def test_images_of_others_are_named_by_version(name: str) -> None:
    repository, _, tag = expand(services()[name]["image"], {}).rpartition(":")
    assert repository
    assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag), tag


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
        words = shlex.split(expand(service["command"], {}))
    assert CliRunner().invoke(app, words).exit_code == 0
    ((config, *sampler),) = started
    assert config.run.name in known["RUN_FILE"]
    assert sampler == (["box"] if name.startswith("sampler") else [0])


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "secrets"
    make_secrets(directory, "queue:6379")
    first = {path.name: path.read_text().strip() for path in directory.iterdir()}
    assert first.keys() == {"queue-password", "queue-url", "token", "grafana-password"}
    assert first["queue-url"] == f"redis://:{first['queue-password']}@queue:6379/0"
    made = [first[name] for name in ("token", "queue-password", "grafana-password")]
    assert [len(secret) for secret in made] == [48] * 3
    assert len(set(made)) == 3
    assert all(path.stat().st_mode & 0o777 == 0o400 for path in directory.iterdir())
    make_secrets(directory, "elsewhere:6380")
    second = {path.name: path.read_text().strip() for path in directory.iterdir()}
    assert second["token"] == first["token"]
    assert second["grafana-password"] == first["grafana-password"]
    assert second["queue-url"] == f"redis://:{first['queue-password']}@elsewhere:6380/0"


# What is watched, and how.


def scraped() -> dict[str, tuple[list[str], int, str | None]]:
    """Jobs of prometheus.yml: DNS names, port, file of the token."""
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    found = {}
    for job in config["scrape_configs"]:
        (discovery,) = job["dns_sd_configs"]
        token = job.get("authorization", {}).get("credentials_file")
        found[job["job_name"]] = (discovery["names"], discovery["port"], token)
    return found


def test_prometheus_scrapes_every_process_that_has_figures() -> None:
    scraped_names = {name for names, _, _ in scraped().values() for name in names}
    running = {name for name, service in services().items() if "restart" in service}
    without = {"queue", "report", "report-gpu", "prometheus", "grafana"}
    assert scraped_names == running - without
    assert {name: len(names) for name, (names, _, _) in scraped().items()} == {
        "teacher": 2, "trainer": 2, "sampler": 2, "exporter": 1, "otel-collector": 1,
    }  # fmt: skip


@pytest.mark.parametrize("job", ["teacher", "trainer", "sampler"])
def test_processes_show_their_figures_where_prometheus_looks_and_to_nobody_without_the_token(
    job: str,
) -> None:
    names, port, token = scraped()[job]
    for name in names:
        command = services()[name]["command"]
        command = command if isinstance(command, str) else command[0]
        assert f"--metrics-port {port} " in command, name
        assert "metrics-host 0.0.0.0" in command or "service.metrics_host=0.0.0.0" in command, name
        assert f"token-file {token}" in command, name
        assert f"{port}" not in str(services()[name].get("ports", "")), "for the stack's own network alone"
        assert "secrets:/run/tutelage:ro" in services()[name]["volumes"]


def test_the_exporter_answers_where_prometheus_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("services.exporter.process.main", started.append)
    service, (_, port, token) = services()["exporter"], scraped()["exporter"]
    environment = {"TUTELAGE_QUEUE_URL": "redis://queue", "TUTELAGE_TOKEN": ""}
    ran = CliRunner().invoke(app, service["command"], env=environment)
    assert ran.exit_code == 0, ran.output
    (settings,) = started
    assert (settings.host, settings.port, str(settings.token_file)) == ("0.0.0.0", port, token)
    assert service["healthcheck"]["test"][-1] == f"http://127.0.0.1:{port}/health"
    assert "ports" not in service


def test_grafana_is_for_this_machine_and_its_admin_has_a_password_of_this_stack() -> None:
    service = services()["grafana"]
    environment = service["environment"]
    assert [port for port in service["ports"] if not port.startswith("127.0.0.1:")] == []
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/tutelage/grafana-password"
    assert not [name for name in environment if "PASSWORD" in name and not name.endswith("__FILE")]


def test_the_collector_has_what_its_configuration_asks_the_environment_for() -> None:
    text = (ROOT / "deploy/otel/collector.yaml").read_text()
    config = yaml.safe_load(text)
    environment = {
        name: expand(value, {}) for name, value in services()["otel-collector"]["environment"].items()
    }
    assert set(re.findall(r"\$\{env:(\w+)\}", text)) == set(environment)
    assert set(yaml.safe_load(environment["TRACES_TO"])) <= set(config["exporters"])
    assert config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")
    reader = config["service"]["telemetry"]["metrics"]["readers"][0]["pull"]["exporter"]["prometheus"]
    assert reader["port"] == scraped()["otel-collector"][1]
    directory = Path(config["exporters"]["file"]["path"]).parent
    (volume,) = [v for v in services()["otel-collector"]["volumes"] if isinstance(v, dict)]
    assert volume["target"] == str(directory)


def test_the_guide_names_services_and_profiles_that_exist() -> None:
    guide = (ROOT / "docs/monitoring.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"docker compose [^`\n]+", guide)]
    profiles = {profile for service in services().values() for profile in service["profiles"]}
    assert commands
    for words in commands:
        named = [word for option, word in pairwise(words) if option == "--profile"]
        assert set(named) <= profiles, words
        scaled = [word for option, word in pairwise(words) if option == "--scale"]
        asked = [word for verb, word in pairwise(words) if verb in {"exec", "logs"}]
        assert {word.partition("=")[0] for word in [*scaled, *asked]} <= set(services()), words


def test_traces_are_switched_on_for_every_process_of_ours_at_once() -> None:
    for name, service in services().items():
        ours = service["image"].startswith("tutelage-") and name != "queue" and "network_mode" not in service
        told = {key for key in service.get("environment", {}) if key.startswith("OTEL_")}
        expected = {
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "OTEL_EXPORTER_OTLP_HEADERS",
            "OTEL_TRACES_SAMPLER",
            "OTEL_TRACES_SAMPLER_ARG",
        }
        assert told == (expected if ours else set()), name


def test_volumes_that_others_images_write_to_belong_to_the_user_they_run_as() -> None:
    prepared = {mount.partition(":")[0] for mount in services()["observability-volumes"]["volumes"]}
    for name in ("prometheus", "grafana", "otel-collector"):
        service = services()[name]
        (volume,) = [mount for mount in service["volumes"] if isinstance(mount, dict)]
        assert volume["source"] in prepared
        # or the engine would make the volume as the image has it, which runs as another user
        assert volume["volume"] == {"nocopy": True}
        assert service["depends_on"]["observability-volumes"] == {
            "condition": "service_completed_successfully"
        }
    owned = re.findall(r"install -d -o tutelage -g tutelage (.*?)$", dockerfile(), re.M)[0].split()
    for mount in services()["observability-volumes"]["volumes"]:
        assert mount.partition(":")[2] in owned
