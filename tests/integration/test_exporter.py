"""The exporter as a process over a real server: its names, its honesty while the queue is away, its end."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.queue_data import VIEW_TOKENS, make_group, make_request, make_scores
from tutelage.v1.rollout_pb2 import SampleOrder

from services.exporter.process import PATIENCE_SECONDS
from services.queue import Queue
from services.queue.embedded import EmbeddedServer

NAMES = {
    "tutelage_queue_up": set(),
    "tutelage_queue_waiting_tokens": {"teacher"},
    "tutelage_queue_in_flight_tokens": {"teacher"},
    "tutelage_queue_oldest_job_age_seconds": {"teacher"},
    "tutelage_queue_jobs": {"teacher", "state"},
    "tutelage_queue_scored_jobs_total": {"teacher"},
    "tutelage_queue_dead_jobs_total": {"teacher"},
    "tutelage_queue_expired_jobs_total": {"teacher"},
    "tutelage_queue_replicas": {"teacher"},
    "tutelage_queue_orders": {"run", "state"},
    "tutelage_queue_scored_groups": {"run", "state"},
    "tutelage_queue_oldest_order_age_seconds": {"run"},
    "tutelage_queue_dead_orders_total": {"run"},
    "tutelage_queue_samplers": {"run"},
    "tutelage_queue_trainers": {"run"},
    "tutelage_queue_memory_bytes": set(),
    "tutelage_queue_memory_limit_bytes": set(),
    "tutelage_queue_clients": set(),
}
AWAY = {("tutelage_queue_up",): 0.0}

Figures = dict[tuple[str, ...], float]


class Exporter:
    """A process and its address."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://([\d.]+):(\d+)", line)
        assert found, line + process.stderr.read()
        self.port = int(found[2])

    def get(self, path: str, token: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def figures(self) -> Figures:
        """Values by name and the values of its labels, the label that sorts last first."""
        status, text = self.get("/metrics")
        assert status == 200
        return {
            (
                sample.name,
                *(sample.labels[label] for label in sorted(sample.labels, reverse=True)),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@contextmanager
def exporter(*options: str) -> Iterator[Exporter]:
    command = [sys.executable, "-m", "launcher", "exporter", "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUTELAGE_")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield Exporter(process)
        finally:
            process.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "queue", dies_with_parent=True) as server:
        yield server


async def fill(url: str, namespace: str = "tutelage") -> None:
    """Of teacher `big` a job waits, one is in flight, one is scored; of `run` an order and a group wait."""
    async with Queue(url, namespace) as queue:
        for index in range(3):
            await queue.submit_group(make_group("run", index), [make_request("big")])
        await queue.place_order(SampleOrder(id="o", run="run"))
        worker = queue.jobs("big", "replica")
        await worker.__aenter__()  # and it never leaves: its job stays in flight until the lease has run out
        scored, _ = await worker.claim(2, 2000)
        await worker.commit(scored, make_scores("x"))
        worker._heart.stop()


async def test_every_figure_has_its_name_and_its_value(server: EmbeddedServer) -> None:
    await fill(server.url)
    async with Queue(server.url) as queue:
        with (
            queue.presence("teacher:big", "r-0"),
            queue.presence("trainer", "run"),
            exporter("--queue", server.url) as process,
        ):
            while not (await queue.alive("teacher:big") and await queue.alive("trainer")):  # noqa: ASYNC110 another process
                await asyncio.sleep(0.02)
            found = process.figures()
            _, text = process.get("/metrics")
    labels = {
        sample.name: set(sample.labels) for f in text_string_to_metric_families(text) for sample in f.samples
    }
    assert labels == NAMES
    expected = {
        ("tutelage_queue_up",): 1,
        ("tutelage_queue_waiting_tokens", "big"): VIEW_TOKENS,
        ("tutelage_queue_in_flight_tokens", "big"): VIEW_TOKENS,
        ("tutelage_queue_jobs", "big", "waiting"): 1,
        ("tutelage_queue_jobs", "big", "in_flight"): 1,
        ("tutelage_queue_scored_jobs_total", "big"): 1,
        ("tutelage_queue_dead_jobs_total", "big"): 0,
        ("tutelage_queue_expired_jobs_total", "big"): 0,
        ("tutelage_queue_replicas", "big"): 1,
        ("tutelage_queue_orders", "waiting", "run"): 1,
        ("tutelage_queue_orders", "in_flight", "run"): 0,
        ("tutelage_queue_scored_groups", "waiting", "run"): 1,
        ("tutelage_queue_scored_groups", "in_flight", "run"): 0,
        ("tutelage_queue_dead_orders_total", "run"): 0,
        ("tutelage_queue_samplers", "run"): 0,
        ("tutelage_queue_trainers", "run"): 1,
        ("tutelage_queue_memory_limit_bytes",): 0,
    }
    assert {name: found[name] for name in expected} == expected
    assert 0 < found["tutelage_queue_oldest_job_age_seconds", "big"] < 60
    assert 0 < found["tutelage_queue_oldest_order_age_seconds", "run"] < 60
    assert found["tutelage_queue_memory_bytes",] > 0
    assert found["tutelage_queue_clients",] >= 1


async def test_an_absent_queue_leaves_no_figure_behind_and_its_return_is_noticed(
    server: EmbeddedServer,
) -> None:
    server.stop()
    with exporter("--queue", server.url) as process:
        assert process.figures() == AWAY, "it starts without a queue"
        assert process.get("/health")[0] == 200
        server.start()
        await fill(server.url)
        assert process.figures()["tutelage_queue_waiting_tokens", "big"] == VIEW_TOKENS
        os.kill(server.pid, signal.SIGKILL)
        assert process.figures() == AWAY
        assert process.process.poll() is None
        assert server._process is not None
        server._process.wait()
        server.start()
        assert process.figures()["tutelage_queue_up",] == 1


async def test_a_queue_that_hangs_is_not_waited_for_longer_than_prometheus_waits(
    server: EmbeddedServer,
) -> None:
    await fill(server.url)
    with exporter("--queue", server.url) as process:
        assert process.figures()["tutelage_queue_up",] == 1
        os.kill(server.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert process.figures() == AWAY
            assert time.monotonic() - started < PATIENCE_SECONDS + 2
            assert process.get("/health")[0] == 200
            process.process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            assert process.process.wait(10) == 0, "also while nobody answers"
            assert time.monotonic() - started < 3
        finally:
            os.kill(server.pid, signal.SIGCONT)


async def test_another_namespace_is_another_queue(server: EmbeddedServer) -> None:
    await fill(server.url, "other")
    with exporter("--queue", server.url) as process:
        assert ("tutelage_queue_waiting_tokens", "big") not in process.figures()
    with exporter("--queue", server.url, "--namespace", "other") as process:
        assert process.figures()["tutelage_queue_waiting_tokens", "big"] == VIEW_TOKENS


def test_beyond_loopback_it_asks_for_the_token(server: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("open-sesame\n")
    options = ("--queue", server.url, "--host", "0.0.0.0")
    with exporter(*options, "--token-file", str(tmp_path / "token")) as process:
        assert process.get("/metrics")[0] == process.get("/metrics", "wrong")[0] == 401
        assert process.get("/metrics", "open-sesame")[0] == 200
        assert process.get("/health")[0] == process.get("/ready")[0] == 200


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--queue", "redis://:open-sesame@127.0.0.1:1", "--host", "0.0.0.0"], "without a token"),
        ([], "queue: got no address; give --queue"),
        (["--queue", "redis://127.0.0.1:1", "--token-file", "/nowhere/token"], "/nowhere/token"),
        (["--queue", "redis://127.0.0.1:1", "--heartbeat-seconds", "0"], "heartbeat_seconds: got 0.0"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options: list[str], complaint: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "launcher", "exporter", "--port", "0", *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={name: value for name, value in os.environ.items() if not name.startswith("TUTELAGE_")},
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert complaint in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert "open-sesame" not in ran.stderr


def test_sigterm_ends_it_at_once_with_0(server: EmbeddedServer) -> None:
    with exporter("--queue", server.url) as process:
        process.figures()
        started = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(10) == 0
        assert time.monotonic() - started < 3


def test_it_loads_neither_torch_nor_a_web_framework(server: EmbeddedServer) -> None:
    code = (
        "import json, sys\nfrom services.exporter import process\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'fastapi', 'uvicorn'} & set(sys.modules))))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(ran.stdout) == []
