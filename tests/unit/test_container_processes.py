"""What only containers use: health checks, the wait for a run's end, the names of the quickstart's models."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from launcher.finished import wait_for_end
from launcher.health import ask, look_for
from launcher.quickstart_models import name_models
from services.queue import TRAINER_ROLE, Queue, sampler_role

pytest_plugins = ["support.queue_server"]

RUN_FILE = """
[run]
name = "watched"
directory = "{directory}"
[queue]
namespace = "{namespace}"
[student]
model = "student"
[data]
task = "addition"
[objective]
preset = "grpo"
[sampling]
samples_per_prompt = 2
[training]
steps = 1
"""


@pytest.fixture
def probe() -> Iterator[tuple[str, list[int]]]:
    """A server that answers /ready with the last status of a list."""
    statuses = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses[-1] if self.path == "/ready" else 404)
            self.end_headers()
            self.wfile.write(b"loading")

        def log_message(self, format: str, *arguments: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", statuses
        server.shutdown()


def health(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.health", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_an_http_probe_is_well_when_it_answers_200(probe: tuple[str, list[int]]) -> None:
    url, statuses = probe
    assert health(f"{url}/ready").returncode == 0
    statuses.append(503)
    unwell = health(f"{url}/ready")
    assert unwell.returncode == 1
    assert unwell.stderr.splitlines() == [f"{url}/ready: 503 loading"]
    assert ask(f"{url}/other") is not None
    assert "refused" in str(ask("http://127.0.0.1:1/ready"))


async def test_a_sampler_is_well_while_it_is_present_in_the_queue(queue_url: str, tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    namespace = "watched-samplers"
    run_file.write_text(RUN_FILE.format(directory=tmp_path, namespace=namespace))
    missing = "sampler:watched 'one' is not present in the queue"
    assert await look_for(run_file, "one", queue_url) == missing
    async with Queue(queue_url, namespace) as same:
        with same.presence(sampler_role("watched"), "one"):
            for _ in range(100):
                if await look_for(run_file, "one", queue_url) is None:
                    break
                await asyncio.sleep(0.05)
            assert await look_for(run_file, "one", queue_url) is None
            assert await look_for(run_file, "two", queue_url) is not None
            assert (
                await look_for(run_file, None, queue_url) == "trainer 'watched' is not present in the queue"
            )


@pytest.mark.parametrize(
    ("statuses", "ending"),
    [
        (["training", "finished"], "finished"),
        (["failed: no room", "training", "finished"], "finished"),
        (["stopped", "failed: no room"], "failed: no room"),
    ],
)
async def test_the_end_of_a_run_is_its_last_word(
    statuses: list[str], ending: str, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.finished.LOOK_SECONDS", 0.01)
    waiting = asyncio.create_task(wait_for_end(queue, "run", patience=0.3))
    for status in statuses:
        assert not waiting.done()
        await queue.publish_progress("run", {"status": status})
        await asyncio.sleep(0.1)
    assert await asyncio.wait_for(waiting, 10) == ending


async def test_a_run_whose_trainer_was_killed_has_failed(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its last word was. Before its first trainer, and while it has one, it is waited for."""
    monkeypatch.setattr("launcher.finished.LOOK_SECONDS", 0.01)
    waiting = asyncio.create_task(wait_for_end(queue, "run", absence=0.5))
    await asyncio.sleep(1.5)
    assert not waiting.done()
    with queue.presence(TRAINER_ROLE, "another"), queue.presence(TRAINER_ROLE, "run"):
        while len(await queue.alive(TRAINER_ROLE)) < 2:  # noqa: ASYNC110 another thread
            await asyncio.sleep(0.01)
        await queue.publish_progress("run", {"status": "training"})
        await asyncio.sleep(1.5)
        assert not waiting.done()
        await queue.publish_progress("run", {"status": "stopped"})
    while "run" in await queue.alive(TRAINER_ROLE):  # noqa: ASYNC110 by its lease
        await asyncio.sleep(0.01)
    await asyncio.sleep(1.5)
    assert not waiting.done(), "it was stopped by somebody, who may start it again"
    await queue.publish_progress("run", {"status": "training"})
    ending = await asyncio.wait_for(waiting, 20)
    assert ending == "no trainer for 0.5 s; the last status was 'training'"
    later = await wait_for_end(queue, "run", absence=0.1)  # it looks for the first time
    assert later == ending.replace("0.5", "0.1")


async def test_an_absent_queue_is_no_absent_trainer(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that takes as long as the queue is away is one look, whatever it then sees."""
    monkeypatch.setattr("launcher.finished.LOOK_SECONDS", 0.01)
    looks, back = 0, 5

    async def alive(role: str) -> dict[str, float]:
        nonlocal looks
        looks += 1
        if looks == back - 2:
            await asyncio.sleep(1.0)
        return {"run": 0.0} if looks in (1, back) else {}

    monkeypatch.setattr(queue, "alive", alive)
    assert await wait_for_end(queue, "run", absence=0.3) == "no trainer for 0.3 s; the last status was ''"
    assert looks == pytest.approx(back + 30, abs=2)


def test_the_wait_ends_with_sigterm_also_while_the_queue_is_away(tmp_path: Path) -> None:
    run_file, flag = tmp_path / "run.toml", tmp_path / "finished"
    run_file.write_text(RUN_FILE.format(directory=tmp_path, namespace="nowhere"))
    flag.touch()  # of an earlier run
    command = [sys.executable, "-m", "launcher.finished", str(run_file), "--flag", str(flag)]
    environment = {**os.environ, "TUTELAGE_QUEUE_URL": "redis://127.0.0.1:1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "queue unreachable" in process.stderr.readline()
        assert not flag.exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not flag.exists()


def test_the_names_of_the_quickstart_models_are_links_that_move_with_the_directory(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in ("teacher-1", "student-1", "teacher-2", "student-2"):
        (models / name).mkdir(parents=True)
    name_models(models / "teacher-1", models / "student-1")
    name_models(models / "teacher-2", models / "student-2")
    moved = models.rename(tmp_path / "moved")
    assert (moved / "teacher").resolve() == moved / "teacher-2"
    assert (moved / "student").resolve() == moved / "student-2"
    assert len(list(moved.iterdir())) == 6
