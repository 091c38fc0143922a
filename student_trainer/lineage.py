"""How weights came to be, so that two version numbers can be compared across resumptions.

A trainer that is killed at step 80 and resumes at 50 numbers its versions from 51 again: version 78 of
before and version 79 of now are 28 + 29 updates apart, not one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from itertools import takewhile

from tutelage.v1 import rollout_pb2

from services.models.channel import Lineage, Stretch

__all__ = ["Lineage", "Stretch", "continued", "from_proto", "to_proto", "updates_between"]


def continued(lineage: Lineage, step: int) -> Lineage:
    """The lineage of a trainer that starts, or resumes, at `step`."""
    return (*lineage, Stretch(uuid.uuid4().hex[:12], step))


def updates_between(ours: Lineage, step: int, theirs: Lineage, version: int) -> int:
    """Optimizer steps back from version `version` of `theirs` to the last common weights, and on to ours."""
    common = min(step, version)
    if ours != theirs:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
        parted = [lineage[shared].start for lineage in (ours, theirs) if len(lineage) > shared]
        common = min(common, *parted)
    return (step - common) + (version - common)


def to_proto(lineage: Lineage) -> list[rollout_pb2.PolicyStretch]:
    return [rollout_pb2.PolicyStretch(id=stretch.id, start=stretch.start) for stretch in lineage]


def from_proto(stretches: Iterable[rollout_pb2.PolicyStretch]) -> Lineage:
    return tuple(Stretch(stretch.id, stretch.start) for stretch in stretches)
