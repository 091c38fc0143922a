"""Score files: responses and what one teacher said about them, in one Parquet file that says who it was.

`tutelage score` writes them; the engine `file` answers from them, and a sampler replays their responses.
The header is in the schema's metadata, as JSON. Floats are kept as they were, so what is read is what the
teacher answered, bit for bit; a value that is not finite is null. Shapes: R response positions, K top ids.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Identity, Int32Array, Limits, SequenceError, SequenceScore, Signal

FORMAT = 1
METADATA = b"tutelage.scores"
GROUP_ROWS, GROUP_BYTES = 1024, 8 * 2**20  # of one row group, whichever comes first
GROUPS_HELD = 8  # row groups that a reader keeps
_PLAIN = ("id", "error", "sampling_temperature", "finished", "example")

# Signals that a file either was written with or does not have.
_AS_WRITTEN = sorted(
    set(Signal.__slots__) - {"sampled", "top_k", "candidates", "entropy", "temperature", "encoding"}
)

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ScoreHeader:
    """What holds for every response of a file.

    Attributes:
        identity: of the teacher that scored; one file has one.
        signal: what it was asked.
        written_by: the model that wrote what the responses' author was trained on, when somebody said so.
    """

    identity: Identity
    signal: Signal
    written_by: str = ""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> ScoreHeader:
        """Raises ValueError for anything else."""
        document = json.loads(text)
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(f"not a header of format {FORMAT}")
        try:
            signal: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in document["signal"].items()
            }
            return cls(Identity(**document["identity"]), Signal(**signal), str(document["written_by"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a header: {error}") from error


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """One row. What the source did not say about the sampling is None."""

    id: str
    context_ids: Int32Array  # [P]
    response_ids: Int32Array  # [R]
    score: SequenceScore
    behaviour_logprobs: Float32Array | None = None  # [R]
    sampling_temperature: float | None = None
    finished: bool | None = None
    example: int | None = None  # its number in the data that the context is a prompt of


class ScoreFileWriter:
    """Rows into `path`, which is a whole file once the block has ended."""

    def __init__(self, path: Path, header: ScoreHeader) -> None:
        import pyarrow.parquet as pq

        self._schema = _schema().with_metadata({METADATA: header.to_json()})
        self._top_k = header.signal.top_k
        self._writer = pq.ParquetWriter(path, self._schema)
        self._rows: list[ScoredResponse] = []
        self._bytes = 0

    def write(self, row: ScoredResponse) -> None:
        self._rows.append(row)
        self._bytes += row.context_ids.nbytes + row.response_ids.size * (16 + 8 * self._top_k)
        if len(self._rows) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        import pyarrow as pa

        columns = _columns(self._rows, max(1, self._top_k))
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._rows, self._bytes = [], 0


class ScoreFile:
    """An open score file; rows are read when they are asked for, a row group at a time.

    Raises:
        TutelageError: INVALID_ARGUMENT when `path` is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._file = _open(path)
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = np.cumsum([0, *counts])
        self._lock = threading.Lock()
        self._group = lru_cache(maxsize=GROUPS_HELD)(self._read_group)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def examples(self) -> list[int | None]:
        """The example of every row, in order."""
        found: list[int | None] = self._file.read(columns=["example"]).column(0).to_pylist()
        return found

    def ids(self) -> Iterator[tuple[Int32Array, Int32Array]]:
        """Context and response of every row, in order, without the rest."""
        for group in range(self._file.num_row_groups):
            table = self._file.read_row_group(group, columns=["context_ids", "response_ids"])
            contexts, responses = (_Lists(table.column(name).combine_chunks()) for name in table.column_names)
            for row in range(table.num_rows):
                yield contexts.row(row), responses.row(row)

    def row(self, index: int) -> ScoredResponse:
        """The row of that number; safe in any thread."""
        group = int(np.searchsorted(self._ends, index, side="right")) - 1
        with self._lock:
            return self._group(group).row(index - int(self._ends[group]))

    def _read_group(self, group: int) -> _Group:
        return _Group(self._file.read_row_group(group), self.header.signal)


def read_header(path: Path) -> ScoreHeader:
    """Who scored the responses of `path`, and what was asked.

    Raises:
        TutelageError: INVALID_ARGUMENT when it is no score file.
    """
    metadata = _open(path).schema_arrow.metadata or {}
    try:
        return ScoreHeader.from_json(metadata[METADATA])
    except (KeyError, ValueError) as error:
        reason = "has no header" if isinstance(error, KeyError) else str(error)
        raise invalid(
            f"{path}: {reason}; a score file is what `tutelage score` writes as .parquet"
        ) from error


def check_signal(path: Path, header: ScoreHeader, signal: Signal) -> None:
    """Raise INVALID_ARGUMENT, with the field, when the file cannot answer this signal."""
    has = header.signal
    if signal.temperature != has.temperature:
        raise invalid(f"signal.temperature: got {signal.temperature}, {path} was scored at {has.temperature}")
    if signal.candidates:
        raise invalid(f"signal.candidates: got true, {path} has scores of no ids but the teacher's own")
    for name, lacks in (
        ("sampled", signal.sampled and not has.sampled),
        ("entropy", signal.entropy and not has.entropy),
        ("top_k", signal.top_k > has.top_k),
        *((other, getattr(signal, other) != getattr(has, other)) for other in _AS_WRITTEN),
    ):
        if lacks:
            raise invalid(f"signal.{name}: got {getattr(signal, name)}, {path} has {getattr(has, name)}")


