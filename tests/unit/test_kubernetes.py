"""deploy/kubernetes: every overlay renders, every object is valid and safe, and what it names exists."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from support.kubernetes import (
    RENDERED,
    STACKS,
    TARGETS,
    VERSIONS,
    all_pods,
    allowed,
    kustomize,
    objects,
    of_kind,
    problems,
    render,
    selects,
    sources,
    title,
)

SECRET = "tutelage-secrets"

each_target = pytest.mark.parametrize("target", TARGETS)
each_stack = pytest.mark.parametrize("target", STACKS)


# What is written there is what comes out.


@each_target
def test_the_rendered_file_is_made_from_these_sources(target: str) -> None:
    text = (RENDERED / f"{target}.yaml").read_text()
    renew = "run: PYTHONPATH=tests python -m support.kubernetes"
    assert f"# sources: {sources()}" in text.splitlines()[:2], renew
    if kustomize() is not None:
        rendered, kept = (list(yaml.safe_load_all(document)) for document in (render(target), text))
        assert rendered == kept, renew


@each_target
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(target: str, version: str) -> None:
    found = [problem for thing in objects(target) for problem in problems(thing, version)]
    assert not found, "\n".join(found)


BROKEN: dict[str, tuple[str, str, Any]] = {
    "Deployment": ("gpu", "spec.template.spec.containers.0.livenessProbe.periodSecond", 3),
    "Service": ("gpu", "spec.ports.0.port", "many"),
    "HorizontalPodAutoscaler": ("gpu", "spec.metrics.0.external.metric.nam", "x"),
    "ServiceMonitor": ("gpu", "spec.endpoints.0.bearer", "x"),
    "ScaledObject": ("keda", "spec.triggers.0.metadata.lagcount", "5"),
    "LeaderWorkerSet": ("leader-worker-set", "spec.leaderWorkerTemplate.workerTemplate.spec.container", []),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_field_that_does_not_exist_is_noticed(kind: str, version: str) -> None:
    target, path, value = BROKEN[kind]
    thing = yaml.safe_load(yaml.safe_dump(of_kind(target, kind)[0]))
    assert problems(thing, version) == []
    place = thing
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    assert problems(thing, version) != []


# Policy.


@each_target
def test_no_pod_is_root_or_may_become_it(target: str) -> None:
    for pod in all_pods(target):
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True, pod.title
        assert security["runAsUser"] == 10001, pod.title
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.title
        assert pod.spec["automountServiceAccountToken"] is False, pod.title
        assert pod.spec["enableServiceLinks"] is False, pod.title
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(), pod.title
        kinds = {kind for volume in pod.spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}, pod.title
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, (pod.title, container["name"])


@each_target
def test_images_have_versions(target: str) -> None:
    for pod in all_pods(target):
        for container in pod.containers:
            name, _, tag = container["image"].rpartition(":")
            assert name.startswith("tutelage-"), container["image"]
            assert re.fullmatch(r"\d+\.\d+\.\d+", tag), container["image"]


@each_target
def test_every_container_asks_for_resources_and_is_limited(target: str) -> None:
    for pod in all_pods(target):
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), pod.title
            assert "memory" in resources["limits"], pod.title
            gpus = [resources[side].get("nvidia.com/gpu") for side in ("requests", "limits")]
            assert gpus[0] == gpus[1], pod.title
            if gpus[0]:
                assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod.spec[
                    "tolerations"
                ]
        for volume in pod.spec["volumes"]:
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""}), (pod.title, volume["name"])


@each_target
def test_every_container_that_stays_is_probed(target: str) -> None:
    for pod in all_pods(target):
        if pod.title == "Job tutelage-models":
            continue
        for container in pod.spec["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), pod.title
            ports = {port["name"] for port in container.get("ports", [])}
            for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container[name]
                assert probe.get("timeoutSeconds", 1) >= 5, (pod.title, name)
                assert "exec" in probe or probe["httpGet"]["port"] in ports, (pod.title, name)
            if "httpGet" in container["readinessProbe"]:
                assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
                assert container["livenessProbe"]["httpGet"]["path"] == "/health"


@each_target
def test_no_secret_is_written_down(target: str) -> None:
    assert not of_kind(target, "Secret")
    for pod in all_pods(target):
        for container in pod.containers:
            for variable in container.get("env", []):
                if re.search(r"PASSWORD|TOKEN|SECRET|KEY", variable["name"]) and "value" in variable:
                    assert variable["value"].startswith("/run/"), (pod.title, variable)  # the name of a file
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == SECRET
    # A password in an address is always another variable.
    for text in re.findall(r"rediss?://\S*", yaml.safe_dump_all(objects(target))):
        assert re.match(r"rediss?://:\$\(QUEUE_PASSWORD\)@", text), text


@each_stack
def test_the_namespace_is_restricted_and_closed(target: str) -> None:
    (namespace,) = of_kind(target, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in [
        policy["spec"] for policy in of_kind(target, "NetworkPolicy")
    ]
    homeless = [title(thing) for thing in objects(target) if "namespace" not in thing["metadata"]]
    assert homeless == ["Namespace tutelage"]


@each_stack
def test_traffic_flows_where_it_must_and_nowhere_else(target: str) -> None:
    things = objects(target)
    labels = {pod.labels["app.kubernetes.io/component"]: pod.labels for pod in all_pods(target)}
    ranks = {("trainer", "trainer")} if target == "torchrun" else set()
    must = {(member, "queue") for member in ("teacher", "trainer", "sampler", "exporter")}
    for source, source_labels in labels.items():
        for there, target_labels in labels.items():
            for port in (6379, 50051, 8081, 9464, 9465, 9466, 9467, 29500, 22):
                expected = ((source, there) in must and port == 6379) or (source, there) in ranks
                got = allowed(things, source_labels, target_labels, port)
                assert got is expected, (source, there, port)
    caller = {"tutelage/client": "true"}
    policies = of_kind(target, "NetworkPolicy")
    ingress = [policy for policy in policies if "Ingress" in policy["spec"]["policyTypes"]]
    assert not allowed(tuple(ingress), caller, labels["queue"], 6379)
    assert not allowed(tuple(ingress), {}, labels["teacher"], 50051)


@pytest.mark.parametrize("target", ["gpu", "keda", "torchrun", "leader-worker-set"])
def test_whoever_loads_a_model_of_the_hub_may_fetch_it(target: str) -> None:
    policies = [*of_kind(target, "NetworkPolicy"), *of_kind("gpu", "NetworkPolicy")]
    out = [
        policy["spec"]["podSelector"]
        for policy in policies
        for rule in policy["spec"].get("egress", [])
        if {"protocol": "TCP", "port": 443} in rule.get("ports", [])
        and any(peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0" for peer in rule.get("to", []))
    ]
    loaders = [pod for pod in all_pods(target) if any(v["name"] == "cache" for v in pod.spec["volumes"])]
    assert loaders
    for pod in loaders:
        assert any(selects(selector, pod.labels) for selector in out), pod.title


@each_target
def test_what_selects_pods_selects_some(target: str) -> None:
    labels = [pod.labels for pod in all_pods(target)]
    for thing in objects(target):
        spec = thing.get("spec", {})
        selector = {
            "Service": {"matchLabels": spec.get("selector", {})},
            "PodDisruptionBudget": spec.get("selector"),
            "Deployment": spec.get("selector"),
            "StatefulSet": spec.get("selector"),
            "NetworkPolicy": spec.get("podSelector"),
        }.get(thing["kind"])
        if selector is None:
            continue
        assert thing["kind"] == "NetworkPolicy" or selector["matchLabels"], title(thing)
        if (
            title(thing) in ("NetworkPolicy queue-keda", "NetworkPolicy teacher-metrics")
            and target not in STACKS
        ):
            continue
        assert any(selects(selector, some) for some in labels), title(thing)
    for thing in objects(target):
        if thing["kind"] == "ServiceMonitor":
            services = [s["metadata"].get("labels", {}) for s in of_kind(target, "Service")]
            assert sum(selects(thing["spec"]["selector"], some) for some in services) == 1


@each_stack
def test_what_is_named_exists(target: str) -> None:
    names = {(thing["kind"], thing["metadata"]["name"]) for thing in objects(target)}
    for pod in all_pods(target):
        for volume in pod.spec["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
            if "secret" in volume:
                assert volume["secret"]["secretName"] == SECRET
        mounted = {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}
        claims = {claim["metadata"]["name"] for claim in pod.owner["spec"].get("volumeClaimTemplates", [])}
        assert mounted == {volume["name"] for volume in pod.spec["volumes"]} | claims, pod.title
        for container in pod.containers:
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in names
        assert ("ServiceAccount", pod.spec["serviceAccountName"]) in names
    for scaler in [*of_kind(target, "HorizontalPodAutoscaler"), *of_kind(target, "ScaledObject")]:
        reference = scaler["spec"]["scaleTargetRef"]
        assert (reference["kind"], reference["name"]) in names
        (scaled,) = (t for t in objects(target) if title(t) == f"Deployment {reference['name']}")
        assert "replicas" not in scaled["spec"], "kubectl apply would set them back"
    for scaled_object in of_kind(target, "ScaledObject"):
        for trigger in scaled_object["spec"]["triggers"]:
            assert ("TriggerAuthentication", trigger["authenticationRef"]["name"]) in names


SCRAPED = {"teacher": 9464, "exporter": 9465, "trainer": 9466, "sampler": 9467}


@pytest.mark.parametrize("target", [target for target in STACKS if target != "cpu-demo"])
def test_prometheus_reaches_every_process_with_the_token_and_calls_it_by_its_component(target: str) -> None:
    monitors = of_kind(target, "ServiceMonitor")
    found = {}
    for monitor in monitors:
        (service,) = (
            service
            for service in of_kind(target, "Service")
            if selects(monitor["spec"]["selector"], service["metadata"].get("labels", {}))
        )
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["authorization"]["credentials"] == {"name": SECRET, "key": "token"}
        assert endpoint["path"] == "/metrics"
        (port,) = (port for port in service["spec"]["ports"] if port["name"] == endpoint["port"])
        job = service["metadata"]["labels"][monitor["spec"]["jobLabel"]]
        found[job] = port["port"]
        selected = [
            pod
            for pod in all_pods(target)
            if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
        ]
        assert [pod.labels["app.kubernetes.io/component"] for pod in selected] == [job]
        (container,) = selected[0].spec["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports[port["targetPort"]] == port["port"]
        assert from_monitoring(target, selected[0].labels) == {port["port"]}
    assert found == SCRAPED


def from_monitoring(target: str, labels: dict[str, str]) -> set[int]:
    """Ports of pods with these labels that the namespace of Prometheus may reach."""
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    return {
        port["port"]
        for policy in of_kind(target, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], labels)
        for rule in policy["spec"].get("ingress", [])
        if peer in rule["from"]
        for port in rule["ports"]
    }


def test_prometheus_of_the_compose_file_knows_the_same_jobs_and_ports() -> None:
    configuration = yaml.safe_load((RENDERED.parents[1] / "prometheus/prometheus.yml").read_text())
    ports = {
        job["job_name"]: job["dns_sd_configs"][0]["port"]
        for job in configuration["scrape_configs"]
        if job["job_name"] in SCRAPED
    }
    assert ports == SCRAPED
