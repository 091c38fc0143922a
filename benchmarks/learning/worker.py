"""The process that does tasks, one after the other: each a line on its input, its progress on its output."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import Sizes
from benchmarks.learning.experiments import EXPERIMENTS
from benchmarks.learning.tasks import costs_path, write_result
from launcher.parent_death import follow_parent

REPORTS = 50  # of one task at most


def do(task: dict[str, Any], directory: Path, sizes: Sizes, source: str) -> None:
    """Do one task: its path exists when this returns."""
    if not task["arm"]:
        from benchmarks.learning.models import make_model

        worked = time.process_time()
        path = make_model(directory / "models", task["model"], task["seed"], _report)
        write_result(costs_path(path), {"cpu_seconds": time.process_time() - worked})
        return
    from benchmarks.learning.loop import Session

    experiment = EXPERIMENTS[task["experiment"]]
    began, worked = time.time(), time.process_time()
    session = Session(experiment, experiment.arm(task["arm"]), task["seed"], directory, sizes)
    course = asyncio.run(session.run(_report))
    write_result(
        Path(task["path"]),
        {
            "arm": task["arm"], "seed": task["seed"], "source": source,
            "began": began, "ended": time.time(), "cpu_seconds": time.process_time() - worked,
            "warnings": list(session.plan.warnings), **asdict(course),
        },
    )  # fmt: skip


def _report(step: int, steps: int) -> None:
    if step % max(1, steps // REPORTS) == 0 or step == steps:
        _say({"step": step, "steps": steps})


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--source", required=True)
    options = parser.parse_args()
    follow_parent()
    from services.logs import log_to_stderr

    log_to_stderr(logging.ERROR)
    for line in sys.stdin:
        try:
            do(json.loads(line), options.directory, Sizes(**options.sizes), options.source)
        except Exception:  # noqa: BLE001 -- one task must not end the others; the caller hears of it
            _say({"failed": traceback.format_exc()})
        else:
            _say({"done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
