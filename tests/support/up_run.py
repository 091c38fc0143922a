"""`tutelage up` as a real process on a tiny run, and the processes it has started, seen from /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.training_run import wait_until

STEPS = 30
HEARTBEAT = 0.5

RUN_FILE = """
[run]
name = "up"
directory = "{directory}"
deterministic = true

[queue]
heartbeat_seconds = {heartbeat}

[teachers.big]
model = "{models}/teacher"
replicas = 2

[student]
model = "{models}/student"

[data]
task = "addition"

[sampling]
samples_per_prompt = 2
max_new_tokens = 6

[objective]
divergence = "kl_student_teacher"
support = "student_topk"
k = 16
tail = "bucket"
estimator = "pathwise"

[training]
steps = {steps}
prompts_per_step = 8
learning_rate = 1e-2
checkpoint_every = 5
evaluate_every = {steps}
evaluation_prompts = 10
trackers = []
"""


@dataclass
class UpRun:
    """One run file, and at most one `tutelage up` at work on it."""

    directory: Path
    file: Path
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def write(cls, root: Path, models: Path, name: str) -> UpRun:
        file = root / f"{name}.toml"
        directory = root / name
        file.write_text(RUN_FILE.format(directory=directory, models=models, steps=STEPS, heartbeat=HEARTBEAT))
        return cls(directory, file)

    def start(self) -> None:
        with self.file.with_suffix(".out").open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launcher", "up", str(self.file)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def finish(self, seconds: float = 150.0) -> int:
        """Wait for `up` to end; its exit status."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"`up` did not end within {seconds} s:\n{self.output()}") from None

    def output(self) -> str:
        return self.file.with_suffix(".out").read_text()

    def children(self) -> dict[str, int]:
        """Process ids of what `up` has started, by what the command line says they are."""
        assert self.process is not None
        return {name: pid for pid in child_pids(self.process.pid) if (name := child_name(pid))}

    def step(self) -> int:
        path = self.directory / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.step() >= step or not self.alive(), 120.0, f"step {step}:\n{self.output()}")
        assert self.alive(), self.output()

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill_child(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.children()[name], number)

    def wait_for_restart(self, name: str, old: int) -> None:
        wait_until(
            lambda: self.children().get(name, old) != old, 60.0, f"restart of {name}:\n{self.output()}"
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / "student" / "model.safetensors")

    def end(self) -> None:
        """Whatever happened, nothing of this run stays."""
        if self.process is not None and self.alive():
            self.process.kill()
            self.process.wait()


def child_pids(parent: int) -> list[int]:
    """Direct children that are alive (a zombie is not)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(ppid) == parent and state != "Z":
                    found.append(int(entry.name))
    return found


def child_name(pid: int) -> str | None:
    """teacher replicas by their name, "queue", "trainer" or "sampler-N"."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return None
    if "valkey-server" in arguments[0]:
        return "queue"
    if "train" in arguments:
        return "trainer"
    for option in ("--consumer", "--name"):
        if option in arguments:
            return arguments[arguments.index(option) + 1]
    return None


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_gone(pids: list[int], seconds: float = 10.0) -> list[int]:
    """Those that still live after a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(is_alive(pid) for pid in pids):
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]
