"""The queue's address where it is said outside the run file: an option, the environment, or a file.

An address may hold a password, so a command line is no place for it; a file is how secrets are mounted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from student_trainer.config import RunConfig

QUEUE_URL_VARIABLE = "TUTELAGE_QUEUE_URL"
QUEUE_URL_FILE_VARIABLE = "TUTELAGE_QUEUE_URL_FILE"
PASSWORD_BELONGS = f"With a password, set {QUEUE_URL_VARIABLE} or {QUEUE_URL_FILE_VARIABLE} instead."


def given_queue_url(option: str | None = None) -> str | None:
    """`option`, else TUTELAGE_QUEUE_URL, else what the file TUTELAGE_QUEUE_URL_FILE names holds, else None.

    Raises:
        TutelageError: INVALID_ARGUMENT when that file cannot be read or is empty, or this is no address.
    """
    found = _said(option)
    if found is None:
        return None
    from tutelage_client.errors import invalid

    from services.queue_address import queue_address

    try:
        return queue_address(found)
    except ValueError as error:
        raise invalid(str(error)) from None


@contextmanager
def embedded_is_ups(config: RunConfig | None) -> Iterator[None]:
    """Where the run's embedded queue does not answer, say whose it is; other errors pass as they are."""
    from tutelage_client.errors import TutelageError

    try:
        yield
    except TutelageError as error:
        mine = config is not None and config.queue.url == "embedded"
        if not mine or error.code != "UNAVAILABLE" or not error.message.startswith("queue server"):
            raise
        raise TutelageError(
            error.code,
            f'{error.message} [queue] url is "embedded": `tutelage up` starts that server, and does not run. '
            "Processes started by hand need a server of their own, by --queue or [queue] url",
        ) from error


def _said(option: str | None) -> str | None:
    given = option or os.environ.get(QUEUE_URL_VARIABLE)
    path = os.environ.get(QUEUE_URL_FILE_VARIABLE)
    if given or not path:
        return given or None
    from tutelage_client.errors import invalid

    try:
        address = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise invalid(f"{QUEUE_URL_FILE_VARIABLE}: {path}: {error}") from error
    if not address:
        raise invalid(f"{QUEUE_URL_FILE_VARIABLE}: {path} is empty, must hold the queue's address")
    return address
