"""What a name stands for may change: replicas are replaced, and there are more or fewer of them."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest
from support.get_teacher import get_teacher_server, named
from tutelage_client import AsyncTeacherClient, TeacherClient

A, ANSWERED = 1, 0x8580  # record type; flags: a response, authoritative, nothing wrong
FIRST, SECOND = "127.0.0.2", "127.0.0.3"
AGE_SECONDS, TIMEOUT_SECONDS = 2, 60.0


class Names:
    """A name server on loopback that has the same IPv4 addresses, or none, for every name."""

    def __init__(self) -> None:
        self.addresses: tuple[str, ...] = ()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def target(self, port: int) -> str:
        """What a client is given as its address."""
        return f"dns://127.0.0.1:{self.port}/teacher.test:{port}"

    def _serve(self) -> None:
        while True:
            query, asker = self._socket.recvfrom(512)
            if not query:
                return
            self._socket.sendto(self._answer(query), asker)

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", 12) + 5  # the header, a name that ends in zero, its type and class
        (kind,) = struct.unpack_from("!H", query, end - 4)
        addresses = self.addresses if kind == A else ()
        head = query[:2] + struct.pack("!5H", ANSWERED, 1, len(addresses), 0, 0)
        named = struct.pack("!HHHIH", 0xC00C, A, 1, 0, 4)
        return head + query[12:end] + b"".join(named + socket.inet_aton(each) for each in addresses)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
            caller.sendto(b"", ("127.0.0.1", self.port))


@pytest.fixture
def names() -> Iterator[Names]:
    server = Names()
    yield server
    server.close()


def replica(host: str, port: int = 0) -> AbstractContextManager[int]:
    """Answers with its own address as the teacher's name; gives its port."""
    return get_teacher_server(lambda _: named(host), host, port, max_age_ms=AGE_SECONDS * 1000)


Ask = Callable[[], str]


@contextmanager
def blocking(target: str) -> Iterator[Ask]:
    with TeacherClient(target) as client:
        yield lambda: client.get_teacher(timeout=TIMEOUT_SECONDS).identity.name


@contextmanager
def in_a_loop(target: str) -> Iterator[Ask]:
    async def ask(client: AsyncTeacherClient) -> str:
        return (await client.get_teacher(timeout=TIMEOUT_SECONDS)).identity.name

    with asyncio.Runner() as runner:

        async def connect() -> AsyncTeacherClient:
            return AsyncTeacherClient(target)

        client = runner.run(connect())
        yield lambda: runner.run(ask(client))
        runner.run(client.close())


@pytest.mark.parametrize("connected", [blocking, in_a_loop])
@pytest.mark.parametrize("away", [0.0, 2.0], ids=["at-once", "after-a-while-without-a-name"])
def test_a_replaced_replica_is_found_under_its_new_address(
    names: Names, connected: Callable[[str], AbstractContextManager[Ask]], away: float
) -> None:
    """gRPC by itself looks a name up again only half a minute after it did so last."""
    names.addresses = (FIRST,)
    with ExitStack() as stack:
        with replica(FIRST) as port:
            ask = stack.enter_context(connected(names.target(port)))
            assert ask() == FIRST
        names.addresses = ()
        back = threading.Timer(away, lambda: setattr(names, "addresses", (SECOND,)))
        back.start()
        began = time.monotonic()
        with replica(SECOND, port):
            assert ask() == SECOND
        assert time.monotonic() - began < 20.0
        back.join()


@pytest.mark.parametrize("connected", [blocking, in_a_loop])
def test_all_replicas_of_a_name_are_asked_in_turn_and_a_new_one_is_found(
    names: Names, connected: Callable[[str], AbstractContextManager[Ask]]
) -> None:
    names.addresses = (FIRST,)
    with replica(FIRST) as port, connected(names.target(port)) as ask:
        assert ask() == FIRST
        with replica(SECOND, port):
            names.addresses = (FIRST, SECOND)
            answers: Counter[str] = Counter()
            end = time.monotonic() + 30.0
            while min(answers[FIRST], answers[SECOND]) < 20:
                assert time.monotonic() < end, f"one of them is not asked: {answers}"
                answers[ask()] += 1
        names.addresses = (FIRST,)
        assert {ask() for _ in range(20)} == {FIRST}
