"""A real Prometheus with the committed configuration beside a real run: every panel shows something."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from support.dashboards import DASHBOARDS, ROOT, alerts, expressions, metrics, recorded
from support.prometheus import Prometheus, binary
from support.watched_run import WatchedRun
from tutelage_client import TeacherClient, TutelageError, codec

# What Prometheus and a scrape add, and what is a histogram's own.
NOT_OURS = {"__name__", "job", "instance", "le"}
PATIENCE_SECONDS = 60.0
pytestmark = pytest.mark.timeout(300)  # five processes load their libraries first, maybe on a busy machine


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedRun]:
    binary("prometheus")
    with WatchedRun(tmp_path_factory.mktemp("watched")) as run:
        yield run


@pytest.fixture(scope="module")
def prometheus(watched: WatchedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scraping while the run trains and somebody calls the teacher directly, with mistakes."""
    directory = tmp_path_factory.mktemp("prometheus") / "server"
    with Prometheus(directory, watched.targets, watched.token_file) as server:
        eventually(watched, lambda: call_directly(watched), lambda: missing(server))
        yield server


def eventually(run: WatchedRun, act: Callable[[], None], left: Callable[[], list[str]]) -> None:
    """Act until nothing is left, or for a while; what is left then, a test says."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        run.check()
        act()
        if not left():
            return
        time.sleep(1.0)


def call_directly(run: WatchedRun) -> None:
    """By gRPC and HTTP: one that is answered, one sequence of which is bad, one that is refused."""
    good, bad = np.array([3, 4], np.int32), np.array([3, 10**6], np.int32)
    with TeacherClient(run.teacher_addresses["grpc"], token=run.token) as client:
        client.score([good], [good, bad])
        with suppress(TutelageError):
            client.score([good], [good], teacher="somebody else")
        list(client.score_stream([codec.build_request([good], [good])]))
    httpx.post(f"{run.teacher_addresses['http']}/v1/score", json={}, headers=authorization(run.token))


def authorization(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def missing(server: Prometheus, *, vllm: bool = False) -> list[str]:
    """Queries of panels that show nothing: of those about vLLM, or of all others."""
    return [
        name
        for path in DASHBOARDS
        for name, expr in expressions(path).items()
        if ("vllm:" in expr) is vllm and not server.query(expr)
    ]


def exported(server: Prometheus) -> dict[str, set[str]]:
    """Names of our metrics that were scraped, and their labels; a histogram has one name."""
    found: dict[str, set[str]] = {}
    for series in server.ask("series", **{"match[]": '{__name__=~"tutelage_.*"}'}):
        name = re.sub("_(bucket|sum|count)$", "", series["__name__"])
        found.setdefault(name, set()).update(set(series) - NOT_OURS)
    return found


def test_every_target_of_the_run_is_up_and_wants_the_token(
    prometheus: Prometheus, watched: WatchedRun
) -> None:
    up = {series["metric"]["job"]: series["value"][1] for series in prometheus.query("up")}
    assert up == dict.fromkeys(("teacher", "exporter", "trainer", "sampler"), "1")
    for job, (target,) in watched.targets.items():
        assert httpx.get(f"http://{target}/metrics").status_code == 401, job
        assert httpx.get(f"http://{target}/metrics", headers=authorization("wrong")).status_code == 401, job


def test_every_panel_shows_something(prometheus: Prometheus) -> None:
    assert missing(prometheus) == []


@pytest.mark.parametrize("name", sorted(alerts() | recorded()))
def test_every_rule_reads_metrics_that_exist(name: str, prometheus: Prometheus) -> None:
    expr = (alerts() | recorded())[name]["expr"]
    prometheus.query(expr)
    assert metrics(expr)
    for metric in metrics(expr):
        assert prometheus.query(metric), f"{metric} is nowhere"
    for metric, matchers in re.findall(r"([\w:]+)\{([^}]*)\}", expr):
        for label in re.findall(r"(\w+)\s*[!=]=?~?\"", matchers):
            assert prometheus.query(f'{metric}{{{label}!=""}}'), f"{metric} has no label {label}"


def test_every_rule_is_evaluated_and_a_healthy_run_raises_no_alarm(prometheus: Prometheus) -> None:
    groups = prometheus.ask("rules")["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(rules) == set(alerts()) | set(recorded())
    assert {rule["name"]: rule.get("lastError") for rule in rules.values() if rule["health"] != "ok"} == {}
    assert prometheus.query('ALERTS{alertstate="firing"}') == []


def test_the_guide_names_every_metric_and_label_and_no_other(prometheus: Prometheus) -> None:
    guide = (ROOT / "docs/monitoring.md").read_text()
    rows = re.findall(r"^\| `(tutelage_\w+)` \|([\w, ]*)\|", guide, re.MULTILINE)
    documented = {name: set(re.findall(r"\w+", labels)) for name, labels in rows}
    assert len(documented) == len(rows)
    assert documented == exported(prometheus)


@pytest.mark.long
def test_panels_of_vllm_show_something_where_it_is_the_engine(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    with (
        WatchedRun(tmp_path, engine="vllm") as run,
        Prometheus(tmp_path / "prometheus", run.targets, run.token_file) as server,
    ):
        eventually(run, lambda: None, lambda: missing(server, vllm=True))
        assert missing(server, vllm=True) == []


def test_the_guides_rules_for_kubernetes_are_those_of_the_files() -> None:
    """The shell lines of docs/monitoring.md, with kubectl left out."""
    guide = (ROOT / "docs/monitoring.md").read_text()
    (loop,) = re.findall(r"^(for file in rules alerts.*?done) \| kubectl", guide, re.MULTILINE | re.DOTALL)
    made = subprocess.run(["sh", "-c", loop], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    documents = [document for document in yaml.safe_load_all(made) if document]
    assert [document["kind"] for document in documents] == ["PrometheusRule"] * 2
    groups = [group for document in documents for group in document["spec"]["groups"]]
    names = {rule.get("alert") or rule["record"] for group in groups for rule in group["rules"]}
    assert names == set(alerts()) | set(recorded())
