"""Files of `tutelage score`: responses in, as ids or text; scores out, as a score file or JSONL."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Int32Array, SequenceScore

from launcher.score_text import Encoder
from services.score_file import Float32Array, ScoredResponse, ScoreFileWriter, ScoreHeader


@dataclass(frozen=True, slots=True)
class Row:
    """One response and its context, as token ids, and what the file says about its sampling."""

    id: str
    context_ids: Int32Array  # [P]
    response_ids: Int32Array  # [R]
    behaviour_logprobs: Float32Array | None = None  # [R]
    sampling_temperature: float | None = None
    finished: bool | None = None
    example: int | None = None

    @property
    def tokens(self) -> int:
        return int(self.context_ids.size + self.response_ids.size)


class Sink(Protocol):
    """Where scored responses go, in order."""

    def write(self, row: ScoredResponse) -> None: ...

    def close(self) -> None: ...


def read_rows(path: Path, encoder: Encoder) -> Iterator[Row]:
    """Every line of a JSONL file; raises TutelageError that names the first bad line."""
    if not path.is_file():
        raise invalid(f"{path}: there is no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(line, f"{path}, line {number}", str(number), encoder)


def _row(line: bytes, place: str, number: str, encoder: Encoder) -> Row:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise invalid(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise invalid(f"{place}: got {line[:40]!r}, must be an object")
    try:
        context_ids, response_ids = _tokens(record, encoder)
        return Row(
            str(record.get("id", number)),
            context_ids,
            response_ids,
            _logprobs(record, response_ids),
            _optional(record, "sampling_temperature", float, int),
            _optional(record, "finished", bool),
            _optional(record, "example", int),
        )
    except TutelageError as error:
        raise TutelageError(error.code, f"{place}: {error.message}") from error


def _tokens(record: dict[str, Any], encoder: Encoder) -> tuple[Int32Array, Int32Array]:
    """Context and response: ids, a prompt (text or messages) with a response, or a whole conversation."""
    if "context_ids" in record and "response_ids" in record:
        return _ids(record, "context_ids"), _ids(record, "response_ids")
    prompt, response, messages = (record.get(name) for name in ("prompt", "response", "messages"))
    if isinstance(response, str) and isinstance(prompt, str):
        return encoder.ids(prompt), encoder.ids(response)
    if isinstance(response, str) and _are_messages(prompt):
        return encoder.ids(encoder.prompt(prompt)), encoder.ids(response)
    if _are_messages(messages) and len(messages) > 1 and messages[-1].get("role") == "assistant":
        return encoder.turn(messages)
    raise invalid(
        f"got fields {sorted(record)}, needs context_ids and response_ids, or prompt (text or messages) and "
        "response, or messages of which the assistant's is the last"
    )


def _are_messages(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _ids(record: dict[str, Any], field: str) -> Int32Array:
    values = record[field]
    if not isinstance(values, list) or not all(isinstance(x, int) and 0 <= x < 2**31 for x in values):
        raise invalid(f"{field} must be a list of token ids")
    return np.asarray(values, dtype=np.int32)


def _logprobs(record: dict[str, Any], response_ids: Int32Array) -> Float32Array | None:
    values = record.get("behaviour_logprobs")
    if values is None:
        return None
    if "response_ids" not in record:
        raise invalid(
            "behaviour_logprobs need context_ids and response_ids; text may be cut into other tokens"
        )
    if not (isinstance(values, list) and len(values) == len(response_ids) and all(map(_is_logprob, values))):
        raise invalid(f"behaviour_logprobs must be {len(response_ids)} numbers, one for each response id")
    return np.asarray(values, dtype=np.float32)


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _optional(record: dict[str, Any], field: str, *kinds: type) -> Any:
    value = record.get(field)
    if value is not None and (
        not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    ):
        raise invalid(f"{field}: got {value!r}, must be {'true or false' if bool in kinds else 'a number'}")
    return value


def scored(row: Row, score: SequenceScore) -> ScoredResponse:
    """A row with its answer."""
    return ScoredResponse(
        row.id,
        row.context_ids,
        row.response_ids,
        score,
        row.behaviour_logprobs,
        row.sampling_temperature,
        row.finished,
        row.example,
    )


def record_of(row: ScoredResponse) -> dict[str, Any]:
    """What a line of JSONL says of one response: plain lists, None where the teacher gave no score."""
    score = row.score
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
def open_sink(path: Path, header: ScoreHeader) -> Iterator[Sink]:
    """A file that appears whole under its name, and on disk, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        sink = ScoreFileWriter(temporary, header) if path.suffix == ".parquet" else _JsonlSink(temporary)
        try:
            yield sink
        finally:
            sink.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _JsonlSink:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, row: ScoredResponse) -> None:
        self._file.write(json.dumps(record_of(row)) + "\n")

    def close(self) -> None:
        self._file.close()
