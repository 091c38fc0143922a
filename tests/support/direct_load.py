"""Direct callers of replicas, over gRPC and HTTP, that note every failure they would have to tell a person.

Needs the client alone, so that it also runs inside a container of the stack.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import numpy as np
from tutelage.v1.teacher_pb2 import ScoreResponse
from tutelage_client import AsyncTeacherClient, codec
from tutelage_client.types import FloatArray, Score

REQUEST = codec.build_request([[1, 2, 3]], [[4, 5, 6]] * 4)
BODY = codec.request_to_proto(REQUEST).SerializeToString()
CALL_SECONDS = 60.0
CONNECT_SECONDS = 5.0  # an address that has gone with its container does not say so


class DirectLoad:
    """Some gRPC and some HTTP callers, each of every address, until the block is left.

    The gRPC callers share a client of ours; with `name` as many share another. The HTTP callers do by hand
    what any client does that spreads its calls over addresses: where nobody listens, the connection breaks or
    the answer is 503, they ask the next address, for as long as a call may take. Every other end of a call,
    and a wrong score, is a failure.

    Args:
        grpc, http: "host:port" of every replica.
        name: gRPC "host:port" that stands for all of them.
        expected: log-probabilities [3] of the answer's every sequence; None: those of the first answer.
        tolerance: in nats.
    """

    def __init__(
        self,
        grpc: Sequence[str],
        http: Sequence[str],
        *,
        name: str | None = None,
        expected: FloatArray | None = None,
        tolerance: float = 0.0,
        token: str | None = None,
        pause: float = 0.004,
    ) -> None:
        self.answered: Counter[str] = Counter()
        self.asked_again: Counter[str] = Counter()
        self.failures: list[str] = []
        self._grpc = {"grpc": list(grpc)} | ({"grpc by name": [name]} if name else {})
        self._http = [urlsplit(f"//{address}") for address in http]
        self._expected, self._tolerance, self._token, self._pause = expected, tolerance, token, pause
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._clients = [
            AsyncTeacherClient(addresses, token=self._token) for addresses in self._grpc.values()
        ]
        ways: dict[str, Callable[[], Awaitable[Score]]] = {"http": self._ask_http}
        ways |= {way: partial(_ask, client) for way, client in zip(self._grpc, self._clients, strict=True)}
        self._ways = tuple(ways)
        self._tasks = [asyncio.create_task(self._keep_asking(*way)) for way in ways.items() for _ in range(2)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        for client in self._clients:
            await client.close()

    async def more(self, count: int, seconds: float = 60.0) -> None:
        """Return once every way of asking was answered `count` more times, or a failure was seen."""
        wanted = {way: self.answered[way] + count for way in self._ways}
        async with asyncio.timeout(seconds):
            while not self.failures and any(self.answered[way] < least for way, least in wanted.items()):  # noqa: ASYNC110 several tasks count
                await asyncio.sleep(0.01)

    async def _keep_asking(self, way: str, ask: Callable[[], Awaitable[Score]]) -> None:
        while not self._stop.is_set():
            began = time.time()
            try:
                self._check(await ask())
                self.answered[way] += 1
            except Exception as error:  # noqa: BLE001 - every kind of failure counts
                when = time.strftime("%H:%M:%S", time.gmtime(began))
                told = f"{way} at {when} UTC, after {time.time() - began:.1f} s"
                self.failures.append(f"{told}: {type(error).__name__}: {error}")
            await asyncio.sleep(self._pause)

    def _check(self, score: Score) -> None:
        for sequence in score.raise_for_errors().sequences:
            assert sequence.sampled is not None
            if self._expected is None:
                self._expected = sequence.sampled
            np.testing.assert_allclose(sequence.sampled, self._expected, rtol=0, atol=self._tolerance)

    async def _ask_http(self) -> Score:
        end = time.monotonic() + CALL_SECONDS
        for address in itertools.cycle(self._http):
            asked = time.monotonic()
            if asked > end:
                raise TimeoutError(f"{CALL_SECONDS:.0f} s of asking; last {address.netloc}")
            try:
                status, body = await asyncio.to_thread(
                    post, address.hostname or "", address.port or 80, self._token
                )
            except (OSError, http.client.HTTPException) as error:
                self.asked_again[type(error).__name__] += 1
            else:
                if status == HTTPStatus.OK:
                    return codec.score_from_proto(ScoreResponse.FromString(body))
                if status != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise RuntimeError(f"status {status}: {body[:200]!r}")
                self.asked_again["503"] += 1
            await asyncio.sleep(0.02)
        raise AssertionError("there is always a next address")


async def _ask(client: AsyncTeacherClient) -> Score:
    return await client.score_request(REQUEST, CALL_SECONDS)


def post(host: str, port: int, token: str | None) -> tuple[int, bytes]:
    """One call on a connection of its own: one that was kept might end the moment it is used again."""
    headers = {"Content-Type": "application/x-protobuf", "Accept": "application/x-protobuf"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
    try:
        connection.connect()
        connection.sock.settimeout(CALL_SECONDS)
        connection.request("POST", "/v1/score", BODY, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
