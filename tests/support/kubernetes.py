"""deploy/kubernetes as objects: rendered by kustomize, or as it was rendered last where there is none.

`PYTHONPATH=tests python -m support.kubernetes` renders everything anew into deploy/kubernetes/rendered.
Each file there says which sources it was made from: a change without rendering is noticed also on a machine
without kubectl.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

from support.custom_resources import SCHEMAS

Object = dict[str, Any]
ROOT = Path(__file__).parents[2] / "deploy/kubernetes"
RENDERED = ROOT / "rendered"
TARGETS = {
    "cpu-demo": ROOT / "overlays/cpu-demo",
    "gpu": ROOT / "overlays/gpu",
    "keda": ROOT / "overlays/keda",
    "leader-worker-set": ROOT / "examples/leader-worker-set",
    "torchrun": ROOT / "examples/torchrun",
}
STACKS = ("cpu-demo", "gpu", "keda", "torchrun")  # with everything a run needs
VERSIONS = ("1.35", "1.36", "1.37")  # the last three


def sources() -> str:
    """A digest of everything that kustomize reads."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*")):
        if path.is_file() and RENDERED not in path.parents:
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def kustomize() -> tuple[str, ...] | None:
    """The command that renders a directory; None where there is none, or an old one."""
    for command, version in (
        (("kustomize", "build"), ("kustomize", "version")),
        (("kubectl", "kustomize"), ("kubectl", "version", "--client")),
    ):
        if shutil.which(command[0]) is None:
            continue
        answer = subprocess.run(version, capture_output=True, text=True, timeout=60, check=False).stdout
        if found := re.search(r"(?:Kustomize Version: |^)v(\d+)\.", answer, re.M):
            if command[0] == "kubectl" and "Kustomize Version" not in answer:
                continue
            if int(found[1]) >= 5:
                return command
    return None


@cache
def render(name: str) -> str:
    """The objects of one target as YAML, from its sources."""
    command = kustomize()
    assert command is not None
    done = subprocess.run(
        [*command, str(TARGETS[name])], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def objects(name: str) -> tuple[Object, ...]:
    """The objects of one target."""
    text = render(name) if kustomize() else (RENDERED / f"{name}.yaml").read_text()
    return tuple(document for document in yaml.safe_load_all(text) if document)


def of_kind(target: str, kind: str) -> list[Object]:
    return [thing for thing in objects(target) if thing["kind"] == kind]


def all_pods(target: str) -> list[Pods]:
    """Every pod template of one target."""
    found = list(pods(objects(target)))
    assert found
    return found


def title(thing: Object) -> str:
    return f"{thing['kind']} {thing['metadata']['name']}"


@cache
def _definitions(version: str) -> tuple[Path, Registry[Any]]:
    directory = Path(str(resources.files("kubernetes_validate"))) / "kubernetes-json-schema"
    directory /= f"v{version}.0-local-strict"
    definitions = json.loads((directory / "_definitions.json").read_text())
    return directory, Registry().with_resource(definitions["$id"], Resource.from_contents(definitions))


@cache
def _validator(version: str, api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    directory, registry = _definitions(version)
    schema = SCHEMAS.get((api_version, kind))
    if schema is None:
        group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
        schema = json.loads((directory / f"{kind.lower()}-{group}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def problems(thing: Object, version: str) -> list[str]:
    """What the schema of this Kubernetes version, or of the custom resource, has against an object."""
    validator = _validator(version, thing["apiVersion"], thing["kind"])
    return [
        f"{title(thing)}: {'.'.join(map(str, error.path))}: {error.message}"
        for error in validator.iter_errors(thing)
    ]


@dataclass(frozen=True)
class Pods:
    """A pod template, and the object that makes pods of it."""

    owner: Object
    template: Object

    @property
    def spec(self) -> Object:
        return self.template["spec"]  # type: ignore[no-any-return]

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]  # type: ignore[no-any-return]

    @property
    def containers(self) -> list[Object]:
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    @property
    def title(self) -> str:
        return title(self.owner)


def pods(things: tuple[Object, ...]) -> Iterator[Pods]:
    """Every pod template among objects."""
    for thing in things:
        spec = thing.get("spec", {})
        if "template" in spec:
            yield Pods(thing, spec["template"])
        for name in ("leaderTemplate", "workerTemplate"):
            if name in spec.get("leaderWorkerTemplate", {}):
                yield Pods(thing, spec["leaderWorkerTemplate"][name])


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector (with matchLabels and matchExpressions) selects these labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", "what is not used is not understood"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def allowed(things: tuple[Object, ...], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether the network policies let pods with labels `source` reach `target`, both in the namespace."""
    policies = [thing["spec"] for thing in things if thing["kind"] == "NetworkPolicy"]
    return all(
        _side_allows(policies, kind, here, there, port)
        for kind, here, there in (("Egress", source, target), ("Ingress", target, source))
    )


def _side_allows(
    policies: list[Object], kind: str, here: dict[str, str], there: dict[str, str], port: int
) -> bool:
    applying = [
        policy
        for policy in policies
        if kind in policy["policyTypes"] and selects(policy["podSelector"], here)
    ]
    if not applying:
        return True  # nobody restricts these pods
    peers, rules = ("to", "egress") if kind == "Egress" else ("from", "ingress")
    return any(
        (not rule.get("ports") or any(p["port"] == port for p in rule["ports"]))
        and any(_is_peer(peer, there) for peer in rule.get(peers, []))
        for policy in applying
        for rule in policy.get(rules, [])
    )


def _is_peer(peer: Object, labels: dict[str, str]) -> bool:
    """Whether pods of the same namespace with these labels are meant."""
    if "ipBlock" in peer or peer.get("namespaceSelector"):
        return False  # other namespaces, or the world
    return selects(peer.get("podSelector", {}), labels)


def write_rendered() -> None:
    """Render every target into deploy/kubernetes/rendered."""
    RENDERED.mkdir(exist_ok=True)
    for name, directory in TARGETS.items():
        command = f"kubectl kustomize deploy/kubernetes/{directory.relative_to(ROOT)}"
        header = f"# {command}, by tests/support/kubernetes.py\n# sources: {sources()}\n"
        (RENDERED / f"{name}.yaml").write_text(header + render(name))


if __name__ == "__main__":
    write_rendered()
