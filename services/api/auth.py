"""Bearer tokens: kept as hashes, compared in constant time, all of them every time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable


class TokenCheck:
    """Says whether an Authorization header names an accepted token; without tokens all are welcome."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._hashes = tuple(_digest(token.encode()) for token in tokens)

    @property
    def required(self) -> bool:
        return bool(self._hashes)

    def allows(self, authorization: str | bytes | None) -> bool:
        """`authorization` is the header's value, "Bearer TOKEN"."""
        if not self._hashes:
            return True
        value = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, token = value.partition(b" ")
        given = _digest(token.strip())
        accepted = False
        for known in self._hashes:  # no early exit: the time taken does not tell which token matched
            accepted |= hmac.compare_digest(given, known)
        return accepted and scheme.lower() == b"bearer"


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
