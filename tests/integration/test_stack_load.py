"""What the check of the compose stack runs inside a container: callers that count, packed and sent there."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from support.teachers import TeacherProcess

from services.queue.embedded import EmbeddedServer

ROOT = Path(__file__).parents[2]
PACK = "import sys; sys.path.insert(0, 'tests/compose'); import restarts; print(restarts.packed_support())"


def last_line(log: Path) -> dict[str, object]:
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}  # type: ignore[no-any-return]


def test_callers_run_from_what_is_packed_and_tell_what_they_have_seen(tmp_path: Path) -> None:
    packed = subprocess.run(
        [sys.executable, "-c", PACK], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed))) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "token").write_text("a-token-of-the-stack\n")
    with EmbeddedServer(tmp_path / "queue", dies_with_parent=True) as server:
        (tmp_path / "queue-url").write_text(server.url + "\n")
        service = {"token_file": tmp_path / "token"}
        teachers = [
            TeacherProcess(tmp_path / str(n), queue_url=server.url, heartbeat_seconds=1.0, service=service)
            for n in range(2)
        ]
        options = {
            "teacher": "fake",
            "run": "callers",
            "queue_url_file": str(tmp_path / "queue-url"),
            "token_file": str(tmp_path / "token"),
            "heartbeat": 1.0,
        }
        log = tmp_path / "log"
        try:
            for teacher in teachers:
                teacher.wait_ready()
            options |= {
                "grpc": [teacher.grpc for teacher in teachers],
                "http": [teacher.http.removeprefix("http://") for teacher in teachers],
                "name": teachers[1].grpc,
            }
            with log.open("w") as out:
                callers = subprocess.Popen(
                    [sys.executable, "-m", "support.stack_load", json.dumps(options)],
                    stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path,
                    env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
            deadline = time.monotonic() + 30
            while not last_line(log).get("scored") and time.monotonic() < deadline:
                assert callers.poll() is None, log.read_text()
                time.sleep(0.1)
            assert teachers[0].terminate() == 0
            assert callers.stdin is not None
            callers.stdin.close()
            assert callers.wait(60) == 0, log.read_text()
        finally:
            for teacher in teachers:
                teacher.kill()
    seen = last_line(log)
    assert seen["done"] is True
    assert seen["failures"] == []
    assert seen["received"] == seen["submitted"] != 0
    assert seen["twice"] == 0
    answered = seen["answered"]
    assert isinstance(answered, dict)
    assert answered["grpc"] > 0
    assert answered["grpc by name"] > 0
    assert answered["http"] > 0
