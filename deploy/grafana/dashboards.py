"""Writes the dashboards that Grafana loads: python deploy/grafana/dashboards.py"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from queue_panels import queue
from teacher_panels import teacher
from training_panels import training

DIRECTORY = Path(__file__).parent / "dashboards"


def files() -> Iterator[tuple[str, str]]:
    """Name and content of every file."""
    for name, dashboard in (("teacher", teacher()), ("queue", queue()), ("training", training())):
        yield f"{name}.json", json.dumps(dashboard, indent=1) + "\n"


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for file_name, text in files():
        (DIRECTORY / file_name).write_text(text, encoding="utf-8")
