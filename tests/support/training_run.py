"""Whole training runs with real processes: a Valkey, a teacher replica, samplers, a trainer, tiny models.

Processes are forked from one server that has imported torch once, so that a test can afford to
kill and restart them; each is a process of its own with its own process id.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from services.queue.embedded import EmbeddedServer
from student_trainer.channels import channel_directory
from student_trainer.config import RunConfig, load_run_config
from student_trainer.objective.view_names import self_teacher
from student_trainer.tasks.addition import CHARACTERS
from student_trainer.tasks.characters import MODEL_ROWS, character_tokenizer

HEARTBEAT = 0.5
_PROCESSES = ("student_trainer.train", "student_trainer.sampler.process", "services.teacher.process")


def write_model(directory: Path, seed: int, head_dim: int = 16, hidden: int = 32) -> Path:
    """A random Qwen3 of 17,632 parameters with the character tokenizer; vLLM wants a head_dim of 32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=MODEL_ROWS,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    character_tokenizer(CHARACTERS).save_pretrained(directory)
    return directory


RUN_FILE = """
[run]
name = "{name}"
directory = "{directory}"
deterministic = {deterministic}
threads = 1

[queue]
url = "{url}"
heartbeat_seconds = {heartbeat}

[teachers.big]
model = "{teacher}"

[student]
model = "{student}"
{student_extra}

[data]
task = "addition"

[sampling]
samples_per_prompt = 2
max_new_tokens = 6
groups_per_order = 4

[objective]
{objective}

[training]
prompts_per_step = 8
learning_rate = 1e-2
trackers = []
{training}
"""

PATHWISE = """
divergence = "kl_student_teacher"
support = "student_topk"
k = 16
tail = "bucket"
estimator = "pathwise"
"""


class TrainingRun:
    """One run file and the processes that work on it."""

    def __init__(
        self,
        root: Path,
        url: str,
        models: Path,
        *,
        name: str,
        training: str,
        deterministic: bool = True,
        objective: str = PATHWISE,
        student_extra: str = "",
    ) -> None:
        self.directory = root / name
        self.file = root / f"{name}.toml"
        self.file.write_text(
            RUN_FILE.format(
                name=name,
                directory=self.directory,
                deterministic=str(deterministic).lower(),
                url=url,
                heartbeat=HEARTBEAT,
                teacher=models / "teacher",
                student=models / "student",
                student_extra=student_extra,
                objective=objective,
                training=training,
            )
        )
        self.config: RunConfig = load_run_config(self.file)
        self.logs = root / f"{name}-logs"
        self.logs.mkdir()

    def metrics(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return []
        records = []
        for line in path.read_text().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def steps(self) -> list[int]:
        return [record["step"] for record in self.metrics() if "step" in record]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / "student" / "model.safetensors")

    def ledger(self) -> dict[str, Any]:
        newest = max((self.directory / "checkpoints").glob("step-*"))
        ledger: dict[str, Any] = json.loads((newest / "ledger.json").read_text())
        return ledger

    def log(self, process: str) -> str:
        path = self.logs / f"{process}.log"
        return path.read_text() if path.exists() else ""


class Processes:
    """Starts and ends the processes of runs; everything it started ends with the context."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PROCESSES))
        self._started: list[ForkServerProcess] = []

    def trainer(self, run: TrainingRun) -> ForkServerProcess:
        return self._start(run_trainer, (str(run.file), str(run.logs / "trainer.log")))

    def sampler(self, run: TrainingRun, name: str = "sampler-0") -> ForkServerProcess:
        return self._start(run_sampler, (str(run.file), name, str(run.logs / f"{name}.log")))

    def teacher(self, url: str, model: Path, log: Path, name: str = "big") -> ForkServerProcess:
        return self._start(run_teacher, (url, str(model), name, str(log)))

    def self_teacher(self, run: TrainingRun, channel: str, follow: Path | None = None) -> ForkServerProcess:
        """One that follows a channel of the run, or says so and follows another directory."""
        teacher = self_teacher(channel, run.config.run.name)
        directory = follow or channel_directory(run.directory, channel)
        log = run.logs / f"{teacher}.log"
        concurrency = 8 if follow is None else 1  # a stranger must not take all there is
        return self._start(
            run_follower, (run.config.queue.url, str(directory), teacher, str(log), concurrency)
        )

    def _start(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> ForkServerProcess:
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        self._started.append(process)
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            if process.is_alive():
                process.kill()
            process.join(10)


def kill(process: ForkServerProcess) -> None:
    """kill -9, and wait until it is gone."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0, what: str = "") -> None:
    """Poll; fails when the condition does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.01)


def finish(process: ForkServerProcess, run: TrainingRun, seconds: float = 90.0) -> None:
    """Wait for a trainer that must end well."""
    process.join(seconds)
    assert process.exitcode == 0, f"exit code {process.exitcode}\n{run.log('trainer')[-3000:]}"


def _log_to(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run_trainer(run_file: str, log: str) -> None:
    _log_to(log)
    from launcher.self_teachers import scoring_in_process
    from student_trainer.train import main

    config = load_run_config(Path(run_file))
    with scoring_in_process(config):
        status = main(config)
    raise SystemExit(status)


def run_sampler(run_file: str, name: str, log: str) -> None:
    _log_to(log)
    from student_trainer.sampler.process import main

    raise SystemExit(main(load_run_config(Path(run_file)), name))


def run_teacher(url: str, model: str, name: str, log: str) -> None:
    run_replica(url, log, name=name, model=model)


def run_follower(url: str, directory: str, name: str, log: str, concurrency: int) -> None:
    run_replica(url, log, name=name, follow=Path(directory), queue_concurrency=concurrency)


def run_replica(url: str, log: str, **what: Any) -> None:
    """A teacher that takes jobs from the queue; `what` are its settings."""
    _log_to(log)
    from services.api.settings import ServiceSettings
    from services.teacher.process import main
    from services.teacher.settings import TeacherSettings

    settings = TeacherSettings(
        **what,
        dtype="float32",
        device="cpu",
        deterministic=True,
        queue_url=url,
        heartbeat_seconds=HEARTBEAT,
        service=ServiceSettings(grpc_port=0, http_port=0),
    )
    raise SystemExit(main(settings))


def start_server(directory: Path) -> EmbeddedServer:
    server = EmbeddedServer(directory)
    server.start()
    return server
