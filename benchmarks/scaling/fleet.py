"""The fleet as its Deployment sees it: what is wanted, what is there, what is on its way."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.scaling.host import HostOptions

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Replica:
    """One replica and the moments of its life, in real seconds of the shared clock."""

    name: str
    host: Host
    started: float
    ready: float | None = None
    draining: float | None = None
    gone: float | None = None
    killed: bool = False


class Host:
    """A process full of replicas."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.replicas = 0
        self.up = asyncio.Event()
        self.ended = asyncio.Event()

    def say(self, do: str, name: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "name": name}).encode() + b"\n")

    def cpu_seconds(self) -> float:
        return process_cpu_seconds(self.process.pid)


def process_cpu_seconds(pid: int) -> float:
    """Processor time of a process so far; 0 when it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


@dataclass
class Fleet:
    """Starts and drains replicas until there are as many as wanted; replaces those that were killed."""

    options: HostOptions
    log: Path
    hosts: list[Host] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)  # every one there ever was
    outcomes: Counter[str] = field(default_factory=Counter)  # of jobs, as drained replicas counted them
    wanted: int = 0
    cpu_of_the_dead: float = 0.0
    _reading: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self, hosts: int) -> None:
        """Bring the processes up; no replica runs yet."""
        for _ in range(hosts):
            await self._start_host()
        async with asyncio.timeout(60):
            for host in self.hosts:
                await host.up.wait()

    async def stop(self) -> None:
        """Drain everything and end the processes."""
        for host in self.hosts:
            assert host.process.stdin is not None
            host.process.stdin.close()
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*self._reading)
        finally:
            for host in self.hosts:
                if host.process.returncode is None:
                    host.process.kill()
                await host.process.wait()

    def living(self) -> list[Replica]:
        """What counts as a replica: started and neither gone nor told to go."""
        return [r for r in self.replicas if r.gone is None and r.draining is None]

    def ready(self) -> int:
        return sum(r.ready is not None for r in self.living())

    def scale(self, wanted: int) -> None:
        """From now on `wanted` replicas. As a ReplicaSet: those not ready yet go first, then the newest."""
        self.wanted = wanted
        living = self.living()
        for _ in range(wanted - len(living)):
            self._start_replica()
        living.sort(key=lambda replica: (replica.ready is None, replica.started))
        for replica in living[wanted:]:
            replica.draining = time.monotonic()
            replica.host.say("drain", replica.name)

    async def kill_host(self) -> int:
        """kill -9 of the process that has most replicas; another takes its place. The replicas that died."""
        host = max(self.hosts, key=self._on)
        self.cpu_of_the_dead += host.cpu_seconds()
        host.process.kill()
        self.hosts.remove(host)
        now, died = time.monotonic(), 0
        for replica in self.replicas:
            if replica.host is host and replica.gone is None:
                replica.gone, replica.killed = now, True
                died += replica.ready is not None
        await self._start_host()
        return died

    def cpu_seconds(self) -> float:
        return self.cpu_of_the_dead + sum(host.cpu_seconds() for host in self.hosts)

    def _on(self, host: Host) -> int:
        return sum(r.host is host and r.gone is None for r in self.replicas)

    def _start_replica(self) -> None:
        host = min(self.hosts, key=self._on)
        replica = Replica(f"replica-{len(self.replicas)}", host, time.monotonic())
        self.replicas.append(replica)
        host.say("start", replica.name)

    async def _start_host(self) -> None:
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "benchmarks.scaling.host", self.options.as_json(),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        host = Host(process)
        self.hosts.append(host)
        self._reading.add(asyncio.create_task(self._listen(host)))

    async def _listen(self, host: Host) -> None:
        """Take down what a host tells until it ends."""
        assert host.process.stdout is not None
        while line := await host.process.stdout.readline():
            told = json.loads(line)
            if told["event"] == "up":
                host.up.set()
            elif told["event"] in ("ready", "gone"):
                self._note(told["event"], told["name"], told["at"], told.get("outcomes", {}))
        await host.process.wait()
        host.ended.set()

    def _note(self, event: str, name: str, at: float, outcomes: dict[str, int]) -> None:
        replica = self.replicas[int(name.rpartition("-")[2])]
        if event == "ready":
            replica.ready = at
        elif replica.gone is None:
            replica.gone = at
            self.outcomes.update(outcomes)
