"""Where scores are kept, how many bytes of them, and for how long."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from services.queue_address import FORM, is_queue_address

DIRECTORY_BYTES = 10 * 2**30
SERVER_BYTES = 2**30


def is_server(location: str) -> bool:
    """Whether `location` is an address and no directory."""
    return "://" in location


def _location(location: str) -> str:
    if not location or (is_server(location) and not is_queue_address(location)):
        raise ValueError(f"cache: must be a directory, or {FORM}")
    return location


class CacheSettings(BaseModel):
    """A cache of scores in front of the engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    location: Annotated[str, AfterValidator(_location)] = Field(
        description="a directory, which several replicas may share, or redis://… of a Redis or Valkey"
    )
    max_bytes: int | None = Field(
        default=None,
        ge=1,
        description="of all entries; the least recently used leave first. Default: 10 GiB in a directory, "
        "1 GiB on a server",
    )
    ttl_seconds: float = Field(
        default=7 * 86_400.0, gt=0, description="on a server: entries that nobody asked for so long leave"
    )

    @property
    def limit(self) -> int:
        """Bytes of all entries."""
        if self.max_bytes is not None:
            return self.max_bytes
        return SERVER_BYTES if is_server(self.location) else DIRECTORY_BYTES
