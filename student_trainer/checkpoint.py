"""Checkpoints: tensors, random states and ledger of one step, in one directory that appears whole.

Tensors go through torch's distributed checkpointing into safetensors files, so nothing is pickled.
Every rank writes what it holds, and a run may continue with another number of ranks. A manifest of
sizes and SHA-256 sums tells a damaged checkpoint from a good one before anything is loaded from it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from tutelage_client.errors import TutelageError

from student_trainer.durable import atomic_directory, remove_directory, sweep_leftovers
from student_trainer.ledger import Ledger
from student_trainer.ranks import ALONE, Ranks

_NAME = re.compile(r"step-(\d{8,})")
_LEDGER = "ledger.json"
_MANIFEST = "manifest.json"

FileEntries = dict[str, dict[str, int | str]]  # of a manifest: bytes and sha256 by name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were all found whole."""

    path: Path
    ledger: Ledger

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """One that is known to be whole."""
        return cls(path, Ledger.from_json((path / _LEDGER).read_text()))


@dataclass(frozen=True, slots=True)
class Damaged:
    """A checkpoint that was skipped, and why."""

    path: Path
    reason: str


class CheckpointStore:
    """The checkpoints of one run, RUN_DIR/checkpoints/step-00000050/."""

    def __init__(self, directory: Path, ranks: Ranks = ALONE) -> None:
        self.directory = directory
        self._ranks = ranks

    def save(self, tensors: Mapping[str, torch.Tensor], ledger: Ledger) -> Path:
        """Write a checkpoint of `ledger.step`; when this returns it survives a power failure.

        On rank 0; the others `write_part`, and the directory gets its name when all have.
        """
        final = self.directory / f"step-{ledger.step:08d}"
        with atomic_directory(final) as temporary:
            self._ranks.tell("save", directory=str(temporary))
            described = write_part(temporary, tensors, self._ranks)
            (temporary / _LEDGER).write_text(ledger.to_json())
            described |= _describe([temporary / _LEDGER])
            (temporary / _MANIFEST).write_text(json.dumps(dict(sorted(described.items())), indent=1))
        return final

    def steps(self) -> list[int]:
        """Steps that have a checkpoint directory, oldest first, whole or not."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def newest(self) -> tuple[Checkpoint | None, list[Damaged]]:
        """The newest whole checkpoint, and the damaged ones that were passed over on the way.

        Nothing is moved: when none is whole, the next look must find them damaged again.
        """
        sweep_leftovers(self.directory)
        damaged: list[Damaged] = []
        for step in reversed(self.steps()):
            path = self.directory / f"step-{step:08d}"
            if (reason := find_damage(path)) is None:
                return Checkpoint.read(path), damaged
            damaged.append(Damaged(path, reason))
        return None, damaged

    def last_ledger(self) -> Ledger | None:
        """That of the newest checkpoint, for a look; whether the checkpoint is whole is not looked at."""
        steps = self.steps()
        return Checkpoint.read(self.directory / f"step-{steps[-1]:08d}").ledger if steps else None

    def set_aside(self, damaged: Damaged) -> Path:
        """Take a damaged checkpoint out of the count, or it would be kept in place of a whole one.

        Its files stay for inspection, in damaged-step-00000050/ beside the others.
        """
        aside = damaged.path.with_name(f"damaged-{damaged.path.name}")
        if aside.exists():
            remove_directory(aside)
        damaged.path.rename(aside)
        return aside

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints."""
        for step in self.steps()[:-keep]:
            remove_directory(self.directory / f"step-{step:08d}")


def load_tensors(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors`, in place, with the values of the same names.

    Raises:
        ValueError: the checkpoint holds other names or shapes, so it belongs to another model.
    """
    reader = HuggingFaceStorageReader(str(checkpoint.path))
    stored = {
        name: tuple(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if stored != wanted:
        names = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        shown = [f"{name}: {stored.get(name)} saved, {wanted.get(name)} needed" for name in names[:3]]
        raise ValueError(
            f"{checkpoint.path} belongs to another model: {len(names)} tensors differ ({'; '.join(shown)})"
        )
    with _single_process():
        load(tensors, storage_reader=reader, no_dist=True)


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None when every file is as it was written."""
    try:
        expected = json.loads((path / _MANIFEST).read_text())
    except FileNotFoundError:
        return "it has no manifest"
    except ValueError:
        return "its manifest is not JSON"
    for name, wanted in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {wanted['bytes']} were written"
        if _sha256(file) != wanted["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def write_part(directory: Path, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> FileEntries:
    """Write what this rank holds into a checkpoint's directory, and sync it.

    Returns:
        The files of all ranks, on rank 0.
    """
    if ranks.alone:
        with _single_process():
            save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(directory)), no_dist=True)
        return _describe(directory.iterdir())
    if not directory.is_dir():
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"run.directory: rank {ranks.rank} does not see {directory}, which rank 0 has made; the run "
            "directory must be on a volume that all nodes share",
        )
    _write_shards(directory, tensors, ranks.rank)
    own = _describe(directory.glob(f"shard-{ranks.rank + 1:05d}-*"))
    described: FileEntries = {}
    for part in ranks.collect(json.dumps(own).encode()):
        described |= json.loads(part)
    return described


def _write_shards(directory: Path, tensors: Mapping[str, torch.Tensor], rank: int) -> None:
    """Plan and write by the same parts of DCP that `save` uses.

    `save` itself would have the ranks exchange their plans as pickles. They need not: which piece of
    a tensor a rank holds follows from the tensor, and what every rank holds is written by rank 0.
    """
    held = {name: t for name, t in tensors.items() if rank == 0 or isinstance(t, DTensor)}
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    writer.set_up_storage_writer(rank == 0)
    planner = DefaultSavePlanner()
    planner.set_up_planner(held, is_coordinator=rank == 0)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plan = planner.finish_plan(replace(plan, storage_data={"shard_index": rank + 1}))
    writer.write_data(plan, planner).wait()


@contextmanager
def _single_process() -> Iterator[None]:
    """Silence torch's remark that one process saves alone: that is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*", category=UserWarning)
        yield


def _describe(files: Iterable[Path]) -> FileEntries:
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
