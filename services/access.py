"""Whom a port answers: on loopback everybody, beyond it whoever has a token."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from tutelage_client.errors import invalid

LOOPBACK = "127.0.0.1"
# What a probe may ask without a secret: that a process lives, and that it can be asked for more.
OPEN_PATHS = frozenset({"/health", "/ready"})


class TokenCheck:
    """Says whether an Authorization header names an accepted token; without tokens all are welcome.

    Tokens are kept as hashes and compared in constant time, all of them every time.
    """

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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost is taken to be public."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(hosts: Iterable[str], *, with_token: bool, remedy: str) -> None:
    """Refuse to be reached from beyond loopback without a token; raises ValueError that names `remedy`."""
    exposed = [host for host in hosts if not is_loopback(host)]
    if exposed and not with_token:
        raise ValueError(f"host: got {exposed[0]!r} without a token; beyond loopback set {remedy}")


class TokenSettings(BaseModel):
    """Accepted tokens, given one by one or in a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: tuple[SecretStr, ...] = Field(default=(), description="bearer tokens, any of which is accepted")
    token_file: Path | None = Field(default=None, description="more tokens, one per line")

    @model_validator(mode="after")
    def _no_empty_token(self) -> Self:
        if any(not token.get_secret_value().strip() for token in self.tokens):
            raise ValueError("tokens: got an empty token, every token needs at least one character")
        return self

    @property
    def with_token(self) -> bool:
        """Whether callers need one."""
        return bool(self.tokens) or self.token_file is not None

    def read_tokens(self) -> list[str]:
        """All accepted tokens; raises ValueError when a token file is given but holds none."""
        tokens = [token.get_secret_value() for token in self.tokens]
        if self.token_file is not None:
            tokens += read_token_file(self.token_file)
        return tokens

    def token_check(self) -> TokenCheck:
        """The same, as a check; raises TutelageError INVALID_ARGUMENT for a file that cannot be used."""
        try:
            return TokenCheck(self.read_tokens())
        except (OSError, ValueError) as error:
            raise invalid(f"service tokens: {error}") from error


def read_token_file(path: Path) -> list[str]:
    """The tokens of a file, one per line; raises OSError, or ValueError when there is none in it."""
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"token_file: got {path} without a token, one per line is needed")
    return found


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
