"""The scaling rules as they are deployed, read from deploy/kubernetes/components."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

COMPONENTS = Path(__file__).parents[2] / "deploy" / "kubernetes" / "components"
HPA_FILE = COMPONENTS / "hpa" / "hpa.yaml"
KEDA_FILE = COMPONENTS / "keda" / "scaled-object.yaml"

SUFFIXES = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    """By how much the number of replicas may change within `period` seconds."""

    kind: str  # "Pods" or "Percent"
    value: float
    period: float


@dataclass(frozen=True, slots=True)
class Direction:
    """How one direction of scaling is held back. `window`: seconds of recommendations that are looked at."""

    window: float
    policies: tuple[Policy, ...]
    select: str = "Max"  # "Max", "Min" or "Disabled"


@dataclass(frozen=True, slots=True)
class Target:
    """A metric and how much of it one replica should have in front of it."""

    metric: str
    average: float


@dataclass(frozen=True, slots=True)
class HpaRule:
    """What a HorizontalPodAutoscaler (autoscaling/v2) is told. It looks every `period` seconds."""

    minimum: int
    maximum: int
    targets: tuple[Target, ...]
    up: Direction
    down: Direction
    period: float = 15.0  # --horizontal-pod-autoscaler-sync-period
    tolerance: float = 0.1  # --horizontal-pod-autoscaler-tolerance

    def scaled(self, maximum: int, factors: Mapping[str, float]) -> HpaRule:
        """The same rule for another fleet and metrics in other units: averages times the metric's factor."""
        targets = tuple(replace(t, average=t.average * factors[t.metric]) for t in self.targets)
        return replace(self, maximum=maximum, targets=targets)


@dataclass(frozen=True, slots=True)
class KedaRule:
    """What a ScaledObject is told: an autoscaler from 1 on, and KEDA itself between 0 and 1."""

    hpa: HpaRule
    poll: float  # seconds
    cooldown: float  # seconds without an active trigger before the last replicas go
    activation: Mapping[str, float]  # a trigger is active above this

    def scaled(self, maximum: int, factors: Mapping[str, float]) -> KedaRule:
        return replace(self, hpa=self.hpa.scaled(maximum, factors))


def quantity(text: str | float) -> float:
    """A Kubernetes quantity as a number: "200k" is 200,000."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    if match is None or match[2] not in SUFFIXES:
        raise ValueError(f"quantity: got {text!r}, allowed suffixes are {', '.join(filter(None, SUFFIXES))}")
    return float(match[1]) * SUFFIXES[match[2]]


def read_hpa(path: Path = HPA_FILE) -> HpaRule:
    """The rule of hpa.yaml; its metrics are external ones with an average value each."""
    spec = _document(path, "HorizontalPodAutoscaler")["spec"]
    targets = []
    for metric in spec["metrics"]:
        external = metric["external"]
        if external["target"]["type"] != "AverageValue":
            raise ValueError(f"{path}: target type {external['target']['type']!r}, known is AverageValue")
        targets.append(Target(external["metric"]["name"], quantity(external["target"]["averageValue"])))
    up, down = (_direction(spec["behavior"][name]) for name in ("scaleUp", "scaleDown"))
    return HpaRule(spec["minReplicas"], spec["maxReplicas"], tuple(targets), up, down)


def read_keda(path: Path = KEDA_FILE) -> KedaRule:
    """The rule of scaled-object.yaml; metrics are called by the names of their triggers."""
    spec = _document(path, "ScaledObject")["spec"]
    targets, activation = [], {}
    for trigger in spec["triggers"]:
        given = trigger["metadata"]
        key = "lagCount" if "lagCount" in given else "pendingEntriesCount"
        targets.append(Target(trigger["name"], float(given[key])))
        activation[trigger["name"]] = float(given.get(f"activation{key[0].upper()}{key[1:]}", 0))
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    up, down = (_direction(behaviour[name]) for name in ("scaleUp", "scaleDown"))
    hpa = HpaRule(max(1, spec["minReplicaCount"]), spec["maxReplicaCount"], tuple(targets), up, down)
    return KedaRule(hpa, float(spec["pollingInterval"]), float(spec["cooldownPeriod"]), activation)


def _direction(given: Mapping[str, Any]) -> Direction:
    policies = tuple(
        Policy(p["type"], float(p["value"]), float(p["periodSeconds"])) for p in given["policies"]
    )
    return Direction(float(given["stabilizationWindowSeconds"]), policies, given.get("selectPolicy", "Max"))


def _document(path: Path, kind: str) -> dict[str, Any]:
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        if document["kind"] == kind:
            return document  # type: ignore[no-any-return]
    raise ValueError(f"{path}: there is no {kind}")
