"""Directories that appear whole or not at all, also when the writer is killed or the power fails."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LEFTOVERS = (".tmp", ".trash")


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling; on success it is on disk and takes the place of `final` by a rename.

    A reader sees the old directory, for an instant none, then the new one; never a mixture.
    """
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        fsync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        remove_directory(final)
    temporary.rename(final)
    fsync_path(final.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory that others may be listing: it vanishes by a rename, then is emptied."""
    trash = path.with_name(f".{path.name}.{uuid.uuid4().hex}.trash")
    path.rename(trash)
    shutil.rmtree(trash)


def sweep_leftovers(parent: Path) -> None:
    """Delete what killed writers left in `parent`; only for its single writer, before it writes."""
    for path in parent.glob(".*"):
        if path.suffix in _LEFTOVERS and path.is_dir():
            shutil.rmtree(path)


def fsync_tree(directory: Path) -> None:
    """Force every file and directory below `directory`, and itself, to disk."""
    for root, _, files in os.walk(directory):
        for name in files:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