def file_limits(header: ScoreHeader, limits: Limits) -> Limits:
    """What a teacher that answers from such a file accepts."""
    has = header.signal
    return replace(limits, max_top_k=min(limits.max_top_k, has.top_k), max_candidates=0, entropy=has.entropy)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise invalid(f"{path}: there is no such file")
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise TutelageError("FAILED_PRECONDITION", f"{path}: reading it needs pyarrow") from error
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise invalid(f"{path}: no Parquet file: {error}") from error


def _schema() -> Any:
    import pyarrow as pa

    ids, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    return pa.schema(
        [
            ("id", pa.string()),
            ("error", pa.string()),
            ("context_ids", ids),
            ("response_ids", ids),
            ("behaviour_logprobs", floats),
            ("sampling_temperature", pa.float64()),
            ("finished", pa.bool_()),
            ("example", pa.int64()),
            ("sampled", floats),
            ("top_ids", pa.list_(ids)),
            ("top_logprobs", pa.list_(floats)),
            ("entropy", floats),
            ("valid", pa.list_(pa.bool_())),
        ]
    )


def _columns(rows: Sequence[ScoredResponse], top_k: int) -> dict[str, Any]:
    scores = [row.score for row in rows]
    errors = [None if s.error is None else f"{s.error.code}: {s.error.message}" for s in scores]
    return {
        "id": [row.id for row in rows],
        "error": errors,
        "context_ids": _lists([row.context_ids for row in rows], np.int32),
        "response_ids": _lists([row.response_ids for row in rows], np.int32),
        "behaviour_logprobs": _lists([row.behaviour_logprobs for row in rows], np.float32),
        "sampling_temperature": [row.sampling_temperature for row in rows],
        "finished": [row.finished for row in rows],
        "example": [row.example for row in rows],
        "sampled": _lists([score.sampled for score in scores], np.float32),
        "top_ids": _lists([score.top_ids for score in scores], np.int32, top_k),
        "top_logprobs": _lists([score.top_logprobs for score in scores], np.float32, top_k),
        "entropy": _lists([score.entropy for score in scores], np.float32),
        "valid": _lists([score.valid for score in scores], np.bool_),
    }


def _lists(arrays: Sequence[npt.NDArray[Any] | None], dtype: Any, columns: int | None = None) -> Any:
    """A list of each array, [R] or [R, columns]; None is null, NaN within one is, too."""
    import pyarrow as pa

    whole = [np.zeros(0, dtype) if array is None else array.astype(dtype, copy=False) for array in arrays]
    values = pa.array(np.concatenate([array.ravel() for array in whole]), from_pandas=True)
    if columns is not None:
        values = pa.ListArray.from_arrays(np.arange(0, len(values) + 1, columns, dtype=np.int32), values)
    offsets = np.cumsum([0, *(len(array) for array in whole)], dtype=np.int32)
    absent = np.array([array is None for array in arrays])
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(absent))


class _Lists:
    """One list column of a row group as numpy arrays."""

    def __init__(self, column: Any) -> None:
        self._offsets = column.offsets.to_numpy()
        self._null = column.is_null().to_numpy(zero_copy_only=False)
        values = column.values
        self._columns: int | None = None
        if hasattr(values, "offsets"):  # lists of lists, all of one length
            inner = values.offsets.to_numpy()
            self._columns = int(inner[1] - inner[0]) if len(inner) > 1 else 0
            values = values.values
        self._values: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)

    def row(self, index: int) -> Any:
        """A copy of the row, [R] or [R, K], so that none keeps its row group alive."""
        width = 1 if self._columns is None else self._columns
        found = self._values[self._offsets[index] * width : self._offsets[index + 1] * width].copy()
        return found if self._columns is None else found.reshape(-1, width)

    def optional(self, index: int) -> Any:
        return None if self._null[index] else self.row(index)


class _Group:
    """One row group in memory."""

    def __init__(self, table: Any, signal: Signal) -> None:
        named = {name: table.column(name).combine_chunks() for name in table.column_names}
        self._signal = signal
        self._plain = {name: named.pop(name).to_pylist() for name in _PLAIN}
        self._lists = {name: _Lists(column) for name, column in named.items()}

    def row(self, index: int) -> ScoredResponse:
        plain = {name: values[index] for name, values in self._plain.items()}
        lists, signal = self._lists, self._signal
        score = SequenceScore(
            plain["id"],
            sampled=lists["sampled"].optional(index) if signal.sampled else None,
            top_ids=lists["top_ids"].optional(index) if signal.top_k else None,
            top_logprobs=lists["top_logprobs"].optional(index) if signal.top_k else None,
            entropy=lists["entropy"].optional(index) if signal.entropy else None,
            valid=lists["valid"].optional(index),
        )
        if plain["error"] is not None:
            code, _, message = plain["error"].partition(": ")
            score = SequenceScore(plain["id"], SequenceError(code, message))
        return ScoredResponse(
            plain["id"],
            lists["context_ids"].row(index),
            lists["response_ids"].row(index),
            score,
            lists["behaviour_logprobs"].optional(index),
            plain["sampling_temperature"],
            plain["finished"],
            plain["example"],
        )
