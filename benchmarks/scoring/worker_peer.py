"""A peer without a server, as the benchmark sees it: batches go in over a socket pair, replies come out."""

from __future__ import annotations

import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.scoring.peers import Reply
from benchmarks.scoring.processes import ProcessGroup
from benchmarks.scoring.workloads import Batch


class Worker:
    """A process of benchmarks.scoring.worker, `flat` or `floor`."""

    def __init__(self, name: str, model: Path, directory: Path, threads: int) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "benchmarks.scoring.worker", name, str(model)]
            self.process = ProcessGroup(
                name,
                [*command, str(theirs.fileno())],
                directory / f"{name}.log",
                threads,
                pass_fds=[theirs.fileno()],
            )
        self._connection = Connection(ours.detach())

    def connect(self) -> None:
        self.process.wait_until(self._connection.poll)
        self._receive()

    def ask(self, batch: Batch) -> Reply:
        self._connection.send(batch)
        reply: Reply = self._receive()
        return reply

    def close(self) -> None:
        self._connection.close()
        self.process.end()

    def _receive(self) -> Reply:
        try:
            received: Reply = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(
                f"{self.name} ended; its log ends with\n{self.process.last_lines()}"
            ) from error
        return received
