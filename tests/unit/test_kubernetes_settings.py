"""deploy/kubernetes: processes start with what their pods give them, scalers ask for what the queue tells."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kubernetes import STACKS, TARGETS, Object, Pods, all_pods, objects, of_kind, pods, selects, title
from typer.testing import CliRunner

from launcher.cli import app
from services.exporter.families import QueueCollector
from services.exporter.process import ExporterSettings
from services.queue import Overview, ServerStats, StreamStats, TeacherStats
from services.queue.keys import Keys
from services.teacher.settings import TeacherSettings
from student_trainer.config import RunConfig, load_run_config
from student_trainer.sections import TrainingSettings

ROOT = Path(__file__).parents[2]
STATS = TeacherStats(
    jobs=StreamStats(1, 1, 0, 0, 1.0),
    queued_tokens=1,
    waiting_tokens=1,
    in_flight_tokens=0,
    scored=0,
    dead=0,
    expired=0,
)
OVERVIEW = Overview(ServerStats(1, 0, 1), {"teacher": STATS}, {}, {"teacher": 1}, {}, {})
QUEUE_METRICS = {  # what the exporter tells of a teacher
    sample.name
    for family in QueueCollector(lambda: OVERVIEW).collect()
    for sample in family.samples
    if "teacher" in sample.labels
}

each_target = pytest.mark.parametrize("target", TARGETS)
each_stack = pytest.mark.parametrize("target", STACKS)


def expand(words: list[str], known: dict[str, str], pattern: str = r"\$\((\w+)\)") -> list[str]:
    """`words` with their variables replaced, as the kubelet (or, with another pattern, a shell) does it."""
    return [re.sub(pattern, lambda name: known[name[1]], word) for word in words]


def environment(target: str, container: Object) -> dict[str, str]:
    """Variables of a container whose values are known before it runs."""
    maps = {thing["metadata"]["name"]: thing["data"] for thing in of_kind(target, "ConfigMap")}
    known = {"POD_NAME": "some-pod-0"}
    for source in container.get("envFrom", []):
        known |= maps[source["configMapRef"]["name"]]
    for variable in container.get("env", []):
        if "value" in variable:
            known[variable["name"]] = variable["value"].replace("$(QUEUE_PASSWORD)", "pw")
    return known


def teachers(target: str) -> list[tuple[Pods, TeacherSettings]]:
    """Every teacher, and the settings that its replicas start with."""
    started: list[TeacherSettings] = []
    found = [pod for pod in all_pods(target) if pod.labels["app.kubernetes.io/component"] == "teacher"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.teacher.process.main", started.append)
        for pod in found:
            (container,) = pod.spec["containers"]
            known = environment(target, container)
            if "command" in container:  # a script that ends in the replica
                words = shlex.split(container["args"][0].rpartition("exec tutelage ")[2])
                words = expand(words, known, r"\$(\w+)")
            else:
                words = expand(container["args"], known)
            ran = CliRunner().invoke(app, words, env={**known, "TUTELAGE_TOKEN": ""})
            assert ran.exit_code == 0, ran.output
    assert len(started) == len(found) > 0
    return list(zip(found, started, strict=True))


@each_target
def test_teachers_start_with_what_they_are_given(target: str) -> None:
    for pod, settings in teachers(target):
        (container,) = pod.spec["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        service = settings.service
        assert ports["metrics"] == service.metrics_port
        assert (ports["grpc"], ports["http"]) == (service.grpc_port, service.http_port)
        assert service.host == service.metrics_host == "0.0.0.0"
        assert str(service.token_file) == "/run/tutelage/token"
        assert settings.queue_url == "redis://:pw@tutelage-queue:6379/0"
        assert settings.consumer == "some-pod-0"


@each_target
def test_the_grace_period_covers_the_drain(target: str) -> None:
    for pod, settings in teachers(target):
        (container,) = pod.spec["containers"]
        before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod.spec["terminationGracePeriodSeconds"] >= before + settings.grace_seconds + 10.0


def run_file(target: str, tmp_path: Path) -> RunConfig:
    """The run of a stack, as its trainer would read it."""
    (trainer,) = (pod for pod in all_pods(target) if pod.title == "Job tutelage-trainer")
    path = environment(target, trainer.spec["containers"][0])["RUN_FILE"]
    if path.startswith("/app/recipes/"):
        return load_run_config(ROOT / "recipes" / Path(path).name)
    (mounted,) = (v["configMap"]["name"] for v in trainer.spec["volumes"] if "configMap" in v)
    (content,) = (t["data"] for t in of_kind(target, "ConfigMap") if t["metadata"]["name"] == mounted)
    file = tmp_path / "run.toml"
    file.write_text(content[Path(path).name])
    return load_run_config(file)


@each_stack
def test_the_run_finds_its_teachers(target: str, tmp_path: Path) -> None:
    config = run_file(target, tmp_path)
    served = {settings.name: settings for _, settings in teachers(target)}
    assert config.teachers.keys() <= served.keys()
    assert config.run.directory.parts[0] == "runs"
    for name, entry in config.teachers.items():
        assert served[name].heartbeat_seconds == config.queue.heartbeat_seconds
        assert served[name].namespace == config.queue.namespace
        assert (served[name].model, served[name].dtype) == (entry.model, entry.dtype)


@each_stack
def test_trainer_and_sampler_start_with_what_they_are_given(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("student_trainer.train.main", lambda *arguments: started.append(arguments))
    monkeypatch.setattr("student_trainer.sampler.process.main", lambda *arguments: started.append(arguments))
    run_file(target, tmp_path)
    for pod in all_pods(target):
        if pod.labels["app.kubernetes.io/component"] not in ("trainer", "sampler"):
            continue
        (container,) = pod.spec["containers"]
        known = environment(target, container)
        words = expand(container["args"], known)
        local = tmp_path / "run.toml"
        if not local.exists():
            local.write_text((ROOT / "recipes" / Path(known["RUN_FILE"]).name).read_text())
        words = [str(local) if word == known["RUN_FILE"] else word for word in words]
        ran = CliRunner().invoke(app, words, env={"TUTELAGE_QUEUE_URL": known["TUTELAGE_QUEUE_URL"]})
        assert ran.exit_code == 0, ran.output
        if pod.labels["app.kubernetes.io/component"] == "trainer":
            config, unfinished = started[-1]
            assert unfinished not in (0, 2), "a drained pod would complete, or fail, the Job"
            metrics = config.metrics
            port = metrics.trainer_port
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                # Of several pods one has the port, and each can ask the queue.
                asked = (
                    'launcher.health "$RUN_FILE" --trainer'
                    if target == "torchrun"
                    else (f"http://127.0.0.1:{port}/health")
                )
                assert container[probe]["exec"]["command"][-1].endswith(asked)
        else:
            config, name = started[-1]
            assert name == "some-pod-0"
            metrics = config.metrics
            port = metrics.sampler_port
        assert {"name": "metrics", "containerPort": port} in container["ports"]
        assert (metrics.host, str(metrics.token_file)) == ("0.0.0.0", "/run/tutelage/token")
        assert mounted_files(pod)["/run/tutelage/token"] == "token"
    assert len(started) == 2


def mounted_files(pod: Pods) -> dict[str, str]:
    """Files of secrets that a pod's first container sees, and the key of the secret that each holds."""
    where = {mount["name"]: mount["mountPath"] for mount in pod.spec["containers"][0]["volumeMounts"]}
    return {
        f"{where[volume['name']]}/{item['path']}": item["key"]
        for volume in pod.spec["volumes"]
        for item in volume.get("secret", {}).get("items", [])
    }


