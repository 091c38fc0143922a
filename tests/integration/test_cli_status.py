"""`tutelage status` as a process over a real server: once, as JSON, live on a terminal, without a queue."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.queue_data import VIEW_TOKENS, make_group, make_request

from services.queue import Queue
from services.queue.embedded import EmbeddedServer

RUN_FILE = """
[run]
name = "demo"
[queue]
url = "{url}"
[teachers.late]
engine = "fake"
[student]
model = "student"
[data]
task = "addition"
[objective]
preset = "thinking-machines"
[training]
steps = 9
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "queue", dies_with_parent=True) as server:
        yield server


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TUTELAGE_")}


def status(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", "status", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(),
    )


async def fill(url: str) -> None:
    async with Queue(url) as queue:
        for run in ("demo", "other"):
            await queue.submit_group(make_group(run, 0), [make_request("big")])
        await queue.publish_progress(
            "demo", {"status": "waiting for scores", "step": 3, "steps": 9, "kl": 0.5}
        )


async def test_one_look_is_a_table_or_a_document(server: EmbeddedServer) -> None:
    await fill(server.url)
    table = status("--queue", server.url, "--once")
    assert (table.returncode, table.stderr) == (0, "")
    for text in (
        "big",
        "no replica",
        "demo",
        "3/9",
        "waiting for scores; missing: trainer, sampler",
        "other",
    ):
        assert text in table.stdout, table.stdout
    alone = status("--queue", server.url)
    assert alone.returncode == 0, "without a terminal one look is all there is"
    assert "no replica" in alone.stdout
    document = json.loads(status("--queue", server.url, "--json").stdout)
    assert document["teachers"]["big"]["waiting_tokens"] == 2 * VIEW_TOKENS
    assert document["runs"]["demo"]["step"] == 3
    assert document["runs"]["other"]["status"] == "not started"


async def test_a_run_file_says_where_to_look_and_what_should_be_there(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    await fill(server.url)
    path = tmp_path / "run.toml"
    path.write_text(RUN_FILE.format(url=server.url))
    document = json.loads(status(str(path), "--json").stdout)
    assert list(document["runs"]) == ["demo"]
    assert list(document["teachers"]) == ["late"]
    assert document["teachers"]["late"]["replicas"] == 0
    assert document["teachers"]["late"]["missing"] is False, "nobody has asked it yet"


def test_an_absent_queue_is_one_line_and_status_1(tmp_path: Path) -> None:
    for option in ("--once", "--json"):
        ran = status("--queue", "redis://:open-sesame@127.0.0.1:1/0", option)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith("tutelage: queue server redis://127.0.0.1:1/0: ")
        assert len(ran.stderr.splitlines()) == 1
        assert "open-sesame" not in ran.stderr


def test_no_address_is_a_mistake_of_the_caller() -> None:
    ran = status("--once")
    assert ran.returncode == 2
    assert "queue: got no address; give --queue" in ran.stderr


class Terminal:
    """A live view on a pseudo-terminal, and everything that it has drawn."""

    def __init__(self, process: subprocess.Popen[bytes], screen: int) -> None:
        self.process = process
        self._screen = screen
        self.drawn = ""

    def draws(self, wanted: Callable[[str], bool], seconds: float = 20.0) -> None:
        """Read until what was drawn since the last call is as wanted."""
        self.drawn, end = "", time.monotonic() + seconds
        while not wanted(self.drawn):
            assert time.monotonic() < end, self.drawn
            if select.select([self._screen], [], [], 0.2)[0]:
                self.drawn += os.read(self._screen, 65536).decode(errors="replace")


@contextmanager
def terminal(*options: str) -> Iterator[Terminal]:
    screen, keyboard = pty.openpty()
    command = [sys.executable, "-m", "launcher", "status", *options]
    settings = {**environment(), "TERM": "xterm", "COLUMNS": "140", "LINES": "40", "NO_COLOR": "1"}
    with subprocess.Popen(
        command, stdin=keyboard, stdout=keyboard, stderr=keyboard, env=settings, start_new_session=True
    ) as process:
        os.close(keyboard)
        try:
            yield Terminal(process, screen)
        finally:
            process.kill()
            os.close(screen)


async def test_the_live_view_outlasts_the_queue_and_ends_on_ctrl_c(server: EmbeddedServer) -> None:
    server.stop()
    with terminal("--queue", server.url) as view:
        view.draws(lambda text: "trying again" in text)
        server.start()
        await fill(server.url)
        view.draws(lambda text: "demo" in text and "no replica" in text)
        server.stop()
        view.draws(lambda text: "below is the last look" in text and "demo" in text)
        server.start()
        view.draws(lambda text: "demo" in text and "no answer" not in text.rpartition("queue ")[2])
        view.process.send_signal(signal.SIGINT)
        assert view.process.wait(10) == 0
    assert "Traceback" not in view.drawn
