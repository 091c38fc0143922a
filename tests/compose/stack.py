"""One stack of docker-compose.yml, driven as a person would drive it, and looked at from outside."""

from __future__ import annotations

import json
import os
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUICKSTART = "recipes/quickstart-vllm.toml"
PASSWORD = 'REDISCLI_AUTH="$(cat /run/tutelage/queue-password)"'


@dataclass(frozen=True)
class Run:
    """What a run file says of the run's size."""

    file: str
    name: str
    steps: int
    prompts_per_step: int


def read_run(file: str) -> Run:
    document = tomllib.loads((ROOT / file).read_text())
    training = document["training"]
    return Run(file, document["run"]["name"], training["steps"], training["prompts_per_step"])


@contextmanager
def longer_quickstart(steps: int) -> Iterator[Run]:
    """The quickstart with more steps: a run file where compose mounts them, removed at the end."""
    quickstart, text = read_run(QUICKSTART), (ROOT / QUICKSTART).read_text()
    before = f"steps = {quickstart.steps}\n"
    assert text.count(before) == 1, f"{QUICKSTART}: {before!r} is not there once"
    text = text.replace(before, f"steps = {steps}\n").replace(quickstart.name, "check-stack")
    file = ROOT / "recipes/check-stack.toml"
    file.write_text(text)
    try:
        yield read_run(str(file.relative_to(ROOT)))
    finally:
        file.unlink()


@dataclass
class Stack:
    """A compose project of its own, so that a person's stack is left alone."""

    project: str = "tutelage-check"
    run: Run = field(default_factory=lambda: read_run(QUICKSTART))
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:7.1f} s  {text}", flush=True)

    def compose(self, *arguments: str, check: bool = True, quiet: bool = True) -> str:
        """`docker compose …`; its output."""
        command = ["docker", "compose", "--project-name", self.project, *arguments]
        return run(command, check=check, quiet=quiet, RUN_FILE=self.run.file)

    def containers(self, service: str) -> list[str]:
        """Running containers of a service, oldest number first."""
        listed = self.compose("ps", "--format", "json", service, check=False)
        found = [json.loads(line) for line in listed.splitlines() if line.startswith("{")]
        return sorted(entry["Name"] for entry in found if entry["State"] == "running")

    def container(self, service: str, number: int = 1) -> str:
        return f"{self.project}-{service}-{number}"

    def inspect(self, name: str) -> dict[str, Any]:
        return json.loads(run(["docker", "inspect", name]))[0]  # type: ignore[no-any-return]

    def healthy(self, service: str) -> int:
        """How many containers of a service say that they are well."""
        return sum(self.health(name) == "healthy" for name in self.containers(service))

    def health(self, name: str) -> str:
        """What Docker thinks of a container: "healthy", "starting", "unhealthy" or, without a check, ""."""
        state: dict[str, Any] = self.inspect(name)["State"]
        return str(state.get("Health", {}).get("Status", ""))

    def log(self, name: str, since: float) -> str:
        """What a container has written since a unix time."""
        command = ["docker", "logs", "--since", f"{since:.0f}", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    def execute(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """A command in the first container of a service, however it ends; 124 when it does not."""
        whole = ["docker", "exec", self.container(service), *command]
        try:
            return subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(whole, 124, "", "no end within 60 s")

    def queue(self, *command: str) -> str | None:
        """An answer of the queue; None while it is away or reads its file."""
        words = " ".join(f"'{word}'" for word in command)
        shell = f"{PASSWORD} valkey-cli -e --no-auth-warning {words}"
        done = self.execute("queue", "sh", "-c", shell)
        return done.stdout.strip() if done.returncode == 0 else None

    def progress(self, name: str) -> Any:
        """One figure of the run's progress; None while it is unknown."""
        answer = self.queue("HGET", f"tutelage:run:{self.run.name}", name)
        return json.loads(answer) if answer else None

    def step(self) -> int:
        return int(self.progress("step") or 0)

    def in_report(self, *command: str) -> str:
        """Output of a command in the report's container, which sees the run directory."""
        return run(["docker", "exec", self.container("report"), *command])

    def file(self, path: str) -> str:
        """A file of the run directory."""
        return self.in_report("cat", f"runs/{self.run.name}/{path}")

    def ledger(self) -> dict[str, Any]:
        """That of the newest checkpoint."""
        listed = self.in_report("ls", f"runs/{self.run.name}/checkpoints").split()
        newest = max(name for name in listed if name.startswith("step-"))
        return json.loads(self.file(f"checkpoints/{newest}/ledger.json"))  # type: ignore[no-any-return]

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 900.0) -> float:
        """Until a condition holds; the seconds that it took."""
        begun = time.monotonic()
        while not condition():
            if time.monotonic() - begun > seconds:
                raise SystemExit(f"FAILED: waited {seconds:.0f} s in vain for {what}")
            time.sleep(0.5)
        return time.monotonic() - begun


def run(command: list[str], *, check: bool = True, quiet: bool = True, **environment: str) -> str:
    """A command's output; ends the check with its errors when it fails."""
    done = subprocess.run(
        command, cwd=ROOT, text=True, check=False, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None,
    )  # fmt: skip
    if check and done.returncode != 0:
        raise SystemExit(f"FAILED: {' '.join(command)}: status {done.returncode}\n{done.stderr or ''}")
    return done.stdout
