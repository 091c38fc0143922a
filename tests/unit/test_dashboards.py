"""Dashboards and alerts: generated, well formed, explained. What their queries find is another test."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.dashboards import DASHBOARDS, ROOT, alerts, every_expression, load, metrics, panels, recorded
from support.prometheus import promtool

GRAFANA = ROOT / "deploy/grafana"
GUIDE = (ROOT / "docs/monitoring.md").read_text()
VLLM_METRICS = re.compile(r"_(counter|gauge|histogram)_cls\(\s*name=\"(vllm:\w+)\"")


def test_the_dashboards_are_what_their_code_writes() -> None:
    code = "import dashboards, json; print(json.dumps(list(dashboards.files())))"
    made = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=GRAFANA, timeout=60
    )
    files = dict(json.loads(made.stdout))
    kept = {path.name: path.read_text() for path in DASHBOARDS}
    assert files.keys() == kept.keys()
    for name, text in files.items():
        assert text == kept[name], f"{name} is stale; run: python deploy/grafana/dashboards.py"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_what_grafana_needs(path: Path) -> None:
    board = load(path)
    assert board["uid"] == f"tutelage-{path.stem}"
    assert board["schemaVersion"] >= 39
    assert board["title"]
    assert board["tags"] == ["tutelage"]
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names[0] == "datasource"
    assert len(set(names)) == len(names)
    used = set(re.findall(r"\$\{?(\w+)\}?", re.sub(r"\$__\w+", "", path.read_text())))
    assert used <= set(names), used - set(names)
    (annotation,) = board["annotations"]["list"]
    assert "ALERTS" in annotation["expr"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows_and_in_which_unit(path: Path) -> None:
    for panel in panels(path):
        assert panel["title"], panel["id"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters)) != [], panel["title"]
        for target in panel["targets"]:
            assert target["legendFormat"], panel["title"]
            assert target["datasource"] == panel["datasource"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_places_of_their_own(path: Path) -> None:
    board = load(path)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]


def test_titles_are_not_used_twice_in_a_dashboard() -> None:
    for path in DASHBOARDS:
        rows = load(path)["panels"]
        graphs = [panel["title"] for panel in rows if panel["type"] == "timeseries"]
        assert len(set(graphs)) == len(graphs), path.name


def test_grafana_finds_its_data_and_its_dashboards() -> None:
    sources = provisioned("datasources/prometheus.yaml")["datasources"]
    (provider,) = provisioned("dashboards/tutelage.yaml")["providers"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert [source["url"] for source in sources] == ["http://prometheus:9090"]
    assert "prometheus" in compose
    interval = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"][
        "scrape_interval"
    ]
    assert sources[0]["jsonData"]["timeInterval"] == interval
    mounts = compose["grafana"]["volumes"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in mounts
    assert "./deploy/grafana/provisioning:/etc/grafana/provisioning:ro" in mounts
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (GRAFANA / "dashboards" / Path(home).name).is_file()


def provisioned(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((GRAFANA / "provisioning" / name).read_text())
    assert document["apiVersion"] == 1
    return document


def test_every_recording_rule_is_used() -> None:
    everything = every_expression()
    read = {metric for name, expr in everything.items() for metric in metrics(expr)}
    assert set(recorded()) <= read


@pytest.mark.parametrize("name", sorted(alerts()))
def test_an_alert_says_what_it_means_and_what_to_do(name: str) -> None:
    rule = alerts()[name]
    assert name.startswith("Tutelage")
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    assert not notes["summary"].endswith(".")
    assert notes["description"].endswith(".")
    assert notes["runbook"] == f"docs/monitoring.md#{name.lower()}"
    assert re.search(rf"^### {name}$", GUIDE, re.M), "no paragraph in docs/monitoring.md"


def test_every_alert_of_the_guide_exists() -> None:
    assert set(re.findall(r"^### (Tutelage\w+)$", GUIDE, re.M)) == set(alerts())


def test_every_alert_is_seen_firing_and_not_firing() -> None:
    cases = yaml.safe_load((ROOT / "deploy/prometheus/alerts_test.yml").read_text())["tests"]
    expected = [test for case in cases for test in case.get("alert_rule_test", [])]
    fires = {test["alertname"] for test in expected if test["exp_alerts"]}
    quiet = {test["alertname"] for test in expected if not test["exp_alerts"]}
    assert fires == set(alerts())
    assert quiet == set(alerts())


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "--syntax-only", "prometheus.yml"],
        ["check", "rules", "rules.yml", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_is_content(arguments: list[str]) -> None:
    ran = promtool(*arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_what_is_shown_of_vllm_is_what_vllm_exports() -> None:
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    source = "".join(path.read_text() for path in Path(vllm.origin).parent.glob("v1/metrics/*.py"))
    exported: set[str] = set()
    for kind, name in VLLM_METRICS.findall(source):
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[kind]
        exported |= {name + ending for ending in endings}
    shown = {m for expr in every_expression().values() for m in metrics(expr) if m.startswith("vllm:")}
    assert shown
    assert shown <= exported, shown - exported
