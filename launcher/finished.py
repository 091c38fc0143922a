"""Waits for the end of a run that other processes work on, writes its report, and then stays.

python -m launcher.finished RUN.toml --flag /tmp/finished

The last container of a stack: it is healthy once the flag is there, so that whoever waits for the whole stack
to be healthy waits for the run. SIGTERM ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.logs import log_to_stderr

if TYPE_CHECKING:
    from services.queue import Queue

LOOK_SECONDS = 1.0
FAILED_SECONDS = 120.0  # a trainer that failed may be started again; after this nobody did
ABSENT_SECONDS = 600.0  # one that was killed says nothing; longer than any wait before a restart

log = structlog.get_logger(__name__)


async def wait_for_end(
    queue: Queue, run: str, *, patience: float = FAILED_SECONDS, absence: float = ABSENT_SECONDS
) -> str:
    """The run's last status: "finished", or how it failed if that stays so for `patience` seconds.

    A run that has had a trainer and has none for `absence` seconds has failed, too, unless it was stopped in
    good order. Seconds are counted by looks: those in which the queue does not answer say nothing.
    """
    from services.queue import TRAINER_ROLE

    begun, failed, absent = False, 0.0, 0.0
    while True:
        status = str((await queue.read_progress(run)).get("status", ""))
        present = run in await queue.alive(TRAINER_ROLE)
        begun = begun or present or status != ""
        if status == "finished":
            return status
        failed = failed + LOOK_SECONDS if status.startswith("failed") else 0.0
        lost = begun and not present and status != "stopped"
        absent = absent + LOOK_SECONDS if lost else 0.0
        if failed > patience:
            return status
        if absent > absence:
            return f"no trainer for {absence:g} s; the last status was {status!r}"
        await asyncio.sleep(LOOK_SECONDS)


async def _watch(run_file: Path) -> bool:
    """Wait for the end and write the report; False when the run has failed."""
    from launcher.queue_address import given_queue_url
    from student_trainer.config import load_run_config
    from student_trainer.report.page import write_report
    from student_trainer.run_queue import run_queue

    config = load_run_config(run_file, queue_url=given_queue_url())
    queue = run_queue(config)
    try:
        await queue.open(patience=None)
        status = await wait_for_end(queue, config.run.name)
    finally:
        await queue.close()
    if status != "finished":
        log.error("the run has failed", status=status)
        return False
    page = await asyncio.to_thread(write_report, config.run.directory)
    log.info("the run is finished", student=str(config.run.directory / "student"), report=str(page))
    return True


async def _watch_and_stay(run_file: Path, flag: Path) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    stopping, watching = asyncio.create_task(stop.wait()), asyncio.create_task(_watch(run_file))
    await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not watching.done():
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return 0
    if not watching.result():
        return 1
    await asyncio.to_thread(flag.touch)
    await stopping
    return 0


def main() -> int:
    """Entry point of `python -m launcher.finished`."""
    from launcher.cli_errors import one_line_errors

    parser = argparse.ArgumentParser(description="Wait for the end of a run, report, and stay.")
    parser.add_argument("run_file", type=Path, metavar="RUN.toml")
    parser.add_argument("--flag", type=Path, required=True, help="file that is made once the report is there")
    arguments = parser.parse_args()
    log_to_stderr(logging.INFO)
    arguments.flag.unlink(missing_ok=True)  # of an earlier run
    with one_line_errors():
        return asyncio.run(_watch_and_stay(arguments.run_file, arguments.flag))


if __name__ == "__main__":
    sys.exit(main())