@pytest.mark.parametrize("target", ["gpu", "keda", "torchrun"])
def test_the_exporter_starts_with_what_it_is_given(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ExporterSettings] = []
    monkeypatch.setattr("services.exporter.process.main", started.append)
    (pod,) = (pod for pod in all_pods(target) if pod.title == "Deployment tutelage-exporter")
    (container,) = pod.spec["containers"]
    known = environment(target, container)
    ran = CliRunner().invoke(app, container["args"], env={**known, "TUTELAGE_TOKEN": ""})
    assert ran.exit_code == 0, ran.output
    (settings,) = started
    assert container["ports"] == [{"name": "metrics", "containerPort": settings.port}]
    assert settings.host == "0.0.0.0"
    assert str(settings.token_file) in mounted_files(pod)
    assert settings.queue_url == "redis://:pw@tutelage-queue:6379/0"
    for _, teacher in teachers(target):
        assert settings.heartbeat_seconds == teacher.heartbeat_seconds
        assert settings.namespace == teacher.namespace


def test_autoscalers_ask_for_what_the_queue_tells() -> None:
    (hpa,) = of_kind("gpu", "HorizontalPodAutoscaler")
    served = {settings.name for _, settings in teachers("gpu")}
    metrics = [metric["external"]["metric"] for metric in hpa["spec"]["metrics"]]
    assert {metric["name"] for metric in metrics} <= QUEUE_METRICS
    assert {metric["selector"]["matchLabels"]["teacher"] for metric in metrics} == served
    adapter = yaml.safe_load((ROOT / "deploy/kubernetes/components/hpa/adapter.yaml").read_text())
    (rule,) = adapter["rules"]["external"]
    pattern = re.search(r'__name__=~"(\S+?)"', rule["seriesQuery"])
    assert pattern is not None
    assert {name for name in QUEUE_METRICS if re.fullmatch(pattern[1], name)} >= {m["name"] for m in metrics}


