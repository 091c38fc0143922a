"""A teacher replica: one engine behind gRPC, HTTP and, when given one, the queue.

Order of life: listen (health says no) → load the model → serve → SIGTERM → refuse new work →
finish what was accepted → exit 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path
from typing import NoReturn

import structlog
from tutelage_client.errors import TutelageError

from services import tracing
from services.api.core import ScoringCore
from services.api.grpc_server import GrpcServer
from services.api.http_app import build_app, build_metrics_app
from services.api.http_server import HttpServer
from services.api.metrics import Metrics
from services.exit_status import EXIT_FAILED, end_here, exit_status
from services.logs import log_to_stderr
from services.teacher.build import build_cached
from services.teacher.engine import Engine
from services.teacher.following import FollowingEngine
from services.teacher.puller import Puller
from services.teacher.settings import TeacherSettings

_CLOSE_SECONDS = 2.0
_QUIET_SECONDS = 0.2

_log = structlog.get_logger(__name__)


def main(settings: TeacherSettings) -> NoReturn:
    """Run until SIGTERM or SIGINT and end the process: 0 when everything accepted was finished, else 1;
    2 when the settings are to blame and another start would end the same way.

    The process ends without the interpreter's own shutdown: tearing a gRPC server down while callers
    keep coming can crash (see GrpcServer.stop), and a closed socket tells them all they need.
    """
    log_to_stderr()
    structlog.contextvars.bind_contextvars(teacher=settings.name, replica=settings.consumer)
    asyncio.run(_run_to_the_end(settings))
    raise AssertionError("the process has ended")


async def _run_to_the_end(settings: TeacherSettings) -> NoReturn:
    try:
        tracing.start("tutelage-teacher", settings.consumer)
        status = await Replica(settings).run()
    except (OSError, TutelageError) as error:
        _log.error("cannot_serve", error=str(error))
        status = exit_status(error)
    except Exception:  # noqa: BLE001 - logged, and nobody is left to raise it to
        _log.exception("replica_failed")
        status = EXIT_FAILED
    await asyncio.to_thread(tracing.stop)
    end_here(status)


class Replica:
    """The parts of one replica and the order in which they start and stop."""

    def __init__(self, settings: TeacherSettings) -> None:
        self._settings = settings
        service = settings.service
        metrics = Metrics()
        self._engine: Engine = build_cached(settings, metrics)
        self._core = ScoringCore(
            self._engine,
            max_queued_tokens=service.max_queued_tokens,
            max_message_bytes=service.max_message_bytes,
            metrics=metrics,
        )
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._pullers: list[Puller] = []

    async def run(self) -> int:
        """Listen, load, serve, drain."""
        self._catch_signals()
        service, core = self._settings.service, self._core
        tokens = service.token_check()
        self._grpc = GrpcServer(core, service)
        self._http = [HttpServer(build_app(core, service, tokens), service.host, service.http_port, service)]
        if service.metrics_port is not None:
            app = build_metrics_app(core, service, tokens)
            self._http.append(HttpServer(app, service.metrics_host, service.metrics_port, service))
        try:
            await self._grpc.start()
            for server in self._http:
                await server.start()
            _log.info("listening", **self._addresses())
            if not await self._load():
                return 0
            return await self._serve()
        finally:
            await self._close()

    async def _load(self) -> bool:
        """Start the engine and announce readiness; False when told to stop meanwhile."""
        loading = asyncio.create_task(self._engine.start())
        await self._until_stopped_or(loading)
        if not loading.done():
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            return False
        await loading
        self._core.open()
        await self._grpc.set_serving()
        if self._settings.ready_file is not None:
            _write_whole(self._settings.ready_file, json.dumps({**self._addresses(), "pid": os.getpid()}))
        for identity in self._core.identities:
            _log.info("ready", served=identity.name, model=identity.model, revision=identity.revision)
        return True

    async def _serve(self) -> int:
        """Until a signal, until the engine is lost, or until the connection to the queue ends in an error."""
        lost = asyncio.create_task(self._engine.ended())
        async with contextlib.AsyncExitStack() as stack:
            pulling: asyncio.Task[None] | None = None
            if self._settings.queue_url is not None:
                pulling = asyncio.create_task(self._pull(stack, self._settings.queue_url))
            await self._until_stopped_or(lost, *([pulling] if pulling else []))
            if lost.done():
                _log.error("engine_lost", hint="another start loads the model anew")
            failed = lost.done() or (pulling is not None and pulling.done())
            drained = await self._drain(pulling)
            if lost.done():
                return EXIT_FAILED
            lost.cancel()
            if failed and pulling is not None and (error := pulling.exception()) is not None:
                _log.error("queue_failed", error=str(error))
                return exit_status(error)
            return 0 if drained and not failed else EXIT_FAILED

    async def _pull(self, stack: contextlib.AsyncExitStack, url: str) -> None:
        from services.queue import LeaseSettings, Queue

        settings = self._settings
        lease = LeaseSettings(heartbeat=settings.heartbeat_seconds)
        queue = await stack.enter_async_context(Queue(url, settings.namespace, lease=lease))
        self._pullers = [
            Puller(
                self._core,
                queue,
                teacher=identity.name,
                consumer=settings.consumer,
                concurrency=settings.queue_concurrency,
                following=self._engine if isinstance(self._engine, FollowingEngine) else None,
            )
            for identity in self._core.identities
        ]
        try:
            async with asyncio.TaskGroup() as pulling:
                for puller in self._pullers:
                    pulling.create_task(puller.run())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def _drain(self, pulling: asyncio.Task[None] | None) -> bool:
        """Refuse new work at once, finish the rest within the grace period; False when some was left."""
        self._core.begin_drain()
        await self._grpc.begin_drain()
        _log.info("draining", tokens=self._core.admission.queued_tokens)
        for puller in self._pullers:
            puller.stop()
        if pulling is not None and not self._pullers:
            pulling.cancel()
        finished = asyncio.create_task(self._finished(pulling))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait(
            {finished, hurry}, timeout=self._settings.grace_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        hurry.cancel()
        if finished.done():
            _log.info("drained")
            return True
        _log.warning("drain_cut_short", tokens=self._core.admission.queued_tokens)
        for puller in self._pullers:
            puller.hurry()
        await asyncio.wait({finished}, timeout=_CLOSE_SECONDS)
        return False

    async def _finished(self, pulling: asyncio.Task[None] | None) -> None:
        await self._core.drained()
        if pulling is not None:
            await asyncio.wait({pulling})

    async def _close(self) -> None:
        await self._grpc.settle(_QUIET_SECONDS, _CLOSE_SECONDS)
        for server in self._http:
            await server.stop(_CLOSE_SECONDS)
        await self._engine.close()
        if self._settings.ready_file is not None:
            self._settings.ready_file.unlink(missing_ok=True)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        """The first asks to finish, the second to hurry."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _until_stopped_or(self, *tasks: asyncio.Task[None]) -> None:
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    def _addresses(self) -> dict[str, str]:
        addresses = {"grpc": self._grpc.address, "http": self._http[0].url}
        if len(self._http) > 1:
            addresses["metrics"] = self._http[1].url
        return addresses


def _write_whole(path: Path, text: str) -> None:
    """Write under another name and rename, so that a reader sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
