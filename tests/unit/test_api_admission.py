"""Admission: a bound on waiting tokens, a measured rate, and refusals that say when to come back."""

from __future__ import annotations

import asyncio

import pytest
from tutelage_client import TutelageError

from services.api.admission import Admission


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def served(admission: Admission, clock: Clock, tokens: int, seconds: float) -> None:
    admission.enter(tokens, None)
    clock.now += seconds
    admission.leave(tokens, answered=True)


def test_tokens_beyond_the_bound_are_refused_with_the_time_to_make_room() -> None:
    clock = Clock()
    admission = Admission(1000, clock)
    served(admission, clock, 500, 1.0)
    admission.enter(900, None)
    with pytest.raises(TutelageError, match="RESOURCE_EXHAUSTED: queued tokens: 900 wait") as full:
        admission.enter(600, None)
    assert full.value.retry_after == pytest.approx(1.0)  # 500 tokens too many at 500 tokens/s
    assert admission.queued_tokens == 900


def test_one_request_larger_than_the_bound_is_accepted_alone() -> None:
    admission = Admission(1000)
    admission.enter(5000, None)
    with pytest.raises(TutelageError):
        admission.enter(1, None)
    admission.leave(5000, answered=True)
    admission.enter(1, None)


def test_what_would_miss_its_deadline_is_refused_at_once() -> None:
    clock = Clock()
    admission = Admission(100_000, clock)
    served(admission, clock, 1000, 1.0)
    admission.enter(2000, 10.0)
    with pytest.raises(TutelageError, match=r"deadline: 2\.000 s are left"):
        admission.enter(1000, 2.0)
    admission.enter(1000, 4.0)


def test_a_wrong_estimate_corrects_itself_because_an_idle_service_accepts() -> None:
    clock = Clock()
    admission = Admission(100_000, clock)
    served(admission, clock, 10, 100.0)  # very slow once
    for _ in range(20):
        served(admission, clock, 1000, 1.0)
    rate = admission.tokens_per_second
    assert rate is not None
    assert rate > 500


def test_idle_time_does_not_lower_the_measured_rate() -> None:
    clock = Clock()
    admission = Admission(1000, clock)
    served(admission, clock, 100, 1.0)
    clock.now += 1000
    served(admission, clock, 100, 1.0)
    assert admission.tokens_per_second == pytest.approx(100)


def test_overlapping_requests_are_timed_once() -> None:
    clock = Clock()
    admission = Admission(10_000, clock)
    for _ in range(4):
        admission.enter(100, None)
    for _ in range(4):
        clock.now += 1.0
        admission.leave(100, answered=True)
    assert admission.tokens_per_second == pytest.approx(100)


async def test_a_caller_that_can_wait_gets_in_when_there_is_room() -> None:
    admission = Admission(100)
    admission.enter(80, None)
    waiting = asyncio.create_task(admission.enter_when_free(40))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    admission.leave(80, answered=True)
    await asyncio.wait_for(waiting, 1)
    assert admission.queued_tokens == 40
