"""The committed dashboards and rules, and what stands in their expressions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
RULES = ROOT / "deploy/prometheus"

# A metric's name: ours, vLLM's, Prometheus's own, or a recording rule's.
NAME = re.compile(r"(?<![\w:\"])((?:tutelage|vllm|instance|teacher|run|job)[:_][\w:]+|up|ALERTS)(?![\w:(\"])")
# Grafana's variables, as when somebody has chosen everything.
EVERYTHING = {"$__rate_interval": "30s", "$teacher": ".*", "$run": ".*"}


def load(path: Path) -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads(path.read_text())
    return dashboard


def panels(path: Path) -> list[dict[str, Any]]:
    """Panels with queries, in order."""
    return [panel for panel in load(path)["panels"] if panel["type"] != "row"]


def expressions(path: Path) -> dict[str, str]:
    """Expression of each query, by panel and letter, with variables as Grafana sends them."""
    return {
        f"{path.stem}: {panel['title']} {target['refId']}": filled_in(target["expr"])
        for panel in panels(path)
        for target in panel["targets"]
    }


def filled_in(expr: str) -> str:
    for variable, value in EVERYTHING.items():
        expr = expr.replace(variable, value)
    assert "$" not in expr, expr
    return expr


def rules(name: str, kind: str) -> dict[str, dict[str, Any]]:
    """Rules of rules.yml or alerts.yml by name; `kind` is "record" or "alert"."""
    groups = yaml.safe_load((RULES / name).read_text())["groups"]
    return {rule[kind]: rule for group in groups for rule in group["rules"]}


def alerts() -> dict[str, dict[str, Any]]:
    return rules("alerts.yml", "alert")


def recorded() -> dict[str, dict[str, Any]]:
    return rules("rules.yml", "record")


def metrics(expr: str) -> set[str]:
    """Names of all metrics that an expression reads."""
    return set(NAME.findall(re.sub(r"\(teacher\)|\(run\)|\b(?:by|on|group_left)\s*\([^)]*\)", "", expr)))


def every_expression() -> dict[str, str]:
    """Of every panel, alert and recording rule."""
    found = {name: expr for path in DASHBOARDS for name, expr in expressions(path).items()}
    found |= {f"alert {name}": rule["expr"] for name, rule in alerts().items()}
    return found | {f"rule {name}": rule["expr"] for name, rule in recorded().items()}
