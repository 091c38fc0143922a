"""A replica that was replaced has another address under the same name: the client finds it at once."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, ExitStack, contextmanager

import grpc
import pytest
from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import AsyncTeacherClient, TeacherClient

A, ANSWERED = 1, 0x8580  # record type; flags: a response, authoritative, nothing wrong
FIRST, SECOND = "127.0.0.2", "127.0.0.3"


class Names:
    """A name server on loopback that has one IPv4 address, or none, for every name."""

    def __init__(self) -> None:
        self.address: str | None = None
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
        record = b""
        if kind == A and self.address is not None:
            record = struct.pack("!HHHIH", 0xC00C, A, 1, 0, 4) + socket.inet_aton(self.address)
        return query[:2] + struct.pack("!5H", ANSWERED, 1, bool(record), 0, 0) + query[12:end] + record

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
            caller.sendto(b"", ("127.0.0.1", self.port))


@pytest.fixture
def names() -> Iterator[Names]:
    server = Names()
    yield server
    server.close()


@contextmanager
def replica(host: str, port: int = 0) -> Iterator[int]:
    """A GetTeacher that answers with its own address as the teacher's name; yields its port."""

    def get_teacher(_request: bytes, _context: grpc.ServicerContext) -> bytes:
        return pb.GetTeacherResponse(identity=pb.Identity(name=host), ready=True).SerializeToString()

    handler = grpc.unary_unary_rpc_method_handler(get_teacher)
    running = grpc.server(futures.ThreadPoolExecutor(2))
    running.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("tutelage.v1.TeacherService", {"GetTeacher": handler}),)
    )
    bound = running.add_insecure_port(f"{host}:{port}")
    running.start()
    try:
        yield bound
    finally:
        running.stop(None).wait()


Ask = Callable[[float], str]


@contextmanager
def blocking(target: str) -> Iterator[Ask]:
    with TeacherClient(target) as client:
        yield lambda timeout: client.get_teacher(timeout=timeout).identity.name


@contextmanager
def in_a_loop(target: str) -> Iterator[Ask]:
    async def ask(client: AsyncTeacherClient, timeout: float) -> str:  # noqa: ASYNC109
        return (await client.get_teacher(timeout=timeout)).identity.name

    with asyncio.Runner() as runner:

        async def connect() -> AsyncTeacherClient:
            return AsyncTeacherClient(target)

        client = runner.run(connect())
        yield lambda timeout: runner.run(ask(client, timeout))
        runner.run(client.close())


@pytest.mark.parametrize("connected", [blocking, in_a_loop])
@pytest.mark.parametrize("away", [0.0, 2.0], ids=["at-once", "after-a-while-without-a-name"])
def test_a_replaced_replica_is_found_under_its_new_address(
    names: Names, connected: Callable[[str], AbstractContextManager[Ask]], away: float
) -> None:
    """gRPC by itself looks a name up again only half a minute after it did so last."""
    names.address = FIRST
    with ExitStack() as stack:
        with replica(FIRST) as port:
            ask = stack.enter_context(connected(names.target(port)))
            assert ask(5.0) == FIRST
        names.address = None
        back = threading.Timer(away, lambda: setattr(names, "address", SECOND))
        back.start()
        began = time.monotonic()
        with replica(SECOND, port):
            assert ask(60.0) == SECOND
        assert time.monotonic() - began < 15.0
        back.join()
