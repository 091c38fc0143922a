"""How a client reaches a teacher: channel options, TLS, and gRPC errors as TutelageError."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from tutelage_client.errors import TutelageError

SERVICE = "tutelage.v1.TeacherService"
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
DEFAULT_TIMEOUT_SECONDS = 600.0
KEEPALIVE_MS = 30_000  # a server must allow pings this often, or it ends long calls with too_many_pings

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates of an encrypted connection; all None trusts the system's authorities.

    Each is PEM text as bytes. Certificate and key are for teachers that ask callers for one.
    """

    authority: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def channel_options(max_message_bytes: int) -> Sequence[tuple[str, Any]]:
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.enable_retries", 0),  # RetryPolicy decides; two layers of retries multiply
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Despite its name, how long a connection may take to be made: a busy machine needs more than the
        # first backoff, and one that has vanished must not hold a call for long.
        ("grpc.min_reconnect_backoff_ms", 2_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A name may stand for many replicas: each is connected to and takes its turn.
        ("grpc.lb_policy_name", "round_robin"),
        # A replica that was replaced has another address under its name. Half a minute, gRPC's own pause
        # between two lookups, is long enough for the next replica to be replaced, too.
        ("grpc.dns_min_time_between_resolutions_ms", 500),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),  # a peer that vanished is noticed in the middle of a call
        ("grpc.keepalive_timeout_ms", 10_000),
    )


def closed() -> TutelageError:
    return TutelageError("CANCELLED", "client: it is closed")


def call_metadata(token: str | None) -> Metadata:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def as_tutelage_error(error: grpc.RpcError) -> TutelageError:
    """What the teacher, or gRPC on the way to it, answered."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    retry_after = None
    for name, value in error.trailing_metadata() or ():
        if name == "retry-after" and isinstance(value, str):
            retry_after = _seconds(value)
    code = error.code().name
    if code == "CANCELLED":
        # Nobody here cancelled: a teacher, or a proxy, ends its calls like this when it goes away.
        code = "UNAVAILABLE"
    return TutelageError(code, error.details() or "no details", retry_after)


def _seconds(value: str) -> float | None:
    """Seconds of a retry-after, None where a proxy put something else there."""
    try:
        return max(0.0, float(value))
    except ValueError:
        return None
