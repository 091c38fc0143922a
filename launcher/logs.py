"""Log lines of library code inside a command that talks to a person: warnings only, and to stderr."""

from __future__ import annotations

import logging
import sys

import structlog


def only_warnings(least: int = logging.WARNING) -> None:
    """Silence what is below `least`; stdout is for the command's own answer."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
