"""Published weights, the writing half: RUN_DIR/policy/v00000012/ and the other channels of a run.

What a reader sees and may rely on is in `services/models/channel.py`; here is what only the one
trainer of a run does.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from services.models.channel import STAMP_FILE, Channel, Lineage, PolicyVersion, lineage_to_document
from services.models.fingerprint import directory_revision
from student_trainer.durable import atomic_directory, remove_directory, sweep_leftovers

__all__ = ["PolicyStore", "PolicyVersion", "content_stamp", "fresh_stamp"]


def fresh_stamp(directory: Path) -> str:
    """One that no other publication has."""
    return uuid.uuid4().hex


def content_stamp(directory: Path) -> str:
    """That of every publication with the same configuration and weights.

    For runs that must be repeatable: what a killed trainer had published after its checkpoint is then
    the same thing as what its successor publishes, bit for bit or not at all.
    """
    return directory_revision(directory)


class PolicyStore(Channel):
    """A channel that this process writes.

    Args:
        stamp: makes the stamp of a publication from its directory of weights.
    """

    def __init__(self, directory: Path, stamp: Callable[[Path], str] = fresh_stamp) -> None:
        super().__init__(directory)
        self._stamp = stamp

    def publish(self, version: int, write: Callable[[Path], None], *, lineage: Lineage = ()) -> PolicyVersion:
        """Make a version visible: `write` fills an empty directory, which is then synced and renamed."""
        final = self.path(version)
        with atomic_directory(final) as temporary:
            write(temporary)
            stamp = self._stamp(temporary)
            document = {"version": version, "stamp": stamp, "lineage": lineage_to_document(lineage)}
            (temporary / STAMP_FILE).write_text(json.dumps(document))
        return PolicyVersion(version, final, stamp, lineage)

    def prune(self, oldest: int, pinned: Collection[int] = ()) -> None:
        """Delete versions below `oldest` that are not `pinned`; the newest always stays."""
        for version in self.versions()[:-1]:
            if version < oldest and version not in pinned:
                remove_directory(self.path(version))

    def discard_above(self, version: int) -> None:
        """Delete what a killed trainer published after the checkpoint that is being resumed.

        Newest first: to a reader, a version that is absent below a newer one is gone for good, and
        one above the newest is still to come.
        """
        sweep_leftovers(self.directory)
        for newer in reversed(self.versions()):
            if newer > version:
                remove_directory(self.path(newer))
