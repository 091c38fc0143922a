"""Every key the queue uses, under one namespace."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamKeys:
    """A work stream with its consumer group, load counters and dead letters."""

    stream: str
    group: str
    load: str
    dead: str

    def as_list(self) -> list[str]:
        return [self.stream, self.load, self.dead]


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names; the Lua scripts build `group`, `scored`, `placed` and `submitted` in the same way."""

    namespace: str

    def jobs(self, teacher: str) -> StreamKeys:
        return StreamKeys(
            f"{self.namespace}:jobs:{teacher}",
            "replicas",
            f"{self.namespace}:load:{teacher}",
            f"{self.namespace}:dead:{teacher}",
        )

    def orders(self, run: str) -> StreamKeys:
        return StreamKeys(
            f"{self.namespace}:orders:{run}",
            "samplers",
            f"{self.namespace}:order-load:{run}",
            f"{self.namespace}:dead-orders:{run}",
        )

    def scored(self, run: str) -> StreamKeys:
        """The trainer's stream; nothing in it is ever buried or counted."""
        return StreamKeys(f"{self.namespace}:scored:{run}", "trainer", "", "")

    def group(self, group: str) -> str:
        return f"{self.namespace}:group:{group}"

    def placed(self, run: str) -> str:
        return f"{self.namespace}:placed:{run}"

    def submitted(self, run: str, order: str) -> str:
        return f"{self.namespace}:submitted:{run}:{order}"

    def progress(self, run: str) -> str:
        return f"{self.namespace}:run:{run}"

    def alive(self, role: str, name: str) -> str:
        return f"{self.namespace}:alive:{role}:{name}"
