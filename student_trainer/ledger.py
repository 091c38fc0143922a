"""What a run has done so far, saved inside every checkpoint: the reason nothing is trained twice."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from services.models.channel import Lineage, lineage_from_document, lineage_to_document
from student_trainer.index_set import IndexSet

# Why a group was not trained.
DropReason = Literal["stale", "failed", "identity", "shape", "no_score", "weights"]


@dataclass(slots=True)
class TeacherPin:
    """The identity every score of a teacher must carry: that of its first score of the run."""

    model: str
    revision: str
    weights_version: int
    tokenizer_fingerprint: str


@dataclass(slots=True)
class Ledger:
    """State of a run other than tensors, all of it as of the same optimizer step.

    `applied` and `dropped` hold group indices of the whole run, so a group that is delivered
    again (after a crash, or resubmitted long after its payload was deleted) is recognised.
    Duplicates are counted apart: they say something about deliveries, not about the run.
    """

    settings: dict[str, Any]  # what may not change between a run and its resumption
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    step: int = 0
    lineage: Lineage = ()  # of the weights at `step`
    replacements: int = 0  # replacement groups ordered so far
    applied: IndexSet = field(default_factory=IndexSet)
    dropped: IndexSet = field(default_factory=IndexSet)
    drop_counts: Counter[str] = field(default_factory=Counter)
    missing_views: Counter[str] = field(default_factory=Counter)  # groups trained without scores of a view
    refused_steps: int = 0
    pins: dict[str, TeacherPin] = field(default_factory=dict)
    # Of each weight channel: the stamps under which versions were published that may still be scored with.
    publications: dict[str, dict[int, str]] = field(default_factory=dict)
    pending_evaluations: list[int] = field(default_factory=list)
    tokens_sampled: int = 0
    tokens_scored: int = 0
    gate: dict[str, Any] = field(default_factory=dict)  # HysteresisGate.state of the plan's gate
    seconds: float = 0.0  # time spent training, over every process that worked on the run

    def knows(self, index: int) -> bool:
        """Whether this group was already trained or dropped."""
        return index in self.applied or index in self.dropped

    def drop(self, index: int, reason: DropReason) -> None:
        self.dropped.add(index)
        self.drop_counts[reason] += 1

    def to_json(self) -> str:
        document = {name: getattr(self, name) for name in self.__slots__}
        document["applied"] = self.applied.intervals()
        document["dropped"] = self.dropped.intervals()
        document["lineage"] = lineage_to_document(self.lineage)
        document["pins"] = {
            teacher: {name: getattr(pin, name) for name in TeacherPin.__slots__}
            for teacher, pin in self.pins.items()
        }
        return json.dumps(document, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        document = json.loads(text)
        document["applied"] = IndexSet(document["applied"])
        document["dropped"] = IndexSet(document["dropped"])
        document["lineage"] = lineage_from_document(document["lineage"])
        document["drop_counts"] = Counter(document["drop_counts"])
        document["missing_views"] = Counter(document["missing_views"])
        document["pins"] = {teacher: TeacherPin(**pin) for teacher, pin in document["pins"].items()}
        document["publications"] = {
            channel: {int(version): stamp for version, stamp in published.items()}
            for channel, published in document["publications"].items()
        }
        return cls(**document)
