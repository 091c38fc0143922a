"""A TCP proxy before the queue server that loses replies: the command is done, its answer never comes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from types import TracebackType
from typing import Self


class LossyProxy:
    """Forwards TCP to a Unix socket; with probability `loss` it drops a reply and the connection.

    `lose_next(marker)` drops the reply to the next request that contains `marker`.
    """

    def __init__(self, socket_path: str, loss: float = 0.0, seed: int = 0) -> None:
        self._socket_path = socket_path
        self._random = random.Random(seed)
        self._marker: bytes | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.loss = loss
        self.lost = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def lose_next(self, marker: bytes) -> None:
        self._marker = marker

    def _loses(self, request: bytes) -> bool:
        if self._marker is not None and self._marker in request:
            self._marker = None
            return True
        return self._random.random() < self.loss

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await self._forward(reader, writer)
        writer.close()
        self._connections.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above_reader, above_writer = await asyncio.open_unix_connection(self._socket_path)
        answers = asyncio.create_task(_pump(above_reader, writer))
        try:
            while request := await reader.read(1 << 20):
                if self._loses(request):
                    self.lost += 1
                    answers.cancel()
                    await asyncio.wait([answers])
                    above_writer.write(request)
                    # The server has executed the command once its reply is here; nobody gets it.
                    await above_reader.read(1)
                    return
                above_writer.write(request)
                await above_writer.drain()
        finally:
            answers.cancel()
            above_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while answer := await reader.read(1 << 20):
            writer.write(answer)
            await writer.drain()
        writer.close()
