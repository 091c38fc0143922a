"""Published policy versions: RUN_DIR/policy/v00000012/, each a Hugging Face directory.

One trainer writes; any number of samplers read. A version appears by a rename after every byte
is on disk, so a reader that sees it can load it. Deleted versions vanish by a rename too: a
reader that loses one while loading gets FileNotFoundError and asks for the newest again.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from student_trainer.durable import atomic_directory, remove_directory, sweep_leftovers
from student_trainer.lineage import Lineage, from_document, to_document

_NAME = re.compile(r"v(\d{8,})")
_STAMP = "policy.json"


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """Weights after `version` optimizer steps.

    `stamp` is new with every publication: a trainer that resumes from an older checkpoint
    publishes the same numbers again with other weights, and a reader must then reload.
    """

    version: int
    path: Path
    stamp: str
    lineage: Lineage = ()


class PolicyStore:
    """The directory of policy versions of one run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def publish(self, version: int, write: Callable[[Path], None], *, lineage: Lineage = ()) -> PolicyVersion:
        """Make a version visible: `write` fills an empty directory, which is then synced and renamed."""
        final = self._path(version)
        stamp = uuid.uuid4().hex
        with atomic_directory(final) as temporary:
            write(temporary)
            document = {"version": version, "stamp": stamp, "lineage": to_document(lineage)}
            (temporary / _STAMP).write_text(json.dumps(document))
        return PolicyVersion(version, final, stamp, lineage)

    def versions(self) -> list[int]:
        """Every published version, oldest first; empty before the first."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def get(self, version: int) -> PolicyVersion | None:
        """This version, or None when it is not published or already deleted."""
        path = self._path(version)
        try:
            document = json.loads((path / _STAMP).read_text())
        except FileNotFoundError:
            return None
        return PolicyVersion(version, path, document["stamp"], from_document(document["lineage"]))

    def latest(self) -> PolicyVersion | None:
        """The newest version, or None before the first."""
        for version in reversed(self.versions()):
            if (found := self.get(version)) is not None:
                return found
        return None

    def prune(self, oldest: int, pinned: Collection[int] = ()) -> None:
        """Delete versions below `oldest` that are not `pinned`; the newest always stays."""
        for version in self.versions()[:-1]:
            if version < oldest and version not in pinned:
                remove_directory(self._path(version))

    def discard_above(self, version: int) -> None:
        """Delete what a killed trainer published after the checkpoint that is being resumed.

        Newest first: to a reader, a version that is absent below a newer one is gone for good, and
        one above the newest is still to come.
        """
        sweep_leftovers(self.directory)
        for newer in reversed(self.versions()):
            if newer > version:
                remove_directory(self._path(newer))

    def _path(self, version: int) -> Path:
        return self.directory / f"v{version:08d}"
