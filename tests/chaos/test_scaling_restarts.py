"""Replicas are restarted in turn while callers of every kind work: none sees a failure, no job is lost."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.direct_load import REQUEST, DirectLoad
from support.queue_load import QueueLoad
from support.teachers import TeacherProcess

from services.queue import LeaseSettings, Queue
from services.queue.embedded import EmbeddedServer
from services.teacher.engines.fake import FakeEngine, FakeSettings

REPLICAS = 2
HEARTBEAT = 1.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
async def test_rolling_restarts_under_load_are_not_seen_by_clients(tmp_path: Path, rounds: int) -> None:
    ports = [{"grpc_port": free_port(), "http_port": free_port()} for _ in range(REPLICAS)]
    with EmbeddedServer(tmp_path / "queue", dies_with_parent=True) as server:

        def start(index: int, number: int) -> TeacherProcess:
            settings: dict[str, Any] = {"service": ports[index], "queue_url": server.url}
            return TeacherProcess(
                tmp_path / f"{index}-{number}", heartbeat_seconds=HEARTBEAT, consumer=f"{index}-{number}",
                fake={"latency_seconds": 0.02}, **settings,
            )  # fmt: skip

        replicas = [start(index, 0) for index in range(REPLICAS)]
        try:
            for replica in replicas:
                replica.wait_ready()
            answer = await FakeEngine(FakeSettings()).score(REQUEST)
            direct = DirectLoad(
                [replica.grpc for replica in replicas],
                [replica.http.removeprefix("http://") for replica in replicas],
                expected=answer.sequences[0].sampled,
            )
            async with Queue(server.url, lease=LeaseSettings(heartbeat=HEARTBEAT)) as queue:
                load = QueueLoad(queue, "fake", ahead=40)
                began = time.monotonic()
                async with load, direct:
                    await direct.more(20)
                    for number in range(1, rounds + 1):
                        index = number % REPLICAS
                        assert await asyncio.to_thread(replicas[index].terminate) == 0
                        replicas[index] = start(index, number)
                        await asyncio.to_thread(replicas[index].wait_ready)
                        await direct.more(20)
                        assert not direct.failures, direct.failures[:3]
                    await load.finish(30)
                    await load.check_books()
        finally:
            for replica in replicas:
                replica.kill()
    print(
        f"{rounds} restarts in {time.monotonic() - began:.0f} s: {dict(direct.answered)} calls answered, "
        f"{len(direct.failures)} failed, HTTP asked again {dict(direct.asked_again)}; "
        f"{load.submitted} jobs, 0 lost, 0 twice"
    )
    assert not direct.failures, direct.failures[:3]
    assert min(direct.answered.values()) > 20 * rounds
    assert load.submitted > 20 * rounds
