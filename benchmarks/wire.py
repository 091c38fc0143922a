"""The service against a bare gRPC echo: positions per second on loopback, and bytes per position.

Both servers run in processes of their own, answer the same request with the same number of bytes
(2,048 positions, K = 64) and take turns; one client process asks both in the same way, with a few
requests in flight. Ours decodes, checks, admits, computes (fake engine), guards and encodes, and
the client decodes to arrays; the echo hands out prepared bytes, which nobody looks at.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tutelage_client import AsyncTeacherClient, ScoreRequest, Signal, codec

from benchmarks.results import record

POSITIONS, TOP_K, CONTEXT = 2048, 64, 256
IN_FLIGHT = 4
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


async def positions_per_second(call: Call, requests: int) -> float:
    """Wall-clock rate with IN_FLIGHT requests under way."""

    async def worker(count: int) -> None:
        for _ in range(count):
            await call()

    began = time.perf_counter()
    await asyncio.gather(*[worker(requests // IN_FLIGHT) for _ in range(IN_FLIGHT)])
    return POSITIONS * requests / (time.perf_counter() - began)


async def compare(rounds: int, requests: int) -> tuple[list[float], list[float], float]:
    """Rates of ours and of the echo, round by round, and the bytes of one position of ours."""
    request = make_request()
    message = codec.request_to_proto(request).SerializeToString()
    with server("--serve", "ours") as ours_address:
        async with (
            AsyncTeacherClient(ours_address) as client,
            grpc.aio.insecure_channel(ours_address, UNLIMITED) as raw,
        ):
            size = len(await raw.unary_unary("/tutelage.v1.TeacherService/Score")(message))
            with server("--serve", "echo", "--bytes", str(size)) as echo_address:
                async with grpc.aio.insecure_channel(echo_address, UNLIMITED) as channel:
                    echo = channel.unary_unary(ECHO)

                    async def ask_ours() -> object:
                        return (await client.score_request(request)).raise_for_errors()

                    async def ask_echo() -> object:
                        return await echo(message)

                    ours, bare = [], []
                    for call in (ask_ours, ask_echo):
                        await positions_per_second(call, 20)
                    for _ in range(rounds):
                        ours.append(await positions_per_second(ask_ours, requests))
                        bare.append(await positions_per_second(ask_echo, requests))
    return ours, bare, size / POSITIONS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--serve", choices=("ours", "echo"))
    parser.add_argument("--bytes", type=int, default=0)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve_ours() if options.serve == "ours" else serve_echo(options.bytes))
        return 0
    ours, bare, size = asyncio.run(compare(options.rounds, options.requests))
    a, b = statistics.median(ours), statistics.median(bare)
    runs = [{"ours": x, "peer": y} for x, y in zip(ours, bare, strict=True)]
    record("wire.vs_bare_grpc", a / b, unit="ratio", ours=a, peer=b, peer_name="bare gRPC echo", runs=runs)
    record("wire.bytes_per_position", size, unit="bytes", ours=size)
    print(
        f"wire.vs_bare_grpc        {a / b:.2f}  (ours {a:,.0f}, bare echo {b:,.0f} positions/s; at least 0.5)"
    )
    print(f"wire.bytes_per_position  {size:.1f}  (at most {8 * TOP_K + 16})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
