"""The queue's address where it is said outside the run file: an option, the environment, or a file.

An address may hold a password, so a command line is no place for it; a file is how secrets are mounted.
"""

from __future__ import annotations

import os
from pathlib import Path

QUEUE_URL_VARIABLE = "TUTELAGE_QUEUE_URL"
QUEUE_URL_FILE_VARIABLE = "TUTELAGE_QUEUE_URL_FILE"


def given_queue_url(option: str | None = None) -> str | None:
    """`option`, else TUTELAGE_QUEUE_URL, else what the file TUTELAGE_QUEUE_URL_FILE names holds, else None.

    Raises:
        TutelageError: INVALID_ARGUMENT when that file cannot be read or is empty.
    """
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
