"""The embedded server's life, and the refusal of servers that cannot keep the queue's promises."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.queue_data import make_group
from tutelage_client.errors import TutelageError

from services.queue import Queue, check_server, connect
from services.queue.embedded import EmbeddedServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "server") as server:
        yield server


async def test_embedded_server_passes_the_check_of_a_queue(server: EmbeddedServer) -> None:
    async with Queue(server.url):
        pass


async def test_data_survives_kill_and_restart_at_the_same_address(server: EmbeddedServer) -> None:
    url = server.url
    async with Queue(url) as queue:
        await queue.submit_group(make_group("run", 0), [])
        os.kill(server.pid, signal.SIGKILL)
        server._process.wait() if server._process else None
        assert not server.running
        assert server.start() == url
        [scored] = await queue.scored("run").read(1, 2000)
        assert scored.group.index == 0


def test_second_server_in_a_directory_is_refused_while_the_first_lives(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    second = EmbeddedServer(tmp_path / "server")
    with pytest.raises(TutelageError, match="used by another server"):
        second.start()
    server.stop()
    second.start()
    second.stop()


async def test_directory_with_a_long_path_works_and_keeps_its_address(tmp_path: Path) -> None:
    directory = tmp_path / ("long-" * 25)
    for _ in range(2):
        with EmbeddedServer(directory) as server:
            async with Queue(server.url) as queue:
                await queue.publish_progress("run", {"step": 1})
    async with connect(server.url):
        assert len(server.url.removeprefix("unix://")) < 108


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    directory = tmp_path / "server"
    (directory / "appendonlydir").mkdir(parents=True)
    (directory / "appendonlydir" / "appendonly.aof.manifest").write_text("not a manifest\n")
    started = time.monotonic()
    with pytest.raises(TutelageError, match="manifest") as refusal:
        EmbeddedServer(directory).start()
    assert refusal.value.code == "UNAVAILABLE"
    assert time.monotonic() - started < 5


async def test_server_that_evicts_is_refused(server: EmbeddedServer) -> None:
    client = connect(server.url)
    await client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(TutelageError, match="CONFIG SET maxmemory-policy noeviction") as refusal:
        await check_server(client)
    assert refusal.value.code == "FAILED_PRECONDITION"
    await client.aclose()


async def test_full_server_still_lets_the_trainer_acknowledge(server: EmbeddedServer) -> None:
    async with Queue(server.url) as queue:
        await queue.submit_group(make_group("run", 0), [])
        reader = queue.scored("run")
        groups = await reader.read(1, 1000)
        await queue._client.config_set("maxmemory", 1)
        async with asyncio.timeout(5):
            await reader.acknowledge(groups)
        await queue._client.config_set("maxmemory", 0)
        assert await queue.scored("run").read(1, 100) == []


@pytest.mark.parametrize("scheme", ["unix://{}/nowhere.sock", "redis://user:secret@127.0.0.1:1/0"])
async def test_absent_server_is_reported_after_the_patience(tmp_path: Path, scheme: str) -> None:
    queue = Queue(scheme.format(tmp_path))
    with pytest.raises(TutelageError, match=r"queue server (unix|redis)://") as refusal:
        await queue.open(patience=0.2)
    assert refusal.value.code == "UNAVAILABLE"
    assert "secret" not in str(refusal.value)
    await queue.close()
