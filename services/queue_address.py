"""What an address of the queue looks like; light to import, unlike the queue's client."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator

FORM = (
    "an address of the form redis://:PASSWORD@HOST:PORT/DB, rediss://… or unix:///PATH; "
    "percent-encode # / ? @ in a password (what was got is not shown, it may hold one)"
)


def is_queue_address(url: str) -> bool:
    """Whether every part of `url` is understood, so that none of a password is taken for something else."""
    try:
        parts = urlsplit(url)
        port_in_range = parts.port is None or parts.port > 0
        parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        return False
    if not port_in_range or parts.fragment or "@" in parts.query:
        return False
    if parts.scheme == "unix":
        return bool(parts.path) and "@" not in parts.path
    database = parts.path.removeprefix("/")
    return (
        parts.scheme in ("redis", "rediss")
        and bool(parts.hostname)
        and (not database or database.isdecimal())
    )


def queue_address(url: str) -> str:
    """`url`; raises ValueError, which does not show it, when it is none."""
    if not is_queue_address(url):
        raise ValueError(f"queue: not {FORM}")
    return url


QueueAddress = Annotated[str, AfterValidator(queue_address)]
