"""What the service asks of an engine, and nothing more.

An engine owns batching: callers submit requests concurrently and each awaits its own answer.
Requests that reach an engine have already been checked against its limits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tutelage_client.types import Identity, Limits, Score, ScoreRequest


class Scorer(Protocol):
    """Anything that answers score requests: an engine, a replica, a gateway."""

    @property
    def identity(self) -> Identity: ...

    @property
    def identities(self) -> tuple[Identity, ...]:
        """Every teacher that answers here, each under a name of its own; `identity` is the first."""
        ...

    @property
    def limits(self) -> Limits: ...

    async def score(self, request: ScoreRequest) -> Score:
        """Score every sequence of `request`, in request order.

        Cancelling the awaiting task withdraws what has not been computed yet. A position
        whose score is not finite is answered with valid=False and NaN. A failure of the
        whole batch raises TutelageError.
        """
        ...


class Engine(Scorer, Protocol):
    """A scorer with a life: started once, closed once, its weights replaceable in between."""

    async def start(self) -> None:
        """Load the model and begin serving; returns when the first request would be answered."""
        ...

    async def load_weights(self, path: Path, weights_version: int, weights_id: str = "") -> None:
        """Replace the weights while no request is half scored, and forget every cached prefix.

        An answer carries the version and id of the weights that computed all of it.
        """
        ...

    async def ended(self) -> None:
        """Return when the engine will answer nothing any more: it was closed, or is beyond recovery."""
        ...

    async def close(self) -> None:
        """Finish nothing, release everything."""
        ...
