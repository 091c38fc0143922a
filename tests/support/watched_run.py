"""A small run as it is deployed: every process by its command line, with a token and a metrics port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from services.queue.embedded import EmbeddedServer
from support.training_run import HEARTBEAT, PATHWISE, TrainingRun, wait_until, write_model

# More steps than anybody waits for; evaluated soon, because an evaluation has figures of its own.
TRAINING = """
steps = 100000
evaluate_every = 5
evaluation_prompts = 4
checkpoint_every = 5
"""
# The trainer scores with its own weights, too: their lag is a figure.
OBJECTIVE = f"""{PATHWISE}
target = "losses"
[objective.views.big]
weights = "teacher:big"
[objective.views.live]
weights = "live"
"""
MEMORY_LIMIT = 1 << 30
VLLM_OPTIONS = ("--max-model-len", "64", "--kv-cache-memory-bytes", str(1 << 26), "--enforce-eager")
START_SECONDS = 150.0


class WatchedRun:
    """Teacher, sampler, trainer and exporter at work in `directory`; all of them end with the context.

    Args:
        engine: of the teacher, transformers or vllm.
    """

    def __init__(self, directory: Path, engine: str = "transformers") -> None:
        models = directory / "models"
        for seed, name in enumerate(("teacher", "student")):
            write_model(models / name, seed, head_dim=32 if engine == "vllm" else 16)
        self._engine_options = ["--engine", engine, *(VLLM_OPTIONS if engine == "vllm" else ())]
        (directory / "queue").mkdir()
        self._server = EmbeddedServer(directory / "queue", dies_with_parent=True)
        self.token = "a-token-of-this-test"
        self.token_file = directory / "token"
        self.token_file.write_text(self.token + "\n")
        self._run = TrainingRun(
            directory,
            self._server.url,
            models,
            name="watched",
            training=TRAINING,
            objective=OBJECTIVE,
            student_extra="[self_teacher]\nin_process = true",
            deterministic=False,
        )
        self._ready_file = directory / "teacher.json"
        self._model = models / "teacher"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {name: free_port() for name in ("teacher", "exporter", "trainer", "sampler")}

    @property
    def targets(self) -> dict[str, list[str]]:
        """Where Prometheus finds each job of prometheus.yml."""
        return {name: [f"127.0.0.1:{port}"] for name, port in self._ports.items()}

    @property
    def teacher_addresses(self) -> dict[str, str]:
        """Of the teacher: grpc, http."""
        addresses: dict[str, str] = json.loads(self._ready_file.read_text())
        return addresses

    def __enter__(self) -> Self:
        try:
            self._start_all()
            wait_until(
                lambda: self._ready_file.exists() or bool(self._ended()), START_SECONDS, "the teacher's model"
            )
            self.check()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def check(self) -> None:
        """Raises AssertionError with its log when a process has ended."""
        ended = self._ended()
        assert not ended, "\n".join(f"{name}:\n{self._run.log(name)[-3000:]}" for name in ended)

    def _start_all(self) -> None:
        self._server.start()
        with redis.Redis.from_url(self._server.url) as client:
            client.config_set("maxmemory", MEMORY_LIMIT)
        url, heartbeat, token = self._server.url, str(HEARTBEAT), str(self.token_file)
        port = {name: str(number) for name, number in self._ports.items()}
        teacher = ["--name", "big", "--model", str(self._model), "--dtype", "float32", "--queue", url]
        teacher += ["--heartbeat-seconds", heartbeat, "--grpc-port", "0", "--http-port", "0"]
        teacher += ["--metrics-port", port["teacher"], "--token-file", token]
        teacher += self._engine_options
        self._start("teacher", *teacher, "--ready-file", str(self._ready_file))
        exporter = ["--queue", url, "--port", port["exporter"], "--token-file", token]
        self._start("exporter", *exporter, "--heartbeat-seconds", heartbeat)
        for command, name in (("train", "trainer"), ("rollout", "sampler")):
            metrics = ["--metrics-port", port[name], "--metrics-token-file", token]
            self._start(name, *metrics, command=command, run_file=self._run.file)

    def _end(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(10)
        self._server.stop()

    def _ended(self) -> list[str]:
        return [name for name, process in self._processes.items() if process.poll() is not None]

    def _start(self, name: str, *options: str, command: str = "", run_file: Path | None = None) -> None:
        words = [command or name, *([str(run_file)] if run_file else []), *options]
        with (self._run.logs / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "launcher", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )


def free_port() -> int:
    """A port of the loopback that nobody has at this moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
