"""The retry policy: what is tried again, for how long, and what is not."""

from __future__ import annotations

import time

import pytest
from redis import exceptions

from services.queue import LeaseSettings
from services.queue.connection import MAX_BACKOFF, Persistence, backoff


async def test_step_is_repeated_until_the_server_answers() -> None:
    tries = 0

    async def step() -> str:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise exceptions.ConnectionError("gone")
        return "done"

    assert await Persistence()(step, "testing") == "done"
    assert tries == 4


@pytest.mark.parametrize("error", [exceptions.AuthenticationError("no"), exceptions.ResponseError("ERR")])
async def test_error_that_waiting_cannot_cure_passes_at_once(error: Exception) -> None:
    async def step() -> None:
        raise error

    with pytest.raises(type(error)):
        await Persistence()(step, "testing")


async def test_patience_ends() -> None:
    async def step() -> None:
        raise exceptions.TimeoutError("slow")

    started = time.monotonic()
    with pytest.raises(exceptions.TimeoutError):
        await Persistence()(step, "testing", patience=0.1)
    assert time.monotonic() - started < 2


def test_backoff_grows_to_its_cap() -> None:
    assert max(backoff(0) for _ in range(50)) <= 0.02
    assert all(MAX_BACKOFF / 2 <= backoff(attempt) <= MAX_BACKOFF for attempt in (8, 100, 10_000))


def test_dead_work_moves_within_two_heartbeats_by_construction() -> None:
    lease = LeaseSettings(heartbeat=4.0)
    assert lease.lease + lease.scan <= 2 * lease.heartbeat
    assert lease.renewal * 2 < lease.lease
