"""How a service listens: addresses, tokens, TLS and the bounds that hold before an engine is asked."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.access import LOOPBACK, TokenSettings, check_exposure


class TlsSettings(BaseModel):
    """Server certificate, and the authority of client certificates when they are required."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Path = Field(description="PEM chain presented to callers")
    key: Path = Field(description="PEM private key of the certificate")
    client_authority: Path | None = Field(
        default=None, description="PEM; when given, callers must present one"
    )


class ServiceSettings(TokenSettings):
    """Where a service listens and whom it answers.

    Loopback needs no token. Beyond loopback a token is required, and construction fails without.
    """

    host: str = Field(default=LOOPBACK, description="address of the gRPC and HTTP ports")
    grpc_port: int = Field(default=50051, ge=0, le=65535, description="0 picks a free one")
    http_port: int = Field(default=8081, ge=0, le=65535, description="0 picks a free one")
    metrics_host: str = Field(default=LOOPBACK, description="address of the metrics port")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="own port for /metrics; None: served on the HTTP port"
    )
    tls: TlsSettings | None = None
    max_connection_age_seconds: float = Field(
        default=300.0,
        ge=0.1,
        le=1_000_000,
        description="after which a gRPC caller is asked to connect anew, so that it notices other replicas; "
        "calls that run go on",
    )
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
        check_exposure(
            (self.host, self.metrics_host), with_token=self.with_token, remedy="`tokens` or `token_file`"
        )
        return self
