"""A peer's process group: started with one number of threads for all, watched, measured, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEEPER = Path(__file__).with_name("keeper.py")
START_SECONDS = 300.0
KIB = 1024


def environment(threads: int) -> dict[str, str]:
    """What every peer's process is started with."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or vLLM pins its threads and leaves a core idle
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


class ProcessGroup:
    """A command with everything it starts, in a process group that ends with this process."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, threads: int, pass_fds: Sequence[int] = ()
    ) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, str(KEEPER), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(threads),
                pass_fds=pass_fds,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._keeper.poll() is None

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Poll until ready.

        Raises:
            RuntimeError: the process ended or took too long; with the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if not self.running:
                raise RuntimeError(f"{self.name} did not start; its log ends with\n{self.last_lines()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: not ready in {START_SECONDS:.0f} s\n{self.last_lines()}")
            time.sleep(0.05)

    def last_lines(self, count: int = 25) -> str:
        """The end of what the group has written."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-count:])

    def end(self) -> None:
        """Kill the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._keeper.pid, signal.SIGKILL)
        self._keeper.wait()
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()

    def resident_bytes(self) -> int:
        """Resident memory of the group now."""
        return self._sum("VmRSS")

    def peak_bytes(self) -> int:
        """The processes' highest resident memory since `reset_peak`, added up."""
        return self._sum("VmHWM")

    def reset_peak(self) -> None:
        """Begin a new peak at what is resident now."""
        for process in self._members():
            with contextlib.suppress(OSError):
                (process / "clear_refs").write_text("5")

    def cpu_seconds(self) -> float:
        """Processor time that the living members of the group have used."""
        ticks = 0
        for process in self._members():
            with contextlib.suppress(OSError):
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _members(self) -> list[Path]:
        members = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._keeper.pid:
                    members.append(process)
        return members

    def _sum(self, field: str) -> int:
        total = 0
        for process in self._members():
            with contextlib.suppress(OSError):
                for line in (process / "status").read_text().splitlines():
                    if line.startswith(f"{field}:"):
                        total += int(line.split()[1]) * KIB
        return total
