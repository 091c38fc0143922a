"""Watches the children of one run: reports a death at once, restarts, stops everything in order."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from launcher.children import Child, ChildSpec, RestartPolicy, describe_exit
from services.exit_status import EXIT_BAD_INPUT

POLL_SECONDS = 0.1
STOP_ORDER = ("sampler", "trainer", "teacher")

Ending = Literal["finished", "stopped", "failed"]


class Screen(Protocol):
    """Where the supervisor says what happened."""

    def say(self, message: str, detail: Sequence[str] = (), *, problem: bool = False) -> None: ...


class QueueServer(Protocol):
    """The queue as a thing that runs, when this command owns it."""

    def start(self) -> str: ...

    def stop(self) -> None: ...

    @property
    def running(self) -> bool: ...


@dataclass(slots=True)
class Supervisor:
    """Children of one run, and the queue they meet in (None: somebody else's)."""

    specs: Sequence[ChildSpec]
    log_directory: Path
    screen: Screen
    queue: QueueServer | None = None
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    children: list[Child] = field(default_factory=list)
    reason: str = ""
    _stopping: bool = False
    _hurry: bool = False
    _queue_restarts: int = 0
    _queue_started: float = 0.0

    def request_stop(self) -> None:
        """A signal to this command: the first stops in order, the second at once."""
        if self._stopping:
            self._hurry = True
            for child in self.children:
                child.send(signal.SIGKILL)
            self.screen.say("stopping at once", problem=True)
        else:
            self._stopping = True
            self.screen.say(
                "stopping: sampler, trainer (saves a checkpoint), teachers. Again to stop at once."
            )

    async def run(self, says_finished: Callable[[], Awaitable[bool | None]]) -> Ending:
        """Start every child and watch until the run is over, a stop is asked for, or all hope is gone.

        Args:
            says_finished: asked when the trainer has exited with status 0, which it also does when
                somebody else stopped it; None means that the answer is not known yet.
        """
        self._queue_started = time.monotonic()
        self.children = [Child(spec, self.log_directory / f"{spec.name}.log") for spec in self.specs]
        try:
            for child in self.children:
                child.start()
            ending = await self._watch(says_finished)
            await self._stop_children()
        finally:
            for child in self.children:
                child.send(signal.SIGKILL)
            if self.queue is not None:
                self.queue.stop()
        return ending

    async def _watch(self, says_finished: Callable[[], Awaitable[bool | None]]) -> Ending:
        while not self._stopping:
            if not self._queue_is_up():
                return "failed"
            for child in self.children:
                code = self._look_at(child)
                if code == 0 and child.spec.role == "trainer":
                    finished = await says_finished()
                    if finished:
                        return "finished"
                    if finished is None:
                        continue
                if code is not None and (ending := self._after_death(child, code)) is not None:
                    return ending
            await asyncio.sleep(POLL_SECONDS)
        self.reason = "stopped on request"
        return "stopped"

    def _look_at(self, child: Child) -> int | None:
        """The exit status of a child that has died; starts one whose time for a restart has come."""
        if child.restart_at is not None:
            if time.monotonic() >= child.restart_at:
                child.start()
            return None
        assert child.process is not None
        child.exit_code = child.process.poll()
        return child.exit_code

    def _after_death(self, child: Child, code: int) -> Ending | None:
        now = time.monotonic()
        name, how = child.spec.name, describe_exit(code)
        if code == EXIT_BAD_INPUT:
            self.reason = f"{name} refused its input ({how}); see {child.log_path}"
            self.screen.say(f"{name} refused its input", child.last_lines(), problem=True)
            return "failed"
        if now - child.started_at >= self.policy.healthy_seconds:
            child.restarts = 0
        if child.restarts >= self.policy.max_restarts:
            self.reason = f"{name} died {child.restarts + 1} times ({how}); see {child.log_path}"
            self.screen.say(f"{name} died again ({how}); giving up", child.last_lines(), problem=True)
            return "failed"
        child.restarts += 1
        child.total_restarts += 1
        delay = self.policy.delay(child.restarts)
        child.restart_at = now + delay
        self.screen.say(
            f"{name} died ({how}); restart {child.restarts} of {self.policy.max_restarts} in {delay:g} s",
            child.last_lines(),
            problem=True,
        )
        return None

    def _queue_is_up(self) -> bool:
        """Restart the embedded server when it died; False when it keeps dying."""
        if self.queue is None or self.queue.running:
            return True
        now = time.monotonic()
        if now - self._queue_started >= self.policy.healthy_seconds:
            self._queue_restarts = 0
        if self._queue_restarts >= self.policy.max_restarts:
            self.reason = f"the embedded queue died {self._queue_restarts + 1} times"
            self.screen.say("the embedded queue died again; giving up", problem=True)
            return False
        self._queue_restarts += 1
        self.screen.say(
            f"the embedded queue died; restart {self._queue_restarts} of {self.policy.max_restarts}",
            problem=True,
        )
        self.queue.start()
        self._queue_started = now
        return True

    async def _stop_children(self) -> None:
        """SIGTERM in order, each role after the one before it has gone; SIGKILL after the grace period."""
        for role in STOP_ORDER:
            group = [child for child in self.children if child.spec.role == role]
            for child in group:
                child.restart_at = None
                child.send(signal.SIGTERM)
            await asyncio.gather(*(self._await_exit(child) for child in group))

    async def _await_exit(self, child: Child) -> None:
        deadline = time.monotonic() + child.spec.grace_seconds
        while child.running:
            if self._hurry or time.monotonic() >= deadline:
                if not self._hurry:
                    seconds = child.spec.grace_seconds
                    self.screen.say(
                        f"{child.spec.name} did not stop within {seconds:g} s; killed", problem=True
                    )
                child.send(signal.SIGKILL)
                await asyncio.to_thread(child.process.wait) if child.process else None
                return
            if not self._queue_is_up():
                return
            await asyncio.sleep(POLL_SECONDS)


def install_signals(handler: Callable[[], None]) -> None:
    """Route SIGINT and SIGTERM of this process to `handler`, inside the running loop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handler)
