"""Fixtures: one real server per session, and a queue of its own for every test on it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from services.queue import LeaseSettings, Queue
from services.queue.embedded import EmbeddedServer

FAST_LEASE = LeaseSettings(heartbeat=0.4)


@pytest.fixture(scope="session")
def queue_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that lives for the whole session; TUTELAGE_TEST_QUEUE_URL names another one."""
    if given := os.environ.get("TUTELAGE_TEST_QUEUE_URL"):
        yield given
        return
    with EmbeddedServer(tmp_path_factory.mktemp("queue"), dies_with_parent=True) as server:
        yield server.url


@pytest.fixture
async def queue(queue_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Queue]:
    """A queue nobody else uses: short leases, room for a hundred tokens per teacher."""
    namespace = f"{request.module.__name__}:{request.node.name}"
    async with Queue(queue_url, namespace, max_queued_tokens=100, lease=FAST_LEASE) as handle:
        yield handle
