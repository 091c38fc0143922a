"""How every process writes its log: lines on stderr, tracebacks without the values of variables."""

from __future__ import annotations

import logging
import sys

import structlog


def log_to_stderr(least: int = logging.NOTSET) -> None:
    """Set up the log of this process; lines below the level `least` are left out.

    Stdout is for a command's own answer. Tracebacks are Python's plain ones: structlog would use rich
    where it is installed, and rich prints the local variables of every frame, tokens and URLs included.
    """
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.StackInfoRenderer(),
            structlog.dev.set_exc_info,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            console,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
