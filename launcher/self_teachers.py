"""Self-teachers inside the trainer's process: for students so small that processes of their own are a waste.

The parts are a replica's own, without its doors: the engine that follows a channel, the core, the puller.
They live in a thread with an event loop, because the trainer's computes for as long as a step takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog
from tutelage_client.errors import TutelageError

if TYPE_CHECKING:
    from services.queue import Queue
    from services.teacher.settings import TeacherSettings
    from student_trainer.config import RunConfig

CONSUMER = "trainer"

log = structlog.get_logger(__name__)


@contextmanager
def scoring_in_process(config: RunConfig) -> Iterator[None]:
    """Score for the run's implied teachers while inside, if [self_teacher] in_process says so.

    Under torchrun it is rank 0 that does. Should a teacher fail, the trainer is asked to stop.

    Raises:
        TutelageError: on leaving, what a teacher failed with.
    """
    if not config.self_teacher.in_process or os.environ.get("RANK", "0") != "0":
        yield
        return
    thread = _TeacherThread(config)
    thread.start()
    try:
        yield
    finally:
        thread.finish()
    if thread.error is not None:
        raise thread.error


class _TeacherThread(threading.Thread):
    """Runs every implied teacher until told to finish, or until one fails."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(name="self-teachers", daemon=True)
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._finishing = False
        self.error: Exception | None = None

    def run(self) -> None:
        with contextlib.closing(self._loop):
            try:
                self._loop.run_until_complete(self._serve())
            except Exception as error:
                log.exception("self_teachers_failed")
                self.error = error
                if not self._finishing:
                    os.kill(os.getpid(), signal.SIGTERM)  # the trainer saves a checkpoint and ends

    def finish(self) -> None:
        """Finish what was claimed, and end."""
        self._finishing = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has failed
            self._loop.call_soon_threadsafe(self._over.set)
        self.join()

    async def _serve(self) -> None:
        from student_trainer.run_queue import run_queue

        async with run_queue(self._config) as queue:
            serving = [self._until_over(settings, queue) for settings in teacher_settings(self._config)]
            ends = await asyncio.gather(*serving, return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def _until_over(self, settings: TeacherSettings, queue: Queue) -> None:
        """One teacher; where it fails, the others end too."""
        try:
            await self._teach(settings, queue)
        finally:
            self._over.set()

    async def _teach(self, settings: TeacherSettings, queue: Queue) -> None:
        from services.api.core import ScoringCore
        from services.teacher.build import build_engine
        from services.teacher.following import FollowingEngine
        from services.teacher.puller import Puller

        engine = build_engine(settings)
        core = ScoringCore(
            engine,
            max_queued_tokens=settings.service.max_queued_tokens,
            max_message_bytes=settings.service.max_message_bytes,
        )
        try:
            if not await self._unless_over(engine.start()):
                return
            core.open()
            log.info("scoring_in_process", teacher=settings.name)
            puller = Puller(
                core,
                queue,
                teacher=settings.name,
                consumer=CONSUMER,
                concurrency=settings.queue_concurrency,
                following=engine if isinstance(engine, FollowingEngine) else None,
            )
            pulling = asyncio.create_task(puller.run())
            lost = asyncio.create_task(engine.ended())
            stopping = asyncio.create_task(self._over.wait())
            await asyncio.wait({pulling, lost, stopping}, return_when=asyncio.FIRST_COMPLETED)
            puller.stop()
            if lost.done():
                raise TutelageError("INTERNAL", f"teacher {settings.name}: the engine was lost; see the log")
            lost.cancel()
            stopping.cancel()
            await pulling
        finally:
            await engine.close()

    async def _unless_over(self, starting: Coroutine[None, None, None]) -> bool:
        """Whether it came to its end before somebody said stop."""
        task, stopping = asyncio.ensure_future(starting), asyncio.create_task(self._over.wait())
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False


def teacher_settings(config: RunConfig) -> list[TeacherSettings]:
    """A replica's settings for every implied teacher of the run."""
    from services.teacher.settings import TeacherSettings
    from student_trainer.run_queue import queue_url

    found = []
    for name, entry in config.implied_teachers().items():
        directory = config.followed(name)
        weights = {"follow": directory} if directory else {"model": entry.model, "revision": entry.revision}
        found.append(
            TeacherSettings(
                name=name,
                dtype=entry.dtype,
                device=entry.device,
                max_batch_tokens=entry.max_batch_tokens,
                deterministic=config.run.deterministic,
                threads=config.threads,
                queue_url=queue_url(config),
                namespace=config.queue.namespace,
                heartbeat_seconds=config.queue.heartbeat_seconds,
                **weights,
            )
        )
    return found
