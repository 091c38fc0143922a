"""Starts a run's trainer under torchrun, as a person would, and finds and signals its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.training_run import TrainingRun, wait_until

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Torchrun:
    """A started torchrun; its log, and that of all its ranks, is RUN-logs/torchrun.log."""

    process: subprocess.Popen[bytes]
    run: TrainingRun

    @classmethod
    def start(
        cls,
        run: TrainingRun,
        *,
        ranks: int = 2,
        restarts: int = 0,
        meeting: tuple[str, ...] = ("--standalone",),
        options: tuple[str, ...] = (),
    ) -> Torchrun:
        """`ranks` of this node; `meeting` says how it finds the others; `options` of `tutelage train`."""
        path = os.pathsep.join(str(ROOT / part) for part in (".", "proto/src"))
        with (run.logs / "torchrun.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", *meeting),
                    *(f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"),
                    *("-m", "launcher", "train", str(run.file), *options),
                ],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        return cls(process, run)

    def rank(self, number: int, variable: str = "RANK") -> int:
        """Process id of a rank of the newest start, by RANK or LOCAL_RANK; waits until it is there."""
        found: list[int] = []

        def there() -> bool:
            found[:] = [pid for pid in self._children() if _variable(pid, variable) == str(number)]
            return bool(found)

        wait_until(there, 60.0, f"rank {number}")
        return found[-1]

    def reached(self, step: int) -> bool:
        """Whether the run has got past a step; true as well when nobody works on it any more."""
        return len(self.run.steps()) > step or self.process.poll() is not None

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 120.0) -> int:
        return self.process.wait(seconds)

    def log(self) -> str:
        return self.run.log("torchrun")[-6000:]

    def close(self) -> None:
        """End whatever is left; the ranks follow their torchrun."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)

    def _children(self) -> list[int]:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]


def _variable(pid: int, name: str) -> str | None:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    pairs = (entry.partition(b"=") for entry in content.split(b"\0"))
    return next((value.decode() for key, _, value in pairs if key == name.encode()), None)
