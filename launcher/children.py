"""One child process of `tutelage up`: its command, its log, its life and its restarts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.parent_death import PARENT_VARIABLE


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to start: `arguments` follow `tutelage` on the command line."""

    name: str
    role: str  # "teacher", "sampler" or "trainer"
    arguments: tuple[str, ...]
    grace_seconds: float = 40.0  # between SIGTERM and SIGKILL; longer than a replica drains
    environment: Mapping[str, str] = field(default_factory=dict)  # beside this process's own


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often a child that died is started again, and after how long."""

    max_restarts: int = 5  # in a row; a child that then lives `healthy_seconds` starts counting anew
    first_delay: float = 1.0  # doubles with every restart
    longest_delay: float = 30.0
    healthy_seconds: float = 300.0

    def delay(self, restarts: int) -> float:
        """Seconds to wait before restart number `restarts` (1 is the first)."""
        return min(self.first_delay * 2.0 ** (restarts - 1), self.longest_delay)


@dataclass(slots=True)
class Child:
    """A started (or to be restarted) process. Its own session: the terminal's Ctrl-C is not for it."""

    spec: ChildSpec
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0  # in a row
    total_restarts: int = 0
    started_at: float = 0.0
    restart_at: float | None = None
    exit_code: int | None = None
    log_offset: int = field(default=0)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process, its output appended to the log."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        own = {PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        with self.log_path.open("ab") as log:
            self.log_offset = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launcher", *self.spec.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.spec.environment, **own},
                start_new_session=True,
            )
        self.exit_code = None
        self.restart_at = None
        self.started_at = time.monotonic()

    def send(self, number: signal.Signals) -> None:
        """Signal the child and whatever it started; nothing happens when it is gone."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def last_lines(self, count: int = 12) -> list[str]:
        """The end of what this start of the child wrote."""
        with self.log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(self.log_offset, log.tell() - 64 * 1024))
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip()][-count:]


def describe_exit(code: int) -> str:
    """An exit status in words: 'killed by SIGKILL', 'exit status 1'."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit status {code}"
