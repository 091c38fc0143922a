"""How a service listens: addresses, tokens, TLS and the bounds that hold before an engine is asked."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from services.access import LOOPBACK, check_exposure, read_token_file


class TlsSettings(BaseModel):
    """Server certificate, and the authority of client certificates when they are required."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Path = Field(description="PEM chain presented to callers")
    key: Path = Field(description="PEM private key of the certificate")
    client_authority: Path | None = Field(
        default=None, description="PEM; when given, callers must present one"
    )


class ServiceSettings(BaseModel):
    """Where a service listens and whom it answers.

    Loopback needs no token. Beyond loopback a token is required, and construction fails without.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default=LOOPBACK, description="address of the gRPC and HTTP ports")
    grpc_port: int = Field(default=50051, ge=0, le=65535, description="0 picks a free one")
    http_port: int = Field(default=8081, ge=0, le=65535, description="0 picks a free one")
    metrics_host: str = Field(default=LOOPBACK, description="address of the metrics port")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="own port for /metrics; None: served on the HTTP port"
    )
    tokens: tuple[SecretStr, ...] = Field(default=(), description="bearer tokens, any of which is accepted")
    token_file: Path | None = Field(default=None, description="more tokens, one per line")
    tls: TlsSettings | None = None
    max_queued_tokens: int = Field(
        default=1_000_000,
        ge=1,
        description="tokens accepted but not yet scored; beyond it requests are refused",
    )
    max_message_bytes: int = Field(
        default=256 * 1024 * 1024, ge=1024, le=2**31 - 1, description="largest request and largest answer"
    )

    @model_validator(mode="after")
    def _closed_by_default(self) -> ServiceSettings:
        if any(not token.get_secret_value().strip() for token in self.tokens):
            raise ValueError("tokens: got an empty token, every token needs at least one character")
        check_exposure(
            (self.host, self.metrics_host),
            with_token=bool(self.tokens) or self.token_file is not None,
            remedy="`tokens` or `token_file`",
        )
        return self

    def read_tokens(self) -> list[str]:
        """All accepted tokens; raises ValueError when a token file is given but holds none."""
        tokens = [token.get_secret_value() for token in self.tokens]
        if self.token_file is not None:
            tokens += read_token_file(self.token_file)
        return tokens