def test_keda_asks_for_lag_and_pending_of_the_teachers_own_stream() -> None:
    (scaled,) = of_kind("keda", "ScaledObject")
    ((_, settings),) = teachers("keda")
    keys = Keys(settings.namespace).jobs(settings.name)
    lag, pending = (trigger["metadata"] for trigger in scaled["spec"]["triggers"])
    for metadata in (lag, pending):
        assert (metadata["stream"], metadata["consumerGroup"]) == (keys.stream, keys.group)
    assert "lagCount" in lag
    assert lag["activationLagCount"] == "0", "one job that waits has to wake a replica"
    assert "pendingEntriesCount" in pending
    assert scaled["spec"]["minReplicaCount"] == 0
    service, namespace, *_ = lag["address"].split(":")[0].split(".")
    (queue,) = (t for t in of_kind("keda", "Service") if t["metadata"]["name"] == "tutelage-queue")
    assert (service, namespace) == (queue["metadata"]["name"], queue["metadata"]["namespace"])


def test_the_queue_keeps_what_it_promises() -> None:
    lines = (ROOT / "deploy/docker/queue.conf").read_text().splitlines()
    assert {"appendonly yes", "maxmemory-policy noeviction"} <= set(lines)
    for target in STACKS:
        (queue,) = of_kind(target, "StatefulSet")
        assert queue["spec"]["replicas"] == 1
        assert queue["spec"]["volumeClaimTemplates"]
        (container,) = queue["spec"]["template"]["spec"]["containers"]
        given = {entry["name"]: entry.get("value") for entry in container["env"]}
        limit, memory = given["QUEUE_MAXMEMORY"], container["resources"]["limits"]["memory"]
        kept = TrainingSettings.model_fields["max_unacknowledged_bytes"].default
        most = int(limit.removesuffix("mb")) * 2**20
        assert kept < most < 0.75 * int(memory.removesuffix("Gi")) * 2**30, "room to rewrite the file"


def test_the_trainer_is_one_and_a_mistake_in_the_run_file_ends_its_job() -> None:
    for target in STACKS:
        (trainer,) = (t for t in of_kind(target, "Job") if t["metadata"]["name"] == "tutelage-trainer")
        spec = trainer["spec"]
        assert spec["podReplacementPolicy"] == "Failed", "two trainers of one run at a time"
        nodes = 2 if target == "torchrun" else 1
        assert spec.get("parallelism", 1) == spec.get("completions", 1) == nodes
        codes = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
        assert codes == [{"containerName": "trainer", "operator": "In", "values": [2]}]


def test_torchrun_finds_all_of_its_nodes() -> None:
    (job,) = of_kind("torchrun", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options, module = torchrun_parser(container["command"])
    assert module == ["-m", "launcher"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert int(options["--nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    host, port = options["--rdzv-endpoint"].split(":")
    (service,) = (t for t in of_kind("torchrun", "Service") if t["metadata"]["name"] == pod["subdomain"])
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}", "the first pod of an indexed Job"
    assert service["spec"]["clusterIP"] == "None"
    assert int(port) in [p["containerPort"] for p in container["ports"]]
    # Ranks follow the order of the nodes' names, and Prometheus asks rank 0.
    names = [options["--local-addr"].replace("$(JOB_COMPLETION_INDEX)", str(index)) for index in range(12)]
    assert min(names) == names[0] == host
    assert any(variable["name"] == "JOB_COMPLETION_INDEX" for variable in container["env"])
    (monitor,) = (
        t for t in of_kind("torchrun", "ServiceMonitor") if t["metadata"]["name"] == "tutelage-trainer"
    )
    (relabeling,) = monitor["spec"]["endpoints"][0]["relabelings"]
    assert (relabeling["action"], relabeling["regex"]) == ("keep", "0")
    assert int(options["--shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]
    (claim,) = of_kind("torchrun", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def torchrun_parser(command: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options of a torchrun command as torchrun itself understands them, and what it starts."""
    from torch.distributed.run import get_args_parser

    assert command[0] == "torchrun"
    split = command.index("-m")
    parsed, unknown = get_args_parser().parse_known_args([*command[1:], "train"])
    assert not unknown
    assert parsed.module
    return dict(option.split("=", 1) for option in command[1:split]), command[split:]


def test_several_teachers_live_side_by_side() -> None:
    """Two instances of the base share nothing that has to be their own."""
    one, other = objects("cpu-demo"), objects("gpu")
    theirs = []
    for things in (one, other):
        mine = [t for t in things if "tutelage/teacher" in t["metadata"].get("labels", {})]
        theirs.append(mine)
        assert {t["kind"] for t in mine} >= {"Deployment", "Service", "PodDisruptionBudget"}
    names = [{(t["kind"], t["metadata"]["name"]) for t in mine} for mine in theirs]
    assert not names[0] & names[1]
    labels = [next(pods(tuple(mine))).labels for mine in theirs]
    for mine, stranger in zip(theirs, reversed(labels), strict=True):
        for thing in mine:
            if thing["kind"] == "Service":
                assert not selects({"matchLabels": thing["spec"]["selector"]}, stranger), title(thing)
            if thing["kind"] in ("Deployment", "PodDisruptionBudget"):
                assert not selects(thing["spec"]["selector"], stranger), title(thing)
