"""The service against a bare gRPC echo: positions per second on loopback, and bytes per position.

Both servers run in processes of their own, answer the same request with the same number of bytes
(2,048 positions, K = 64) and take turns; one client process asks both in the same way: with four
requests in flight, and one after another. Ours decodes, checks, admits, computes (fake engine), guards and
encodes, and the client decodes to arrays; the echo hands out prepared bytes, which nobody looks at.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tutelage_client import AsyncTeacherClient, ScoreRequest, Signal, codec

from benchmarks.results import record

POSITIONS, TOP_K, CONTEXT = 2048, 64, 256
IN_FLIGHT = {"wire.vs_bare_grpc": 4, "wire.vs_bare_grpc_one_at_a_time": 1}
ECHO = "/bare.Echo/Echo"
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

Call = Callable[[], Awaitable[object]]


def make_request() -> ScoreRequest:
    """One sequence of 2,048 positions."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32_000, CONTEXT + POSITIONS).astype(np.int32)
    return codec.build_request([ids[:CONTEXT]], [ids[CONTEXT:]], signal=Signal(top_k=TOP_K))


async def serve_ours() -> None:
    """The fake engine behind our gRPC door; prints its address."""
    from services.api.core import ScoringCore
    from services.api.grpc_server import GrpcServer
    from services.api.settings import ServiceSettings
    from services.teacher.engines.fake import FakeEngine, FakeSettings

    settings = ServiceSettings(grpc_port=0)
    core = ScoringCore(
        FakeEngine(FakeSettings(vocab_size=32_000)),
        max_queued_tokens=settings.max_queued_tokens,
        max_message_bytes=settings.max_message_bytes,
    )
    server = GrpcServer(core, settings)
    await server.start()
    core.open()
    print(server.address, flush=True)
    await asyncio.Event().wait()


async def serve_echo(size: int) -> None:
    """gRPC and nothing else: `size` prepared bytes for every request; prints its address."""
    prepared = np.random.default_rng(0).bytes(size)

    async def echo(_request: bytes, _context: object) -> bytes:
        return prepared

    server = grpc.aio.server(options=UNLIMITED)
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """This file as a server process; yields its address."""
    command = [sys.executable, __file__, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


async def positions_per_second(call: Call, requests: int, in_flight: int) -> float:
    """Wall-clock rate with `in_flight` requests under way."""

    async def worker(count: int) -> None:
        for _ in range(count):
            await call()

    each = requests // in_flight
    began = time.perf_counter()
    await asyncio.gather(*[worker(each) for _ in range(in_flight)])
    return POSITIONS * each * in_flight / (time.perf_counter() - began)


@asynccontextmanager
async def both_servers() -> AsyncIterator[tuple[Call, Call, int]]:
    """A call of ours, a call of the echo, and the bytes of the answer to either."""
    request = make_request()
    message = codec.request_to_proto(request).SerializeToString()
    with server("--serve", "ours") as address:
        async with grpc.aio.insecure_channel(address, UNLIMITED) as channel:
            size = len(await channel.unary_unary("/tutelage.v1.TeacherService/Score")(message))
        with server("--serve", "echo", "--bytes", str(size)) as echo_address:
            async with (
                AsyncTeacherClient(address) as client,
                grpc.aio.insecure_channel(echo_address, UNLIMITED) as channel,
            ):
                echo = channel.unary_unary(ECHO)

                async def ask_ours() -> object:
                    return (await client.score_request(request)).raise_for_errors()

                async def ask_echo() -> object:
                    return await echo(message)

                yield ask_ours, ask_echo, size


async def compare(rounds: int, requests: int) -> None:
    """Measure, print and record every figure."""
    async with both_servers() as (ask_ours, ask_echo, size):
        for call in (ask_ours, ask_echo):
            await positions_per_second(call, 40, 4)
        for name, in_flight in IN_FLIGHT.items():
            runs = []
            for _ in range(rounds):
                ours = await positions_per_second(ask_ours, requests, in_flight)
                runs.append({"ours": ours, "peer": await positions_per_second(ask_echo, requests, in_flight)})
            a, b = (statistics.median(run[side] for run in runs) for side in ("ours", "peer"))
            record(name, a / b, unit="ratio", ours=a, peer=b, peer_name="bare gRPC echo", runs=runs)
            print(f"{name:32} {a / b:.2f}  (ours {a:,.0f}, bare echo {b:,.0f} positions/s)")
    record("wire.bytes_per_position", size / POSITIONS, unit="bytes", ours=size / POSITIONS)
    print(f"{'wire.bytes_per_position':32} {size / POSITIONS:.1f}  (at most {8 * TOP_K + 16})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--serve", choices=("ours", "echo"))
    parser.add_argument("--bytes", type=int, default=0)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve_ours() if options.serve == "ours" else serve_echo(options.bytes))
    else:
        asyncio.run(compare(options.rounds, options.requests))
    return 0


if __name__ == "__main__":
    sys.exit(main())
