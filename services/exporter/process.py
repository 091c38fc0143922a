"""The exporter process: a port for Prometheus, asked about the queue at every scrape.

It keeps nothing: a figure is of the moment of its scrape, or it is not there.
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Self

import redis
import structlog
from prometheus_client import CollectorRegistry
from pydantic import Field, model_validator

from services.access import LOOPBACK, TokenCheck, TokenSettings, check_exposure
from services.exporter.families import QueueCollector
from services.logs import log_to_stderr
from services.metrics_server import PLAIN, MetricsServer, metrics_page
from services.queue import LeaseSettings, Overview, Queue
from services.queue_address import QueueAddress

# A look is tried again for so long, because a server that has just restarted wants it; one that hangs is left
# sooner than Prometheus, which by default waits for 10 s, leaves us.
RETRY_SECONDS, PATIENCE_SECONDS = 1.0, 4.0
REPORT_EVERY = 30.0

log = structlog.get_logger(__name__)


class ExporterSettings(TokenSettings):
    """Where the queue is, and where to listen."""

    queue_url: QueueAddress = Field(description="redis://, rediss:// or unix:// address of the queue")
    namespace: str = Field(default="tutelage", description="prefix of every key in the queue")
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, description="of the replicas: after 1.5 of these a silent one's jobs wait again"
    )
    host: str = Field(
        default=LOOPBACK, description="address to listen on; beyond loopback a token is required"
    )
    port: int = Field(default=9465, ge=0, le=65535, description="0 picks a free one")

    @model_validator(mode="after")
    def _closed_by_default(self) -> Self:
        check_exposure([self.host], with_token=self.with_token, remedy="a token")
        return self


def main(settings: ExporterSettings) -> int:
    """Answer scrapes until SIGTERM or SIGINT, then end at once; always 0.

    Raises:
        TutelageError: a token file without a token, or a port that cannot be had.
    """
    log_to_stderr()
    tokens = settings.token_check()
    asyncio.run(_serve(settings, tokens))
    return 0


async def _serve(settings: ExporterSettings, tokens: TokenCheck) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    queue = Queue(
        settings.queue_url, settings.namespace, lease=LeaseSettings(heartbeat=settings.heartbeat_seconds)
    )
    registry = CollectorRegistry()
    registry.register(QueueCollector(Lookout(queue, loop).look))
    pages = {"/metrics": metrics_page(registry), "/ready": lambda: (PLAIN, b"ok\n")}
    with MetricsServer(pages, host=settings.host, port=settings.port, tokens=tokens) as server:
        log.info("listening", address=server.address, token=tokens.required)
        await stop.wait()
    # Without closing the queue's connections: they end with the process, and the server may be away.


class Lookout:
    """Looks at the queue on behalf of the threads that answer scrapes, one look at a time."""

    def __init__(self, queue: Queue, loop: asyncio.AbstractEventLoop) -> None:
        self._queue = queue
        self._loop = loop
        self._one_at_a_time = asyncio.Lock()
        self._away_since: float | None = None
        self._reported = 0.0

    def look(self) -> Overview | None:
        """An overview of this moment, or None when the queue has none to give; called from a thread."""
        return asyncio.run_coroutine_threadsafe(self._look(), self._loop).result()

    async def _look(self) -> Overview | None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS), self._one_at_a_time:
                overview = await self._queue.overview(RETRY_SECONDS)
        except (TimeoutError, redis.RedisError, OSError) as error:
            self._report(error)
            return None
        if self._away_since is not None:
            log.info("queue_answers_again", seconds=round(time.monotonic() - self._away_since, 1))
            self._away_since = None
        return overview

    def _report(self, error: BaseException) -> None:
        now = time.monotonic()
        if self._away_since is None:
            self._away_since, self._reported = now, now - REPORT_EVERY
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            log.warning("queue_gives_no_answer", error=str(error) or f"none in {PATIENCE_SECONDS:g} s")
