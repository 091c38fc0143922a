"""Teachers restarted in turn, made four and made one, while direct callers and the queue keep them busy."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from outcome import Check, report_outcome
from stack import ROOT, Stack, run

SUPPORT = ("__init__", "direct_load", "queue_data", "queue_load", "stack_load")
UNPACK = (
    "import base64, io, sys, tarfile; "
    "tarfile.open(fileobj=io.BytesIO(base64.b64decode(sys.argv[1]))).extractall('/tmp/check')"
)
END_SECONDS = 240.0
MOST = 4


class Callers:
    """tests/support/stack_load.py in the report's container, calling so many teachers."""

    def __init__(self, check: Check, name: str, teachers: int) -> None:
        self._check, self._name = check, name
        stack = check.stack
        names = [stack.container("teacher", number + 1) for number in range(teachers)]
        self._options = {
            "grpc": [f"{teacher}:50051" for teacher in names],
            "http": [f"{teacher}:8081" for teacher in names],
            "name": "teacher:50051",  # the service's, which stands for all that run
            "teacher": "teacher",
            "run": name,
            "queue_url_file": "/run/tutelage/queue-url",
            "token_file": "/run/tutelage/token",
        }

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="callers-")
        self._log = Path(self._directory.name) / "log"
        self._process = start_callers(self._check.stack.container("report"), self._options, self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if kind is None:
            self._judge()
        self._directory.cleanup()

    def newest(self) -> dict[str, Any]:
        """The last whole line they have printed."""
        lines = [line for line in self._log.read_text().splitlines() if line[:1] + line[-1:] == "{}"]
        return json.loads(lines[-1]) if lines else {}  # type: ignore[no-any-return]

    def more(self, count: int, seconds: float = 120.0) -> None:
        """Until each way of calling has been answered `count` times more, and as many jobs are scored."""
        before = self._counts()
        deadline = time.monotonic() + seconds
        while any(now < then + count for now, then in zip(self._counts(), before, strict=True)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"FAILED: callers {self._name} got no further:\n{self._end_of_log()}")
            time.sleep(0.5)

    def _counts(self) -> list[int]:
        newest = self.newest()
        answered = newest.get("answered", {})
        return [*(answered.get(way, 0) for way in ("grpc", "grpc by name", "http")), newest.get("scored", 0)]

    def _end_of_log(self) -> str:
        return self._log.read_text()[-3000:]

    def _keep_logs(self) -> None:
        """What every teacher wrote, with times, for whoever asks what a failed call met."""
        stack, directory = self._check.stack, Path(tempfile.mkdtemp(prefix="teachers-"))
        for name in stack.containers("teacher"):
            with (directory / f"{name}.log").open("w") as file:
                command = ["docker", "logs", "--timestamps", name]
                subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
        stack.say(f"logs of the teachers: {directory}")

    def _judge(self) -> None:
        seen = self.newest()
        if seen.get("failures") or not seen.get("done"):
            self._keep_logs()
        if not seen.get("done"):
            self._check.that(False, f"callers {self._name} ended well:\n{self._end_of_log()}")
            return
        self._check.that(
            not seen["failures"],
            f"{self._name}: {seen['answered']} calls answered in {seen['seconds']:.0f} s, "
            f"failures seen by a client: {seen['failures'] or 0} (HTTP asked again: {seen['asked_again']})",
        )
        self._check.that(
            seen["received"] == seen["submitted"] and not seen["twice"],
            f"{self._name}: {seen['submitted']} jobs queued, {seen['submitted'] - seen['received']} lost, "
            f"{seen['twice']} twice",
        )


def start_callers(container: str, options: dict[str, Any], log: Path) -> subprocess.Popen[str]:
    """Copies the callers into a container, whose only writable place is /tmp, and starts them there."""
    run(["docker", "exec", container, "python", "-c", UNPACK, packed_support()])
    command = ["python", "-m", "support.stack_load", json.dumps(options)]
    with log.open("w") as out:
        return subprocess.Popen(
            ["docker", "exec", "--interactive", "--env", "PYTHONPATH=/tmp/check", container, *command],
            stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def packed_support() -> str:
    """The modules that the callers need, as a tar in base64."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for module in SUPPORT:
            tar.add(ROOT / "tests/support" / f"{module}.py", f"support/{module}.py")
    return base64.b64encode(buffer.getvalue()).decode()


def restarted_and_scaled(check: Check, restarts: int) -> None:
    """Another run, with its teachers restarted one at a time, then four of them, then one."""
    stack = check.stack
    begun = time.monotonic()
    stack.compose("up", "--detach", "--scale", "teacher=2")
    stack.wait_for(lambda: stack.healthy("teacher") == 2 and stack.step() >= 3, "two teachers and step 3")
    with Callers(check, "rolling-restarts", teachers=2) as callers:
        callers.more(20)
        for number in range(restarts):
            restart(stack, stack.container("teacher", number % 2 + 1))
            callers.more(20)
    stack.say(f"{restarts} restarts in turn")
    scale(stack, MOST)
    with Callers(check, "four-to-one", teachers=MOST) as callers:
        callers.more(20)
        scale(stack, 1)
        callers.more(20)
    stack.wait_for(lambda: stack.healthy("report") == 1, "the end of the run")
    stack.say(f"finished {time.monotonic() - begun:.0f} s after its start")
    report_outcome(check)


def restart(stack: Stack, name: str) -> None:
    begun = time.monotonic()
    run(["docker", "restart", "--time", "45", name])
    stack.wait_for(lambda: stack.health(name) == "healthy", f"{name} after its restart", 180.0)
    stack.say(f"docker restart {name}: well again after {time.monotonic() - begun:.0f} s")


def scale(stack: Stack, teachers: int) -> None:
    begun = time.monotonic()
    stack.compose("up", "--detach", "--no-recreate", "--scale", f"teacher={teachers}")
    stack.wait_for(lambda: stack.healthy("teacher") == teachers, f"{teachers} teachers", 300.0)
    stack.say(f"docker compose up --scale teacher={teachers}: {time.monotonic() - begun:.0f} s")
