"""What `tutelage score` has been answered so far, so that a run that was killed goes on where it stood.

`.OUTPUT.journal` stands beside the output until that is written: a header that says which file, teacher
and signal it belongs to, then every answer, in the order of the lines. Each record has a check sum; a
torn one at the end is cut off, and with it at most the answers that were on their way are asked again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Score, SequenceScore

_LENGTH, _CHECK = 8, 8


class Journal:
    """The journal of one output; at most one process has it.

    Args:
        header: what the answers belong to (JSON values).

    Raises:
        TutelageError: FAILED_PRECONDITION when another process has it, or it belongs to something else.
    """

    def __init__(self, output: Path, header: dict[str, Any]) -> None:
        self.path = output.with_name(f".{output.name}.journal")
        self._file = self.path.open("a+b")
        try:
            self._lock(output)
            self.done = self._continue(output, json.loads(_json(header)))  # as it reads when it is read
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, score: Score) -> None:
        """Keep the answers of the next lines; a killed process has them."""
        self._write(codec.score_to_bytes(score))
        self.done += len(score.sequences)

    def answers(self) -> Iterator[SequenceScore]:
        """Every answer, in order."""
        for record in self._records(skip=1):
            yield from codec.score_from_proto(pb.ScoreResponse.FromString(record)).sequences

    def remove(self) -> None:
        """The output is written: nothing is left to do."""
        self.path.unlink(missing_ok=True)

    def _lock(self, output: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TutelageError(
                "FAILED_PRECONDITION", f"{output}: another `tutelage score` is writing it"
            ) from None

    def _continue(self, output: Path, header: dict[str, Any]) -> int:
        """Lines that are answered already; what is torn is cut off."""
        whole = done = 0
        for number, record in enumerate(self._records()):
            whole += _LENGTH + _CHECK + len(record)
            done += len(pb.ScoreResponse.FromString(record).sequences) if number else 0
        if not done:  # nothing would be lost
            self._file.truncate(0)
            self._write(_json(header))
            return 0
        began: dict[str, Any] = json.loads(next(self._records()))
        different = sorted(name for name in {*began, *header} if began.get(name) != header.get(name))
        if different:
            raise TutelageError(
                "FAILED_PRECONDITION",
                f"{self.path} holds an unfinished run for {output} with another "
                f"{', '.join(different)}; delete it, or choose another --output",
            )
        self._file.truncate(whole)
        return done

    def _write(self, record: bytes) -> None:
        self._file.write(len(record).to_bytes(_LENGTH, "little") + _check(record) + record)
        self._file.flush()

    def _records(self, skip: int = 0) -> Iterator[bytes]:
        """Whole records from the start to the first that is torn."""
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while len(head := file.read(_LENGTH + _CHECK)) == _LENGTH + _CHECK:
                length = int.from_bytes(head[:_LENGTH], "little")
                if length > size:
                    return
                record = file.read(length)
                if len(record) != length or _check(record) != head[_LENGTH:]:
                    return
                if skip:
                    skip -= 1
                else:
                    yield record


def _check(record: bytes) -> bytes:
    return hashlib.sha256(record).digest()[:_CHECK]


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode()
