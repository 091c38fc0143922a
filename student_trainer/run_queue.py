"""The queue of a run, as its processes open it."""

from __future__ import annotations

from services.queue import LeaseSettings, Queue
from services.queue.embedded import EmbeddedServer
from student_trainer.config import RunConfig


def queue_url(config: RunConfig) -> str:
    """The server's address; an embedded one lives in the run's directory."""
    if config.queue.url == "embedded":
        return EmbeddedServer(config.run.directory / "queue").url
    return config.queue.url


def run_queue(config: RunConfig) -> Queue:
    """A handle on the run's queue, not yet connected."""
    settings = config.queue
    return Queue(
        queue_url(config),
        settings.namespace,
        max_queued_tokens=settings.max_queued_tokens,
        lease=LeaseSettings(heartbeat=settings.heartbeat_seconds),
    )
