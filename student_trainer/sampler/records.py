"""Rows of a JSONL file, a Parquet file or a Hugging Face data set, read when they are needed."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tutelage_client.errors import TutelageError, invalid

from student_trainer.sampler.settings import DataSettings


class Records(Protocol):
    """A numbered collection of rows with named fields."""

    @property
    def source(self) -> str:
        """What error messages call it."""
        ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Mapping[str, Any]: ...

    def column(self, field: str) -> Iterator[Any]:
        """The field of every row, in order; raises TutelageError where a row lacks it."""
        ...


def open_records(settings: DataSettings) -> Records:
    """The rows that `settings.path` or `settings.dataset` names."""
    if settings.path is not None:
        if not settings.path.is_file():
            raise invalid(f"data.path: got {str(settings.path)!r}, which is not a file")
        return (
            JsonlRecords(settings.path) if settings.path.suffix == ".jsonl" else ParquetRecords(settings.path)
        )
    assert settings.dataset is not None
    return DatasetRecords(settings.dataset, settings.subset, settings.split)


def field_of(row: Mapping[str, Any], field: str, setting: str, place: str) -> Any:
    """row[field], or an error that names the setting, the row and the fields there are."""
    if field not in row or row[field] is None:
        raise invalid(f"{setting}: {place} has no field {field!r}; its fields are {sorted(row)}")
    return row[field]


class JsonlRecords:
    """One JSON object per line; only line offsets are held in memory."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self._file = path.open("rb")
        self._offsets = array("q")
        self._lines = array("q")
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                self._offsets.append(offset)
                self._lines.append(number)
            offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> Mapping[str, Any]:
        self._file.seek(self._offsets[index])
        line = self._file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise invalid(f"{self.source}, line {self._lines[index]}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise invalid(f"{self.source}, line {self._lines[index]}: got {line[:40]!r}, must be an object")
        return row

    def column(self, field: str) -> Iterator[Any]:
        for index in range(len(self)):
            place = f"{self.source}, line {self._lines[index]}"
            yield field_of(self.row(index), field, "data.prompt_field", place)


class ParquetRecords:
    """A Parquet file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self.source = str(path)
        try:
            self._table = pyarrow.parquet.read_table(path, memory_map=True)
        except pyarrow.ArrowInvalid as error:
            raise invalid(f"data.path: {path} is no Parquet file: {error}") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        return row

    def column(self, field: str) -> Iterator[Any]:
        if field not in self._table.column_names:
            raise invalid(
                f"data.prompt_field: {self.source} has no column {field!r}; "
                f"its columns are {sorted(self._table.column_names)}"
            )
        for batch in self._table.select([field]).to_batches():
            for value in batch.column(0).to_pylist():
                if value is None:
                    raise invalid(f"data.prompt_field: {self.source} has a row without {field!r}")
                yield value


class DatasetRecords:
    """A Hugging Face data set, by hub id or local directory."""

    def __init__(self, name: str, subset: str | None, split: str) -> None:
        import datasets

        self.source = f"{name} [{split}]"
        loaded = datasets.load_dataset(name, subset, split=split)
        if not isinstance(loaded, datasets.Dataset):
            raise TutelageError(
                "INVALID_ARGUMENT",
                f"data.dataset: {self.source} is a {type(loaded).__name__}, needs a Dataset",
            )
        self._rows = loaded

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._rows[index]
        return row

    def column(self, field: str) -> Iterator[Any]:
        if field not in self._rows.column_names:
            raise invalid(
                f"data.prompt_field: {self.source} has no column {field!r}; "
                f"its columns are {sorted(self._rows.column_names)}"
            )
        for value in self._rows[field]:
            if value is None:
                raise invalid(f"data.prompt_field: {self.source} has a row without {field!r}")
            yield value
