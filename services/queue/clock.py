"""When an entry was added: the first half of its id is the server's unix time in milliseconds."""

from __future__ import annotations


def added_ns(entry: str) -> int:
    """Unix nanoseconds of a stream entry's id, by the queue server's clock."""
    return int(entry.partition("-")[0]) * 1_000_000
