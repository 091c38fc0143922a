"""`tutelage quickstart`: models, run, measurement, report and a table, from nothing to a better student."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage_client.errors import TutelageError, invalid

from launcher.doctor_checks import VLLM_MISSING
from launcher.quickstart_models import TrainingFailedError, name_models, prepare_with_bars
from launcher.up import only_one, run_up
from services.logs import log_to_stderr

if TYPE_CHECKING:
    from launcher.quickstart_measure import Measured
    from student_trainer.config import RunConfig

RECIPES = Path(__file__).parents[1] / "recipes"
MAIN = {"transformers": "quickstart.toml", "vllm": "quickstart-vllm.toml"}  # by the teacher's engine
COMPARED = {
    "off-policy distillation": "quickstart-off-policy.toml",
    "GRPO, no teacher": "quickstart-grpo.toml",
}
ENOUGH = 0.75  # share of the gap between student and teacher that has to be closed


@dataclass(frozen=True, slots=True)
class Result:
    """One finished run of one recipe."""

    config: RunConfig
    measured: Measured
    seconds: float
    tokens_sampled: int
    tokens_scored: int


def run_quickstart(*, engine: str, compare: bool) -> int:
    """0 when the student closed enough of the gap, 1 when not or when something did not finish.

    Raises:
        TutelageError: there is no such engine, or it is not installed.
    """
    if engine not in MAIN:
        raise invalid(f"--engine: got {engine!r}, must be {' or '.join(MAIN)}")
    if engine == "vllm" and find_spec("vllm") is None:
        raise TutelageError("FAILED_PRECONDITION", f"--engine vllm: {VLLM_MISSING}")
    recipe = MAIN[engine]
    from rich.console import Console
    from rich.markup import escape

    log_to_stderr(logging.WARNING)
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    config = _config(recipe)
    try:
        teacher = _prepare_models(config)
    except TrainingFailedError as error:
        console.print(f"[bold red]{escape(str(error))}[/]")
        return 1
    console.print(f"models ready after {time.monotonic() - started:.0f} s; they are kept for the next time\n")
    result = _run(recipe, teacher)
    if result is None:
        return 1
    rows = _measure_before(config, teacher) | {"student after": result.measured}
    seconds = time.monotonic() - started
    page = _write_report(result, rows, seconds)
    _print_table(console, rows)
    _print_totals(console, result, seconds)
    closed = {kind: share_closed(rows, kind) for kind in ("greedy", "sampled")}
    console.print(
        f"closed of the gap to the teacher: {closed['greedy']:.0%} greedy, {closed['sampled']:.0%} sampled"
    )
    console.print(f"report: [bold]{page}[/bold]")
    enough = min(closed.values()) >= ENOUGH
    if not enough:
        console.print(f"[bold red]less than {ENOUGH:.0%} of the gap was closed[/]")
    if compare and not _compare(console, rows, teacher):
        return 1
    return 0 if enough else 1


def share_closed(rows: dict[str, Measured], kind: str) -> float:
    """(after - before) / (teacher - before) of one kind of accuracy."""
    before, after, teacher = (
        getattr(rows[name], kind) for name in ("student before", "student after", "teacher")
    )
    return float((after - before) / (teacher - before))


def _config(recipe: str) -> RunConfig:
    from student_trainer.config import load_run_config

    return load_run_config(RECIPES / recipe)


def _prepare_models(config: RunConfig) -> Path:
    """Train or find both models and let the names that the recipes use point at them."""
    teacher = Path(str(config.teachers["teacher"].model))
    name_models(*prepare_with_bars(teacher.parent))
    return teacher


def _run(recipe: str, teacher: Path) -> Result | None:
    """`tutelage up` on a fresh run directory, then the measurement of its student; None when it failed."""
    from launcher.quickstart_measure import measure

    config = _config(recipe)
    directory = config.run.directory
    if directory.exists():
        with only_one(directory):
            shutil.rmtree(directory)
    started = time.monotonic()
    if run_up(RECIPES / recipe) != 0:
        return None
    seconds = time.monotonic() - started
    print(f"measuring the student on {config.training.evaluation_prompts} held-out prompts", flush=True)
    last = _last_step(directory)
    return Result(
        config=config,
        measured=measure(config, directory / "student", teacher),
        seconds=seconds,
        tokens_sampled=int(last["tokens_sampled"]),
        tokens_scored=int(last["tokens_scored"]),
    )


def _last_step(directory: Path) -> dict[str, Any]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return max((record for record in records if "step" in record), key=lambda record: int(record["step"]))


def _measure_before(config: RunConfig, teacher: Path) -> dict[str, Measured]:
    from launcher.quickstart_measure import measure

    return {
        "teacher": measure(config, teacher, teacher),
        "student before": measure(config, Path(config.student.model), teacher),
    }


def _write_report(result: Result, rows: dict[str, Measured], seconds: float) -> Path:
    from student_trainer.report.page import write_report
    from student_trainer.report.run_data import OUTCOME

    totals = {
        "tokens_sampled": result.tokens_sampled,
        "tokens_scored": result.tokens_scored,
        "tokens_per_second": result.tokens_sampled / result.seconds,
        "run_seconds": result.seconds,
        "wall_seconds": seconds,
    }
    document = {"rows": [{"name": name, **asdict(row)} for name, row in rows.items()], "totals": totals}
    (result.config.run.directory / OUTCOME).write_text(json.dumps(document, indent=1))
    return write_report(result.config.run.directory)


def _print_table(console: Any, rows: dict[str, Measured]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("")
    for title in ("greedy", "sampled at T=1", "KL to the teacher"):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{100 * row.greedy:.1f}% ± {100 * row.greedy_error:.1f}",
            f"{100 * row.sampled:.1f}% ± {100 * row.sampled_error:.1f}",
            f"{row.kl:.4f}",
            style="bold" if name == "student after" else "",
        )
    console.print("\nexact match on held-out prompts ± standard error; KL(model‖teacher) in nats per token\n")
    console.print(table)


def _print_totals(console: Any, result: Result, seconds: float) -> None:
    console.print(
        f"\n{result.tokens_sampled:,} tokens sampled, {result.tokens_scored:,} scored by the service, "
        f"{result.tokens_sampled / result.seconds:,.0f} tokens/s from start to end of the run"
    )
    console.print(f"run {result.seconds:.0f} s, everything {seconds:.0f} s")


def _compare(console: Any, rows: dict[str, Measured], teacher: Path) -> bool:
    """The same student with other methods, as they come out; False when one did not finish."""
    found = {"student before": rows["student before"], "on-policy distillation": rows["student after"]}
    tokens = []
    for name, recipe in COMPARED.items():
        console.print(f"\n{name}: {RECIPES / recipe}")
        result = _run(recipe, teacher)
        if result is None:
            return False
        found[name] = result.measured
        tokens.append(f"{name} {result.tokens_sampled:,}")
    _print_table(console, found)
    console.print(f"\ntokens sampled: {', '.join(tokens)}. One seed each, on a task of this size.")
    return True
