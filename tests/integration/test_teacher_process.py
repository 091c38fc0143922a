"""A replica as a process: how it starts, drains, and works for the queue."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.queue_data import make_group, make_request
from support.teachers import TeacherProcess, teacher_process
from tutelage_client import AsyncTeacherClient, RetryPolicy, TeacherClient, TutelageError, codec

from services.exit_status import EXIT_BAD_INPUT
from services.queue import LeaseSettings, Queue, connect
from services.queue.embedded import EmbeddedServer
from services.teacher.jobs import job_request

REQUEST = codec.build_request([[1, 2, 3]], [[4, 5, 6]] * 4)


def health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        return int(answer.status)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_replica_says_no_while_it_loads_and_yes_afterwards(tmp_path: Path) -> None:
    grpc_port, http_port = free_port(), free_port()
    service = {"grpc_port": grpc_port, "http_port": http_port, "metrics_port": free_port()}
    teacher = TeacherProcess(tmp_path, service=service, fake={"load_seconds": 2.0})
    try:
        url, statuses = f"http://127.0.0.1:{http_port}", set()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                statuses.add((httpx.get(f"{url}/health").status_code, httpx.get(f"{url}/ready").status_code))
            except httpx.ConnectError:
                time.sleep(0.05)
                continue
            if (503, 503) in statuses:
                assert health(f"127.0.0.1:{grpc_port}") == health_pb2.HealthCheckResponse.NOT_SERVING
                with (
                    TeacherClient(f"127.0.0.1:{grpc_port}", retry=RetryPolicy(attempts=1)) as client,
                    pytest.raises(TutelageError, match="UNAVAILABLE: teacher: the"),
                ):
                    client.score_request(REQUEST)
                break
        teacher.wait_ready()
        assert (503, 503) in statuses
        assert httpx.get(f"{url}/ready").status_code == 200
        assert health(teacher.grpc) == health_pb2.HealthCheckResponse.SERVING
        assert httpx.get(f"{url}/metrics").status_code == 404
        assert "tutelage_ready 1.0" in httpx.get(f"{teacher.addresses['metrics']}/metrics").text
        assert teacher.terminate() == 0
    finally:
        teacher.kill()


def test_a_signal_while_loading_ends_the_process_cleanly(tmp_path: Path) -> None:
    teacher = TeacherProcess(tmp_path, fake={"load_seconds": 60.0})
    try:
        deadline = time.monotonic() + 20
        while "listening" not in teacher.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        began = time.monotonic()
        assert teacher.terminate() == 0
        assert time.monotonic() - began < 5
    finally:
        teacher.kill()


def test_a_taken_port_and_an_unusable_model_are_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for service, text in (
            ({"grpc_port": port}, f"gRPC cannot listen on 127.0.0.1:{port}"),
            ({"http_port": port}, f"HTTP cannot listen on 127.0.0.1:{port}"),
        ):
            teacher = TeacherProcess(tmp_path / text[:4], service=service)
            assert teacher.process.wait(30) == 1
            assert text in teacher.log.read_text()
            assert "Traceback" not in teacher.log.read_text()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"engine": "transformers", "model": "./notamodel"}, "./notamodel"),
        ({"service": {"token_file": "empty-tokens"}}, "empty-tokens without a token"),
        ({"service": {"token_file": "no-tokens"}}, "No such file or directory"),
        ({"service": {"token_file": "bad-tokens"}}, "can't decode byte"),
    ],
)
def test_settings_that_no_restart_cures_end_with_status_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    Path("empty-tokens").write_text("\n")
    Path("bad-tokens").write_bytes(b"\xff\xfe")
    teacher = TeacherProcess(tmp_path / "replica", **settings)
    try:
        assert teacher.process.wait(60) == EXIT_BAD_INPUT
    finally:
        teacher.kill()
    log = teacher.log.read_text()
    assert text in log
    assert "Traceback" not in log


async def test_sigterm_under_load_finishes_what_was_accepted_and_exits_zero(tmp_path: Path) -> None:
    with teacher_process(tmp_path, fake={"latency_seconds": 0.5}) as teacher:
        retry = RetryPolicy(attempts=1)
        async with AsyncTeacherClient(teacher.grpc, retry=retry) as client:
            accepted = [asyncio.create_task(client.score_request(REQUEST)) for _ in range(30)]
            await asyncio.sleep(0.25)
            teacher.process.terminate()
            await asyncio.sleep(0.1)
            with pytest.raises(TutelageError, match="UNAVAILABLE"):
                await client.score_request(REQUEST)
            scores = await asyncio.gather(*accepted)
        assert all(score.raise_for_errors() for score in scores)
        began = time.monotonic()
        assert await asyncio.to_thread(teacher.process.wait, 20) == 0
        assert time.monotonic() - began < 5
        assert "drained" in teacher.log.read_text()


async def test_work_longer_than_the_grace_period_is_cut_and_reported(tmp_path: Path) -> None:
    with teacher_process(tmp_path, fake={"latency_seconds": 30.0}, grace_seconds=0.3) as teacher:
        async with AsyncTeacherClient(teacher.grpc, retry=RetryPolicy(attempts=1)) as client:
            stuck = asyncio.create_task(client.score_request(REQUEST))
            await asyncio.sleep(0.3)
            teacher.process.terminate()
            assert await asyncio.to_thread(teacher.process.wait, 20) == 1
            with pytest.raises(TutelageError):
                await stuck
        assert "drain_cut_short" in teacher.log.read_text()


async def wait_scored(queue: Queue, run: str, count: int, seconds: float = 20.0) -> dict[str, object]:
    reader, found = queue.scored(run), {}
    async with asyncio.timeout(seconds):
        while len(found) < count:
            for group in await reader.read(16, 200):
                found[group.group.id] = group
    return found


async def test_queue_jobs_get_the_same_scores_as_direct_calls(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "queue") as server:
        async with Queue(server.url, lease=LeaseSettings(heartbeat=1.0)) as queue:
            groups = [make_group("r", i) for i in range(6)]
            view = make_request("fake")
            view.signal.sampled = True
            view.signal.top_k = 3
            for group in groups[:5]:
                await queue.submit_group(group, [view])
            hopeless = make_request("fake")
            hopeless.signal.top_k = 10_000
            await queue.submit_group(groups[5], [hopeless])
            with teacher_process(tmp_path / "t", queue_url=server.url, heartbeat_seconds=1.0) as teacher:
                found = await wait_scored(queue, "r", 6)
                assert await queue.alive("teacher:fake"), "a replica must say that it lives"
                async with AsyncTeacherClient(teacher.grpc) as client:
                    for group in groups[:5]:
                        direct = await client.score_request(
                            codec.request_from_proto(job_request(group, view))
                        )
                        stored = codec.score_from_proto(found[group.id].scores["teacher"])  # type: ignore[attr-defined]
                        for one, other in zip(direct.sequences, stored.sequences, strict=True):
                            np.testing.assert_array_equal(one.sampled, other.sampled)
                            np.testing.assert_array_equal(one.top_ids, other.top_ids)
                metrics = (await asyncio.to_thread(httpx.get, f"{teacher.http}/metrics")).text
                assert 'tutelage_queue_jobs_total{outcome="committed"} 5.0' in metrics
                assert 'tutelage_queue_jobs_total{outcome="failed_dead"} 1.0' in metrics
                assert teacher.terminate() == 0
            assert found["r-5"].status == "failed"  # type: ignore[attr-defined]
            assert "signal.top_k: got 10000" in found["r-5"].errors["teacher"]  # type: ignore[attr-defined]


async def test_a_drained_replica_finishes_its_jobs_and_leaves_the_rest_to_another(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "queue") as server:
        async with Queue(server.url, lease=LeaseSettings(heartbeat=1.0)) as queue:
            view = make_request("fake")
            view.signal.sampled = True
            for index in range(60):
                await queue.submit_group(make_group("r", index), [view])
            settings = {
                "queue_url": server.url,
                "heartbeat_seconds": 1.0,
                "queue_concurrency": 4,
                "fake": {"latency_seconds": 0.1},
            }
            with teacher_process(tmp_path / "first", **settings) as first:
                await asyncio.sleep(0.4)
                assert await asyncio.to_thread(first.terminate) == 0
            some = (await queue.teacher_stats("fake")).scored
            assert 0 < some < 60
            assert (await queue.teacher_stats("fake")).jobs.in_flight == 0
            with teacher_process(tmp_path / "second", **settings):
                assert len(await wait_scored(queue, "r", 60)) == 60


async def test_an_engine_that_fails_often_still_gets_every_job_scored_or_buried(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "queue") as server:
        async with Queue(server.url, lease=LeaseSettings(heartbeat=0.5)) as queue:
            view = make_request("fake")
            view.signal.sampled = True
            for index in range(40):
                await queue.submit_group(make_group("r", index), [view])
            faults = {"failure_rate": 0.3, "seed": 3}
            settings = {"queue_url": server.url, "heartbeat_seconds": 0.5, "fake": faults}
            with teacher_process(tmp_path / "t", **settings):
                found = await wait_scored(queue, "r", 40)
            statuses = [group.status for group in found.values()]  # type: ignore[attr-defined]
            assert statuses.count("scored") >= 36  # a job fails for good at 0.3 ** 3


async def test_a_job_that_cannot_be_read_is_buried_like_any_failure(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "queue") as server:
        async with Queue(server.url, lease=LeaseSettings(heartbeat=0.5)) as queue:
            view = make_request("fake")
            view.signal.sampled = True
            groups = [make_group("r", index) for index in range(2)]
            for group in groups:
                await queue.submit_group(group, [view])
            client = connect(server.url)
            await client.hset(queue.keys.group(groups[0].id), "request:teacher", b"\xff\xff")  # type: ignore[misc]
            await client.aclose()
            with teacher_process(tmp_path / "t", queue_url=server.url, heartbeat_seconds=0.5):
                found = await wait_scored(queue, "r", 2)
            assert "DecodeError" in found["r-0"].errors["teacher"]  # type: ignore[attr-defined]
            assert found["r-1"].status == "scored"  # type: ignore[attr-defined]
            (letter,) = await queue.dead_letters("fake")
            assert letter.deliveries == 3
