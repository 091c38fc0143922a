"""Two processes that share a list of tasks, with a bar for each and one for everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.learning.arms import Sizes
from benchmarks.learning.tasks import Task, task_document
from launcher.parent_death import PARENT_VARIABLE


@dataclass
class Crew:
    """Does tasks, `workers` at a time, in order as far as what they need is there.

    A task that fails leaves the others going; those that need it are never begun.
    """

    directory: Path
    sizes: Sizes
    source: str
    workers: int = 2
    failures: dict[str, str] = field(default_factory=dict)

    def do(self, tasks: Sequence[Task]) -> None:
        """Do all that are not done yet; failures are in `failures`, by title."""
        self._waiting = [task for task in tasks if not task.done]
        self._running: list[Task] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._change = threading.Condition()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            whole = bars.add_task("all", total=len(tasks), completed=len(tasks) - len(self._waiting))
            self._bars, self._whole, self._quiet = bars, whole, console.is_terminal
            busy = min(self.workers, len(self._waiting))
            threads = [threading.Thread(target=self._work) for _ in range(busy)]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            finally:
                self._abandon()

    def _work(self) -> None:
        process = self._start()
        bar = self._bars.add_task("", visible=False)
        try:
            while (task := self._take()) is not None:
                self._bars.update(bar, description=task.title, completed=0, total=None, visible=True)
                failure = self._one(process, task, bar)
                if process.poll() is not None and self._waiting:
                    process = self._start()
                self._finish(task, failure)
        finally:
            self._bars.update(bar, visible=False)
            process.terminate()
            process.wait()

    def _one(self, process: subprocess.Popen[str], task: Task, bar: Any) -> str | None:
        """Why it failed, or None."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(json.dumps(task_document(task)), file=process.stdin, flush=True)
        except BrokenPipeError:
            return f"its process ended with status {process.wait()}"
        for line in process.stdout:
            said = json.loads(line)
            if "step" in said:
                self._bars.update(bar, completed=said["step"], total=said["steps"])
            else:
                return said.get("failed")
        return f"its process ended with status {process.wait()}"

    def _take(self) -> Task | None:
        """The first task that can be begun; waits for one; None when there will be none."""
        with self._change:
            while True:
                ready = next((task for task in self._waiting if task.ready), None)
                if ready is not None:
                    self._waiting.remove(ready)
                    self._running.append(ready)
                    return ready
                if not self._running:
                    return None
                self._change.wait()

    def _abandon(self) -> None:
        """Begin nothing more and end what runs; nothing to do when all is done."""
        with self._change:
            self._waiting.clear()
            for process in self._processes:
                process.terminate()
            self._change.notify_all()

    def _finish(self, task: Task, failure: str | None) -> None:
        with self._change:
            self._running.remove(task)
            if failure is not None:
                self.failures[task.title] = failure
            self._change.notify_all()
        self._bars.advance(self._whole)
        if failure is not None or not self._quiet:
            print(f"{task.title}{': failed' if failure else ''}", file=sys.stderr, flush=True)

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "benchmarks.learning.worker", "--directory", str(self.directory),
                "--sizes", json.dumps(asdict(self.sizes)), "--source", self.source,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,  # where sessions share the processors, each arm counts as one
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                 PARENT_VARIABLE: str(os.getpid())},
        )  # fmt: skip
        self._processes.append(process)
        return process
