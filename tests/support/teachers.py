"""Teachers for tests: a recording scorer, both doors over it in process, and real processes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tutelage_client.types import Identity, Int32Array, Limits, Score, ScoreRequest

from services.access import TokenCheck
from services.api.core import ScoringCore
from services.api.grpc_server import GrpcServer
from services.api.http_app import build_app
from services.api.http_server import HttpServer
from services.api.settings import ServiceSettings
from services.teacher.engine import Scorer
from services.teacher.engines.fake import FakeEngine, FakeSettings
from services.teacher.settings import TeacherSettings

VOCAB = 100
LIMITS = Limits(
    max_sequences=8,
    max_sequence_tokens=64,
    max_request_tokens=256,
    max_top_k=16,
    max_candidates=16,
    max_message_bytes=64 * 1024,
)

PROGRAM = """
import sys
from services.teacher.process import main
from services.teacher.settings import TeacherSettings
sys.exit(main(TeacherSettings.model_validate_json(sys.argv[1])))
"""


class RecordingScorer:
    """The fake engine, with a list of what reached it and a gate to hold answers back."""

    def __init__(self, limits: Limits = LIMITS, **settings: Any) -> None:
        self.engine = FakeEngine(FakeSettings(**{"vocab_size": VOCAB, **settings}), limits=limits)
        self.reached: list[ScoreRequest] = []
        self.cancelled_at: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def identity(self) -> Identity:
        return self.engine.identity

    @property
    def identities(self) -> tuple[Identity, ...]:
        return self.engine.identities

    @property
    def limits(self) -> Limits:
        return self.engine.limits

    async def score(self, request: ScoreRequest) -> Score:
        self.reached.append(request)
        try:
            await self.gate.wait()
            return await self.engine.score(request)
        except asyncio.CancelledError:
            self.cancelled_at.append(time.perf_counter())
            raise


class SeveralTeachers:
    """Fake teachers that answer side by side, each with numbers of its own, as adapters of one model do."""

    def __init__(self, *names: str) -> None:
        self.engines = {
            name: FakeEngine(FakeSettings(vocab_size=VOCAB, seed=seed), name=name, limits=LIMITS)
            for seed, name in enumerate(names)
        }

    @property
    def identity(self) -> Identity:
        return self.identities[0]

    @property
    def identities(self) -> tuple[Identity, ...]:
        return tuple(engine.identity for engine in self.engines.values())

    @property
    def limits(self) -> Limits:
        return LIMITS

    async def score(self, request: ScoreRequest) -> Score:
        return await self.engines[request.teacher].score(request)


@dataclass(frozen=True)
class Doors:
    """A core and the addresses of its two doors."""

    core: ScoringCore
    grpc: str
    http: str


@asynccontextmanager
async def serve(scorer: Scorer, **service: Any) -> AsyncIterator[Doors]:
    """Both doors over `scorer`, in this process and event loop."""
    options = {"grpc_port": 0, "http_port": 0, "max_message_bytes": scorer.limits.max_message_bytes}
    settings = ServiceSettings(**{**options, **service})
    core = ScoringCore(
        scorer, max_queued_tokens=settings.max_queued_tokens, max_message_bytes=settings.max_message_bytes
    )
    grpc_server = GrpcServer(core, settings)
    app = build_app(core, settings, TokenCheck(settings.read_tokens()))
    http_server = HttpServer(app, settings.host, settings.http_port, settings)
    await grpc_server.start()
    await http_server.start()
    core.open()
    await grpc_server.set_serving()
    try:
        yield Doors(core, grpc_server.address, http_server.url)
    finally:
        core.begin_drain()
        await grpc_server.stop()
        await http_server.stop(0.2)


def http_client(url: str) -> httpx.AsyncClient:
    """Without the certificates that nobody here needs and that take long to load."""
    return httpx.AsyncClient(base_url=url, verify=False, timeout=30)


def ids(*values: int) -> Int32Array:
    return np.array(values, dtype=np.int32)


class TeacherProcess:
    """A replica as a real process, with the fake engine unless told otherwise.

    `program` is Python that takes the settings, as JSON, for its first argument.
    """

    def __init__(self, directory: Path, *, program: str = PROGRAM, **settings: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._ready_file = directory / "ready.json"
        self.log = directory / "teacher.log"
        service = {"grpc_port": 0, "http_port": 0, **settings.pop("service", {})}
        options = {"engine": "fake", "name": "fake", "ready_file": self._ready_file, **settings}
        document = TeacherSettings(**options, service=service).model_dump_json(exclude_defaults=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, document],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.addresses: dict[str, Any] = {}

    def wait_ready(self, seconds: float = 30.0) -> TeacherProcess:
        """Until the model is loaded; fails with the log when the process ends first."""
        deadline = time.monotonic() + seconds
        while not self._ready_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.addresses = json.loads(self._ready_file.read_text())
        return self

    @property
    def grpc(self) -> str:
        return str(self.addresses["grpc"])

    @property
    def http(self) -> str:
        return str(self.addresses["http"])

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self.process.wait(30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def teacher_process(directory: Path, **settings: Any) -> Iterator[TeacherProcess]:
    """A ready replica that does not outlive the block."""
    teacher = TeacherProcess(directory, **settings)
    try:
        yield teacher.wait_ready()
    finally:
        teacher.kill()
