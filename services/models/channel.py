"""A channel of published weights as a reader sees it: DIRECTORY/v00000012/, each a Hugging Face directory.

One trainer writes (`student_trainer/policy_store.py`); any number of samplers and teachers read. A version
appears by a rename after every byte is on disk, so a reader that sees it can load it. Deleted versions
vanish by a rename too: a reader that loses one while loading gets an error from whatever reads the files,
and asks for the newest again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tutelage_client.errors import TutelageError

STAMP_FILE = "policy.json"
_NAME = re.compile(r"v(\d{8,})")


@dataclass(frozen=True, slots=True)
class Stretch:
    """The updates that one trainer process made, from version `start` on."""

    id: str
    start: int


# The stretches that led to some weights, oldest first; each ends where the next one starts.
Lineage = tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """Weights after `version` optimizer steps.

    `stamp` tells publications of one number apart: a trainer that resumes from an older checkpoint
    publishes the same numbers again with other weights, and a reader must then reload.
    """

    version: int
    path: Path
    stamp: str
    lineage: Lineage = ()


class Channel:
    """The published versions in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def versions(self) -> list[int]:
        """Every published version, oldest first; empty before the first."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def get(self, version: int) -> PolicyVersion | None:
        """This version, or None when it is not published or already deleted.

        Raises:
            TutelageError: FAILED_PRECONDITION for a publication whose stamp cannot be read.
        """
        path = self.path(version)
        try:
            document = json.loads((path / STAMP_FILE).read_text())
            return PolicyVersion(version, path, document["stamp"], lineage_from_document(document["lineage"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            message = f"weights: {path / STAMP_FILE} is damaged: {type(error).__name__}: {error}"
            raise TutelageError("FAILED_PRECONDITION", message) from error

    def latest(self) -> PolicyVersion | None:
        """The newest version, or None before the first."""
        for version in reversed(self.versions()):
            if (found := self.get(version)) is not None:
                return found
        return None

    def path(self, version: int) -> Path:
        """Where a version lies, or would lie."""
        return self.directory / f"v{version:08d}"


def lineage_to_document(lineage: Lineage) -> list[list[str | int]]:
    """As JSON holds it."""
    return [[stretch.id, stretch.start] for stretch in lineage]


def lineage_from_document(document: Iterable[tuple[str, int]]) -> Lineage:
    """As it was before `lineage_to_document`."""
    return tuple(Stretch(name, start) for name, start in document)
