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
    """Key names; the Lua scripts build `group`, `scored`, `placed`, `submitted` and the registries alike."""

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

    def present(self, role: str) -> str:
        """Processes of a role by name."""
        return f"{self.namespace}:present:{role}"

    @property
    def teachers(self) -> str:
        """Every teacher that was ever asked or had a replica: nobody has to search the keys."""
        return f"{self.namespace}:teachers"

    @property
    def runs(self) -> str:
        """Every run that ever placed an order or submitted a group."""
        return f"{self.namespace}:runs"
