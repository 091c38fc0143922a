"""A cache on disk: one file for each entry, in 256 folders, that any number of replicas may share.

DIR/3f/a1….score appears by a rename, so a reader sees a whole entry or none. Nothing is synced: what a
power failure tears is found by the entry's check sum, and is a miss. The least recently used files
(a file's time is that of its last reading, give or take a minute) leave when the limit is reached. Each
replica counts what it writes and looks at the whole directory when that may have passed the limit, so
together they may exceed it by a twentieth for each replica, for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from services.teacher.cache.store import StoreError

BLOCK = 4096  # a file takes whole blocks of the disk
KEEP = 0.9  # share of the limit that stays when files must leave
LOOK_EVERY = 0.05  # share of the limit that is written between two looks at the directory
RECENT_SECONDS = 60.0  # a file read within this time needs no new time
ABANDONED_SECONDS = 3600.0  # an unfinished file this old has lost its writer
_SUFFIX, _PART = ".score", ".part"

T = TypeVar("T")


class DirectoryStore:
    """Entries as files; see the module's first lines."""

    def __init__(self, directory: str | Path, *, max_bytes: int) -> None:
        self._directory = Path(directory)
        self._max_bytes = max_bytes
        self._held = 0
        self._written = 0  # since the last look
        self._counting = threading.Lock()

    @property
    def held_bytes(self) -> int:
        return self._held

    async def open(self) -> None:
        try:
            await asyncio.to_thread(self._open)
        except OSError as error:
            raise OSError(f"cache: {error}") from error

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return await _in_thread(lambda: [self._read(key) for key in keys])

    async def put(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        await _in_thread(lambda: self._write_all(entries))

    async def drop(self, key: bytes) -> None:
        await _in_thread(lambda: self._path(key).unlink(missing_ok=True))

    async def close(self) -> None:
        """Nothing is open."""

    # From here on: a thread of asyncio's pool.

    def _open(self) -> None:
        for shard in range(256):
            (self._directory / f"{shard:02x}").mkdir(parents=True, exist_ok=True)
        self._look()

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._directory / name[:2] / f"{name[2:]}{_SUFFIX}"

    def _read(self, key: bytes) -> bytes | None:
        try:
            with self._path(key).open("rb") as file:
                data = file.read()
                if time.time() - os.fstat(file.fileno()).st_mtime > RECENT_SECONDS:
                    os.utime(file.fileno())
        except FileNotFoundError:
            return None
        return data

    def _write_all(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        for key, value in entries:
            size = _taken(len(value))
            path = self._path(key)
            if size > self._max_bytes or path.exists():
                continue
            part = path.with_name(f".{uuid.uuid4().hex}{_PART}")
            try:
                part.write_bytes(value)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            with self._counting:
                self._held += size
                self._written += size
        if self._held > self._max_bytes or self._written > LOOK_EVERY * self._max_bytes:
            self._look()

    def _look(self) -> None:
        """Count every file, and let the oldest go where there are too many bytes."""
        with self._counting:
            files = list(self._files())
            held = sum(file.taken for file in files)
            if held > self._max_bytes:
                held -= self._make_room(files, held)
            self._held, self._written = held, 0

    def _make_room(self, files: list[_File], held: int) -> int:
        """Bytes that left; none where another replica is making room."""
        left = 0
        with self._alone() as alone:
            for file in sorted(files, key=lambda file: file.used) if alone else ():
                if held - left <= KEEP * self._max_bytes:
                    break
                file.path.unlink(missing_ok=True)
                left += file.taken
        return left

    def _files(self) -> Iterator[_File]:
        for shard in range(256):
            with os.scandir(self._directory / f"{shard:02x}") as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        if entry.name.endswith(_SUFFIX):
                            yield _File(Path(entry.path), _taken(status.st_size), status.st_mtime)
                        elif time.time() - status.st_mtime > ABANDONED_SECONDS:
                            os.unlink(entry.path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other replica makes room at the same time."""
        with (self._directory / ".room").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    taken: int  # bytes of the disk
    used: float  # unix seconds


def _taken(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


async def _in_thread(work: Callable[[], T]) -> T:
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise StoreError(str(error)) from error
