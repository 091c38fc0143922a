"""Which teachers of a run file the same processes serve: a model and its adapters share one vLLM engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from student_trainer.sections import TeacherEntry


@dataclass(frozen=True)
class ReplicaSet:
    """Teachers that `entry.replicas` equal processes serve.

    Attributes:
        name: of the processes, and of the teacher that a process is without its adapters.
        entry: how they are started; its adapter does not count.
        teachers: names that they answer for.
        adapters: directories, by the names of the teachers that they make.
    """

    name: str
    entry: TeacherEntry
    teachers: tuple[str, ...]
    adapters: Mapping[str, Path]


def replica_sets(teachers: Mapping[str, TeacherEntry]) -> list[ReplicaSet]:
    """In the run file's order. With engine vllm, teachers that differ in their adapter alone are one set."""
    together: dict[str, dict[str, TeacherEntry]] = {}
    for name, entry in teachers.items():
        shared = entry.engine == "vllm" and entry.address is None
        key = entry.model_dump_json(exclude={"adapter"}) if shared else f"alone {name}"
        members = together.setdefault(key, {})
        if entry.adapter is None and any(other.adapter is None for other in members.values()):
            members = together.setdefault(f"alone {name}", {})  # a second name for the same weights
        members[name] = entry
    return [_replica_set(members) for members in together.values()]


def _replica_set(members: Mapping[str, TeacherEntry]) -> ReplicaSet:
    adapters = {name: entry.adapter for name, entry in members.items() if entry.adapter is not None}
    first = next((name for name in members if name not in adapters), next(iter(members)))
    return ReplicaSet(first, members[first], tuple(members), adapters)
