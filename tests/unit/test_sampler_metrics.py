"""What a sampler's /metrics shows is what it has counted, by the agreed names."""

from __future__ import annotations

import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.metrics_server import MetricsServer
from services.queue import Submitted
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.config_errors import RunFileError
from student_trainer.sampler.metrics import Counters, FullQueue, SamplerCollector, metrics_port
from student_trainer.sections import MetricsSettings

Shown = dict[tuple[str, str], float]


def shown(text: str) -> Shown:
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def collected(counters: Counters) -> Shown:
    registry = CollectorRegistry()
    registry.register(SamplerCollector(counters, "run"))
    return shown(generate_latest(registry).decode())


def test_every_figure_has_its_name() -> None:
    counters = Counters(
        sample_seconds=1.5, order_wait_seconds=2.5, policy_wait_seconds=3.5, full_wait_seconds=4.5
    )
    counters.policy_version = 6
    for answer in (Submitted.QUEUED, Submitted.QUEUED, Submitted.EXISTS, Submitted.LOST, Submitted.FULL):
        counters.count(answer, tokens=10)
    assert collected(counters) == {
        ("tutelage_sampler_info", "run"): 1.0,
        ("tutelage_sampler_tokens_total", ""): 20.0,
        ("tutelage_sampler_groups_total", "queued"): 2.0,
        ("tutelage_sampler_groups_total", "exists"): 1.0,
        ("tutelage_sampler_groups_total", "lost"): 1.0,
        ("tutelage_sampler_sampling_seconds_total", ""): 1.5,
        ("tutelage_sampler_waiting_seconds_total", "orders"): 2.5,
        ("tutelage_sampler_waiting_seconds_total", "policy"): 3.5,
        ("tutelage_sampler_waiting_seconds_total", "queue_full"): 4.5,
        ("tutelage_sampler_policy_version", ""): 6.0,
    }


def test_groups_that_wait_together_count_their_time_once() -> None:
    counters = Counters()
    full = FullQueue(counters)
    started = time.perf_counter()
    with full:
        with full:
            time.sleep(0.05)
        time.sleep(0.05)
    assert 0.1 <= counters.full_wait_seconds <= time.perf_counter() - started


def test_a_sampler_listens_nowhere_unless_told_to() -> None:
    with metrics_port(MetricsSettings(), Counters(), "run") as nothing:
        assert nothing is None
    with metrics_port(MetricsSettings(sampler_port=0), Counters(tokens=3), "run") as server:
        assert isinstance(server, MetricsServer)
        text = urllib.request.urlopen(server.address + "/metrics").read().decode()
    assert shown(text)["tutelage_sampler_tokens_total", ""] == 3.0


def run(**metrics: object) -> RunConfig:
    return parse_run_config(
        {
            "teachers": {"big": {"engine": "fake"}},
            "student": {"model": "student"},
            "data": {"task": "addition"},
            "objective": {"preset": "thinking-machines"},
            "training": {"steps": 1},
            "sampling": {"replicas": 2},
            "metrics": metrics,
        }
    )


def test_several_samplers_of_one_run_file_cannot_share_a_port() -> None:
    assert run(sampler_port=0).metrics.sampler_port == 0
    with pytest.raises(RunFileError, match=r"sampling\.replicas = 2"):
        run(sampler_port=9466)
