"""Exit statuses of every process: what trying again may cure, and what it cannot."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
# Codes of TutelageError that trying again cannot cure: `tutelage up` does not restart such a child.
PERMANENT = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "UNAUTHENTICATED")


def exit_status(error: BaseException) -> int:
    """The status with which a process that met `error` ends."""
    from tutelage_client.errors import TutelageError  # here: it loads gRPC, and `--help` must not

    permanent = isinstance(error, TutelageError) and error.code in PERMANENT
    return EXIT_BAD_INPUT if permanent else EXIT_FAILED


def end_here(status: int) -> NoReturn:
    """End the process at once; in the interpreter's own shutdown, threads of libraries can still abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
