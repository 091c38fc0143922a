"""How a look at a running stack appears: two tables, on a terminal or anywhere else."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.progress import sparkline
from launcher.status_look import RunLook, StackLook, TeacherLook

MAX_RUNS = 12
UNKNOWN = "–"


def render(look: StackLook, problem: str | None = None) -> RenderableType:
    """The whole view; `problem` says why it is not of this moment."""
    parts: list[RenderableType] = [_header(look)]
    if problem is not None:
        parts.append(Text(f"no answer, below is the last look: {problem}", style="yellow"))
    if look.teachers:
        parts.append(_teachers(look.teachers))
    if look.runs:
        parts.append(_runs(look.runs[:MAX_RUNS]))
    if len(look.runs) > MAX_RUNS:
        parts.append(Text(f"and {len(look.runs) - MAX_RUNS} more runs", style="dim"))
    if not look.teachers and not look.runs:
        parts.append(Text("nothing has been asked of this queue yet", style="dim"))
    return Group(*parts)


def waiting_for(address: str, problem: str) -> RenderableType:
    """The view before the queue has ever answered."""
    return Group(
        Text.assemble(("queue ", "bold"), address),
        Text(f"no answer, trying again: {problem}", style="yellow"),
    )


def _header(look: StackLook) -> Text:
    server = look.server
    limit = f" of {_bytes(server.memory_limit_bytes)}" if server.memory_limit_bytes else ""
    return Text.assemble(
        ("queue ", "bold"),
        look.address,
        (f"  {_bytes(server.memory_bytes)}{limit}, {server.clients} clients", "dim"),
    )


def _teachers(teachers: tuple[TeacherLook, ...]) -> Table:
    table = _table(
        "teacher", "replicas", "waiting", "in flight", "oldest", "scored/s", "dead", "queued tokens"
    )
    for teacher in teachers:
        stats, rate = teacher.stats, teacher.scored_per_second
        lost = stats.dead + stats.expired
        table.add_row(
            Text(teacher.name, style="bold"),
            Text(str(teacher.replicas), style="red" if teacher.missing else "green"),
            f"{stats.waiting_tokens:,}",
            f"{stats.in_flight_tokens:,}",
            age(stats.jobs.oldest_age) if stats.jobs.waiting + stats.jobs.in_flight else UNKNOWN,
            UNKNOWN if rate is None else f"{rate:.1f}",
            Text(str(lost), style="red" if lost else "dim"),
            Text(
                "no replica" if teacher.missing else sparkline(teacher.history),
                style="red" if teacher.missing else "cyan",
            ),
        )
    return table


def _runs(runs: tuple[RunLook, ...]) -> Table:
    table = _table("run", "step", "loss", "KL", "accuracy", "staleness", "samplers", "status")
    for run in runs:
        told = run.progress
        step = UNKNOWN if told.get("step") is None else f"{told['step']}/{told.get('steps', UNKNOWN)}"
        table.add_row(
            Text(run.name, style="dim" if run.ended else "bold"),
            step,
            _number(told.get("loss")),
            _number(told.get("kl")),
            _percent(told.get("accuracy_greedy")),
            _number(told.get("staleness_mean")),
            Text(str(run.samplers), style="red" if "sampler" in run.missing else "default"),
            _status(run),
        )
    return table


def _status(run: RunLook) -> Text:
    style = {"training": "green", "finished": "dim", "stopped": "dim"}.get(run.status, "yellow")
    line = Text(run.status, style="red" if run.status.startswith("failed") else style)
    if run.missing:
        line.append(f"; missing: {', '.join(run.missing)}", style="red")
    if run.stats.dead_orders:
        line.append(f"; {run.stats.dead_orders} orders given up", style="red")
    return line


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(others[-1])
    return table


def age(seconds: float) -> str:
    """3.2s, 4m, 2h or 5d."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.1f}s"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f}%"
