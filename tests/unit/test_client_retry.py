"""Which answers are tried again, when, and at which address."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from support.get_teacher import get_teacher_server, named
from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import AsyncTeacherClient, RetryPolicy, TeacherClient, TutelageError, codec
from tutelage_client.balance import Balancer, Endpoint
from tutelage_client.retry import Attempts
from tutelage_client.stream import OpenStream

Behaviour = Callable[[int, grpc.ServicerContext], pb.GetTeacherResponse]
DOWN = TutelageError("UNAVAILABLE", "")
QUICK = RetryPolicy(attempts=4, initial_seconds=0.01, max_seconds=0.05)


def over(balancer: Balancer[None], endpoint: Endpoint[None], error: TutelageError | None = None) -> None:
    """A call of one token has ended."""
    balancer.give_back(endpoint, 1)
    balancer.observe(endpoint, error)


@contextmanager
def server(behave: Behaviour, port: int = 0) -> Iterator[tuple[str, list[float]]]:
    """A GetTeacher that behaves as told on its n-th call; yields its address and the times of calls."""
    calls: list[float] = []

    def answer(context: grpc.ServicerContext) -> pb.GetTeacherResponse:
        calls.append(time.monotonic())
        return behave(len(calls), context)

    with get_teacher_server(answer, port=port) as bound:
        yield f"127.0.0.1:{bound}", calls


def failing(code: grpc.StatusCode, times: int, retry_after: str | None = None) -> Behaviour:
    def behave(call: int, context: grpc.ServicerContext) -> pb.GetTeacherResponse:
        if call <= times:
            if retry_after is not None:
                context.set_trailing_metadata((("retry-after", retry_after),))
            context.abort(code, "not now")
        return named("here")

    return behave


def ask(address: str, timeout: float = 5.0) -> str:
    with TeacherClient(address, retry=QUICK) as client:
        return client.get_teacher(timeout=timeout).identity.name


async def ask_async(address: str, timeout: float = 5.0) -> str:  # noqa: ASYNC109
    async with AsyncTeacherClient(address, retry=QUICK) as client:
        return (await client.get_teacher(timeout=timeout)).identity.name


def ask_in_a_loop(address: str, timeout: float = 5.0) -> str:
    return asyncio.run(ask_async(address, timeout))


both_clients = pytest.mark.parametrize("ask", [ask, ask_in_a_loop], ids=["sync", "asyncio"])


@both_clients
def test_unavailable_is_tried_again(ask: Callable[..., str]) -> None:
    with server(failing(grpc.StatusCode.UNAVAILABLE, 3)) as (address, calls):
        assert ask(address) == "here"
        assert len(calls) == 4


@both_clients
def test_unavailable_is_given_up_after_the_allowed_attempts(ask: Callable[..., str]) -> None:
    with server(failing(grpc.StatusCode.UNAVAILABLE, 99)) as (address, calls):
        with pytest.raises(TutelageError, match="UNAVAILABLE: not now"):
            ask(address)
        assert len(calls) == 4


@both_clients
def test_a_full_teacher_is_asked_again_when_it_said_and_not_before(ask: Callable[..., str]) -> None:
    with server(failing(grpc.StatusCode.RESOURCE_EXHAUSTED, 2, "0.2")) as (address, calls):
        assert ask(address) == "here"
        assert calls[1] - calls[0] >= 0.2
        assert calls[2] - calls[1] >= 0.2


@both_clients
def test_a_full_teacher_is_not_waited_for_beyond_the_deadline(ask: Callable[..., str]) -> None:
    with server(failing(grpc.StatusCode.RESOURCE_EXHAUSTED, 99, "30")) as (address, calls):
        began = time.monotonic()
        with pytest.raises(TutelageError, match="RESOURCE_EXHAUSTED") as refused:
            ask(address, 1.0)
        assert refused.value.retry_after == 30
        assert time.monotonic() - began < 1.0
        assert len(calls) == 1


@both_clients
@pytest.mark.parametrize(
    "code",
    ["INVALID_ARGUMENT", "FAILED_PRECONDITION", "INTERNAL", "UNAUTHENTICATED", "NOT_FOUND", "UNKNOWN"],
)
def test_nothing_else_is_tried_again(ask: Callable[..., str], code: str) -> None:
    with server(failing(grpc.StatusCode[code], 99)) as (address, calls):
        with pytest.raises(TutelageError, match=code):
            ask(address)
        assert len(calls) == 1


def test_the_deadline_covers_all_tries_together() -> None:
    slow = RetryPolicy(attempts=1000, initial_seconds=0.05, max_seconds=0.1)
    with server(failing(grpc.StatusCode.UNAVAILABLE, 10_000)) as (address, _calls):
        began = time.monotonic()
        with TeacherClient(address, retry=slow) as client, pytest.raises(TutelageError):
            client.get_teacher(timeout=0.5)
        assert time.monotonic() - began < 0.8


def test_a_failing_address_is_avoided_while_another_answers() -> None:
    with (
        server(failing(grpc.StatusCode.UNAVAILABLE, 99)) as (bad, bad_calls),
        server(lambda _call, _context: named("good")) as (good, good_calls),
        TeacherClient([bad, good], retry=QUICK) as client,
    ):
        for _ in range(20):
            assert client.get_teacher().identity.name == "good"
        assert len(good_calls) == 20
        assert len(bad_calls) <= 2


def test_an_address_where_nobody_listens_is_avoided() -> None:
    with server(lambda _call, _context: named("good")) as (good, calls):
        with TeacherClient(["127.0.0.1:1", good], retry=QUICK) as client:
            for _ in range(5):
                assert client.get_teacher().identity.name == "good"
        assert len(calls) == 5


def test_the_address_with_the_fewest_outstanding_tokens_is_chosen() -> None:
    balancer = Balancer([Endpoint(name, None) for name in "abc"])
    first, second, third, fourth = [balancer.take(tokens) for tokens in (100, 10, 50, 20)]
    assert len({first.address, second.address, third.address}) == 3
    assert fourth is second
    balancer.give_back(first, 100)
    assert balancer.take(1) is first


def test_idle_addresses_are_taken_in_no_fixed_order() -> None:
    firsts = {Balancer([Endpoint(name, None) for name in "abc"]).take(1).address for _ in range(100)}
    assert firsts == set("abc")


def test_a_call_without_tokens_is_load_too() -> None:
    balancer = Balancer([Endpoint(name, None) for name in "abc"])
    assert len({balancer.take(0).address for _ in range(3)}) == 3


def test_a_stream_is_load_with_what_it_still_waits_for() -> None:
    balancer = Balancer([Endpoint("a", None), Endpoint("b", None)])
    stream, other = OpenStream(balancer), OpenStream(balancer)
    assert stream.endpoint is not other.endpoint
    request = codec.build_request([[1, 2]], [[3]], request_id="x")
    stream.sending(request)
    stream.sending(request)
    assert stream.endpoint.outstanding_tokens == 7
    stream.answered(pb.ScoreResponse(request_id="x"))
    assert stream.endpoint.outstanding_tokens == 4
    stream.close(None)
    stream.sending(request)  # gRPC's thread may still be reading the caller's requests
    assert stream.endpoint.outstanding_tokens == 0


def test_a_full_address_is_left_for_another_at_once_and_for_as_long_as_it_said() -> None:
    with (
        server(failing(grpc.StatusCode.RESOURCE_EXHAUSTED, 99, "30")) as (full, full_calls),
        server(lambda _call, _context: named("free")) as (free, _calls),
    ):
        for _ in range(4):
            with TeacherClient([full, free], retry=QUICK) as client:
                began = time.monotonic()
                for _ in range(6):
                    assert client.get_teacher(timeout=5.0).identity.name == "free"
                assert time.monotonic() - began < 1.0
                assert len(full_calls) <= 1
            full_calls.clear()


def test_when_all_addresses_are_full_the_first_to_have_room_is_waited_for() -> None:
    with (
        server(failing(grpc.StatusCode.RESOURCE_EXHAUSTED, 99, "30")) as (full, _),
        server(failing(grpc.StatusCode.RESOURCE_EXHAUSTED, 1, "0.2")) as (soon, calls),
        TeacherClient([full, soon], retry=QUICK) as client,
    ):
        assert client.get_teacher(timeout=5.0).identity.name == "here"
        assert calls[1] - calls[0] >= 0.2


def test_a_single_address_is_never_given_up() -> None:
    balancer = Balancer([Endpoint("a", None)])
    for _ in range(5):
        endpoint = balancer.take(1)
        over(balancer, endpoint, DOWN)
    assert balancer.take(1).address == "a"


def test_when_all_addresses_failed_the_one_that_did_so_longest_ago_is_tried() -> None:
    """Replicas restarted in turn: the first one is back and still rests while the second one goes."""
    balancer = Balancer([Endpoint("a", None), Endpoint("b", None)])
    restarted, going = balancer.endpoints
    for _ in range(6):
        restarted.outstanding_tokens += 1
        over(balancer, restarted, DOWN)
    taken = balancer.take(1)
    assert taken is going
    over(balancer, taken, DOWN)
    assert balancer.take(1) is restarted, "not the one that has just failed, though it rests for less long"


def test_rest_grows_with_failures_and_ends_with_the_first_success() -> None:
    balancer = Balancer([Endpoint("a", None), Endpoint("b", None)])
    bad = balancer.endpoints[0]
    rests = []
    for _ in range(4):
        bad.outstanding_tokens += 1
        over(balancer, bad, DOWN)
        rests.append(bad.resting_until - time.monotonic())
    np.testing.assert_allclose(rests, [0.5, 1, 2, 4], atol=0.1)
    assert balancer.take(1).address == "b"
    bad.outstanding_tokens += 1
    over(balancer, bad)
    assert balancer.take(1).address == "a"


def test_pauses_grow_and_carry_jitter() -> None:
    policy = RetryPolicy(attempts=50, initial_seconds=0.1, max_seconds=1.0)
    pauses: list[list[float]] = []
    for _ in range(200):
        attempts = Attempts(policy, None)
        pauses.append([attempts.pause_after(DOWN, 0.0) for _ in range(6)])
    longest = np.array(pauses).max(axis=0)
    np.testing.assert_allclose(longest, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0], rtol=0.1)
    assert np.array(pauses).std(axis=0).min() > 0.02


def test_a_teacher_that_is_replaced_is_waited_for_by_default() -> None:
    """A container, or a pod with a small model, is back within half a minute."""
    waits = []
    for _ in range(200):
        attempts = Attempts(RetryPolicy(), None)
        waits.append(sum(attempts.pause_after(DOWN, 0.0) for _ in range(RetryPolicy().attempts - 1)))
        with pytest.raises(TutelageError, match="UNAVAILABLE"):
            attempts.pause_after(DOWN, 0.0)
    assert min(waits) > 25
    assert 45 < float(np.mean(waits)) < 75


def test_an_outage_is_told_once_and_so_is_its_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    balancer = Balancer([Endpoint("a:1", None)])
    (endpoint,) = balancer.endpoints
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    told = []
    for error, seconds in (
        (DOWN, 4),
        (None, 4),
        (DOWN, 4),
        (DOWN, 4),
        (DOWN, 4),
        (DOWN, 4),
        (None, 4),
        (None, 4),
    ):
        over(balancer, balancer.take(1), error)
        clock += seconds
        told.append([record.getMessage() for record in caplog.records])
        caplog.clear()
    assert told[4] == ["a:1: 3 calls in a row have failed, the first 8 s ago; UNAVAILABLE: "]
    assert told[6] == ["a:1: answers again"]
    assert [len(lines) for lines in told] == [0, 0, 0, 0, 1, 0, 1, 0]
    assert endpoint.outstanding_tokens == 0


async def test_a_call_that_ends_on_this_side_says_nothing_of_the_teacher() -> None:
    def behave(call: int, context: grpc.ServicerContext) -> pb.GetTeacherResponse:
        if call == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        time.sleep(1.0)
        return named("late")

    with server(behave) as (address, calls):
        async with AsyncTeacherClient(address, retry=RetryPolicy(attempts=1)) as client:
            (endpoint,) = client._balancer.endpoints
            with pytest.raises(TutelageError, match="UNAVAILABLE"):
                await client.get_teacher()
            waiting = asyncio.create_task(client.get_teacher())
            while len(calls) < 2:  # noqa: ASYNC110 - calls come from the server's threads
                await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert endpoint.failures == 1
            assert endpoint.outstanding_tokens == 0
            client._balancer.observe(endpoint, TutelageError("CANCELLED", "client: it is closed"))
            assert endpoint.failures == 1
            await client.get_teacher()
            assert endpoint.failures == 0


def test_no_address_is_refused() -> None:
    for nothing in ("", [], ["a:1", ""]):
        with pytest.raises(TutelageError, match="INVALID_ARGUMENT: addresses"):
            TeacherClient(nothing)


async def test_a_closed_client_raises_cancelled_and_tries_no_more() -> None:
    patient = RetryPolicy(attempts=1000, initial_seconds=20, max_seconds=20)
    with server(failing(grpc.StatusCode.UNAVAILABLE, 10_000)) as (address, calls):
        sync, later = TeacherClient(address, retry=patient), AsyncTeacherClient(address, retry=patient)
        waiting = [
            asyncio.create_task(asyncio.to_thread(sync.get_teacher)),
            asyncio.create_task(later.get_teacher()),
        ]
        while len(calls) < 2:  # noqa: ASYNC110 - calls come from the server's threads
            await asyncio.sleep(0.01)
        began = time.monotonic()
        sync.close()
        await later.close()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, TutelageError)
            assert error.code == "CANCELLED"
        assert time.monotonic() - began < 1.0
        tries = len(calls)
        for call in (sync.get_teacher, lambda: next(sync.score_stream([]))):
            with pytest.raises(TutelageError, match="CANCELLED: client: it is closed"):
                call()
        with pytest.raises(TutelageError, match="CANCELLED: client: it is closed"):
            await later.get_teacher()
        with pytest.raises(TutelageError, match="CANCELLED: client: it is closed"):
            await anext(later.score_stream([]))
        assert len(calls) == tries


async def test_closing_ends_the_calls_that_are_with_a_teacher() -> None:
    def slow(_call: int, _context: grpc.ServicerContext) -> pb.GetTeacherResponse:
        time.sleep(1.0)
        return named("late")

    with server(slow) as (address, calls):
        sync, later = TeacherClient(address), AsyncTeacherClient(address)
        waiting = [
            asyncio.create_task(asyncio.to_thread(sync.get_teacher)),
            asyncio.create_task(later.get_teacher()),
        ]
        while len(calls) < 2:  # noqa: ASYNC110 - calls come from the server's threads
            await asyncio.sleep(0.01)
        sync.close()
        await later.close()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, TutelageError), error
            assert error.code == "CANCELLED"
