"""One exception type for everything a teacher can answer other than a score."""

from __future__ import annotations

_SHOWN = 200


class TutelageError(Exception):
    """A refusal or a failure, with the gRPC status name of the contract.

    Args:
        code: INVALID_ARGUMENT, FAILED_PRECONDITION, NOT_FOUND, RESOURCE_EXHAUSTED,
            DEADLINE_EXCEEDED, CANCELLED, UNAVAILABLE, UNAUTHENTICATED or INTERNAL.
        message: the field, what was got and what is allowed.
        retry_after: seconds after which trying again may help, when the server said so.
    """

    def __init__(self, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after = retry_after


def shown(value: object) -> str:
    """A value as messages quote it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def invalid(message: str) -> TutelageError:
    """A TutelageError that the caller can fix: INVALID_ARGUMENT."""
    return TutelageError("INVALID_ARGUMENT", message)
