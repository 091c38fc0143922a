"""What a person sees while a run goes on: a live view on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_EVERY = 5.0
SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class ChildView:
    """A process as the screen shows it."""

    name: str
    state: str  # "running", "restarting", "stopped"
    restarts: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at a run; None where nothing is known yet."""

    run: str
    steps: int
    status: str | None = None  # the trainer's own words
    step: int | None = None
    loss: float | None = None
    kl: float | None = None
    reward: float | None = None
    staleness: float | None = None
    greedy: float | None = None
    sampled: float | None = None
    queued_tokens: int | None = None
    scored_per_second: float | None = None
    children: tuple[ChildView, ...] = ()


class View(Protocol):
    """Both ways of showing a run."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, snapshot: Snapshot) -> None: ...

    def say(self, message: str, detail: Sequence[str] = (), *, problem: bool = False) -> None: ...


def make_view(console: Console | None = None) -> View:
    """A live view when stdout is a terminal, else plain lines."""
    console = console or Console(highlight=False)
    return LiveView(console) if console.is_terminal else PlainView()


class PlainView:
    """A line when the run has moved, at most one every few seconds; events as they come."""

    def __init__(self, every: float = PLAIN_EVERY) -> None:
        self._every = every
        self._last_time = -math.inf
        self._shown: object = None
        self._waiting = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting:
            print(self._waiting, flush=True)

    def show(self, snapshot: Snapshot) -> None:
        news = (snapshot.step, snapshot.status, snapshot.greedy, snapshot.sampled)
        if news == self._shown:
            return
        self._waiting = plain_line(snapshot)
        if time.monotonic() - self._last_time >= self._every:
            print(self._waiting, flush=True)
            self._shown, self._waiting, self._last_time = news, "", time.monotonic()

    def say(self, message: str, detail: Sequence[str] = (), *, problem: bool = False) -> None:
        if self._waiting:
            print(self._waiting)
            self._waiting = ""
        print(("! " if problem else "") + message)
        for line in detail:
            print(f"    {line}")
        sys.stdout.flush()


class LiveView:
    """Redraws a few lines at the bottom of the terminal; events scroll by above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=False, redirect_stderr=False)
        self._started = time.monotonic()
        self._first_step: tuple[int, float] | None = None
        self._kl: list[float] = []
        self._last_step: int | None = None

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.step is not None and snapshot.step != self._last_step:
            self._last_step = snapshot.step
            if self._first_step is None:
                self._first_step = (snapshot.step, time.monotonic())
            if snapshot.kl is not None:
                self._kl.append(snapshot.kl)
        self._live.update(self.render(snapshot))

    def say(self, message: str, detail: Sequence[str] = (), *, problem: bool = False) -> None:
        style = "bold red" if problem else "cyan"
        self._console.print(f"[{style}]{escape(message)}[/{style}]")
        for line in detail:
            self._console.print(Text(f"    {line}", style="dim"))

    def render(self, snapshot: Snapshot) -> RenderableType:
        """The few lines at the bottom."""
        return Group(
            Text(),
            self._bar(snapshot),
            _figures(snapshot, sparkline(self._kl)),
            _children(snapshot.children),
            Text(snapshot.status or "starting", style="dim" if snapshot.status == "training" else "yellow"),
        )

    def _bar(self, snapshot: Snapshot) -> RenderableType:
        done = snapshot.step or 0
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(snapshot.run, style="bold"),
            Text(f"step {done}/{snapshot.steps}", style="default"),
            ProgressBar(total=snapshot.steps, completed=done, width=32),
            Text(f"{clock(time.monotonic() - self._started)}{self._left(snapshot)}", style="dim"),
        )
        return bar

    def _left(self, snapshot: Snapshot) -> str:
        if self._first_step is None or snapshot.step is None or snapshot.step <= self._first_step[0]:
            return ""
        pace = (time.monotonic() - self._first_step[1]) / (snapshot.step - self._first_step[0])
        return f", about {clock(pace * (snapshot.steps - snapshot.step))} left"


def _figures(snapshot: Snapshot, kl_history: str) -> RenderableType:
    table = Table.grid(padding=(0, 3))
    table.add_row(
        _named("accuracy", f"{_percent(snapshot.greedy)} greedy  {_percent(snapshot.sampled)} sampled"),
        _named("KL", f"{_number(snapshot.kl)}  {kl_history}"),
        _named("loss", _number(snapshot.loss)),
    )
    table.add_row(
        _named("queued", f"{_count(snapshot.queued_tokens)} tokens"),
        _named("scored", f"{_count(snapshot.scored_per_second)} tokens/s"),
        _named("staleness", _number(snapshot.staleness)),
    )
    return table


def _named(name: str, value: str) -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, "default"))


def _children(children: Sequence[ChildView]) -> RenderableType:
    line = Text()
    for child in children:
        color = {"running": "green", "restarting": "yellow"}.get(child.state, "red")
        line.append("● ", style=color)
        line.append(child.name, style="default" if child.state == "running" else color)
        note = child.state if child.state != "running" else ""
        if child.restarts:
            note += f"{', ' if note else ''}restarted {child.restarts}×"
        line.append(f" {note}   " if note else "   ", style="dim")
    return line


def plain_line(snapshot: Snapshot) -> str:
    """The whole snapshot in one line."""
    if snapshot.step is None:
        waiting = [f"{child.name} {child.state}" for child in snapshot.children]
        return f"{snapshot.run}: starting ({', '.join(waiting)})"
    parts = [f"{snapshot.run}: step {snapshot.step}/{snapshot.steps}"]
    if snapshot.status not in (None, "training"):
        parts.append(str(snapshot.status))
    if snapshot.greedy is not None:
        parts.append(f"accuracy {_percent(snapshot.greedy)} greedy {_percent(snapshot.sampled)} sampled")
    parts += [f"KL {_number(snapshot.kl)}", f"loss {_number(snapshot.loss)}"]
    parts.append(f"queued {_count(snapshot.queued_tokens)}")
    parts.append(f"scored/s {_count(snapshot.scored_per_second)}")
    parts.append(f"staleness {_number(snapshot.staleness)}")
    parts += [f"{child.name} {child.state}" for child in snapshot.children if child.state != "running"]
    return " · ".join(parts)


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """The last values as block characters, scaled from zero to their largest."""
    shown = [value for value in values if math.isfinite(value)]
    if len(shown) > width:
        size = len(shown) / width
        shown = [
            sum(shown[int(i * size) : int((i + 1) * size)]) / len(shown[int(i * size) : int((i + 1) * size)])
            for i in range(width)
        ]
    top = max(shown, default=0.0)
    if top <= 0.0:
        return ""
    return "".join(SPARKS[min(int(max(value, 0.0) / top * len(SPARKS)), len(SPARKS) - 1)] for value in shown)


def clock(seconds: float) -> str:
    """1:05 or 2:03:09."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
