"""Files of `tutelage score`: responses in, as ids or text; scores out, as JSONL or Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tutelage_client.errors import invalid
from tutelage_client.types import Int32Array, SequenceScore

ROWS_PER_GROUP = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One response and its context, as token ids."""

    id: str
    context_ids: Int32Array  # [P]
    response_ids: Int32Array  # [R]

    @property
    def tokens(self) -> int:
        return int(self.context_ids.size + self.response_ids.size)


class Sink(Protocol):
    """Where records go, in order."""

    def write(self, record: dict[str, Any]) -> None: ...


def read_rows(path: Path, encode: Callable[[str], Int32Array]) -> Iterator[Row]:
    """Every line of a JSONL file; raises TutelageError that names the first bad line."""
    if not path.is_file():
        raise invalid(f"{path}: there is no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(line, f"{path}, line {number}", str(number), encode)


def _row(line: bytes, place: str, number: str, encode: Callable[[str], Int32Array]) -> Row:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise invalid(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise invalid(f"{place}: got {line[:40]!r}, must be an object")
    name = str(record.get("id", number))
    if "context_ids" in record and "response_ids" in record:
        return Row(name, _ids(record, "context_ids", place), _ids(record, "response_ids", place))
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        return Row(name, encode(record["prompt"]), encode(record["response"]))
    raise invalid(
        f"{place}: got fields {sorted(record)}, needs context_ids and response_ids, or prompt and response"
    )


def _ids(record: dict[str, Any], field: str, place: str) -> Int32Array:
    values = record[field]
    if not isinstance(values, list) or not all(isinstance(x, int) and 0 <= x < 2**31 for x in values):
        raise invalid(f"{place}: {field} must be a list of token ids")
    return np.asarray(values, dtype=np.int32)


def record_of(row: Row, score: SequenceScore) -> dict[str, Any]:
    """What is written for one response: plain lists, None where the teacher gave no score."""
    return {
        "id": row.id,
        "error": None if score.error is None else f"{score.error.code}: {score.error.message}",
        "response_ids": row.response_ids.tolist(),
        "sampled": _floats(score.sampled),
        "top_ids": None if score.top_ids is None else score.top_ids.tolist(),
        "top_logprobs": None if score.top_logprobs is None else [_floats(row) for row in score.top_logprobs],
        "entropy": _floats(score.entropy),
    }


def _floats(values: Any) -> list[float | None] | None:
    if values is None:
        return None
    return [float(value) if np.isfinite(value) else None for value in values]


@contextmanager
def open_sink(path: Path) -> Iterator[Sink]:
    """A file that appears whole under its name when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    make = _ParquetSink if path.suffix == ".parquet" else _JsonlSink
    try:
        sink = make(temporary)
        try:
            yield sink
        finally:
            sink.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _JsonlSink:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


class _ParquetSink:
    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        floats = pa.list_(pa.float32())
        self._schema = pa.schema(
            [
                ("id", pa.string()),
                ("error", pa.string()),
                ("response_ids", pa.list_(pa.int32())),
                ("sampled", floats),
                ("top_ids", pa.list_(pa.list_(pa.int32()))),
                ("top_logprobs", pa.list_(floats)),
                ("entropy", floats),
            ]
        )
        self._table = pa.Table
        self._writer = pq.ParquetWriter(path, self._schema)
        self._records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        if len(self._records) == ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._records:
            self._writer.write_table(self._table.from_pylist(self._records, schema=self._schema))
            self._records = []
