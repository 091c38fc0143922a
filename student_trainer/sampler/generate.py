"""Whatever samples the rollouts: `TransformersGenerator` of services/models/generate.py, or vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from services.models.generate import Response, Row


class Generator(Protocol):
    """Whatever samples responses: transformers here, vLLM in vllm_generate."""

    def generate(
        self, rows: Sequence[Row], *, seed: int, temperature: float, max_new_tokens: int, candidates: int = 0
    ) -> list[Response]:
        """One response per row, in order.

        A row's random numbers depend on (seed, group, sample, step) only, never on the batch.
        Log-probabilities are those at the sampling temperature, and at 1 where 0 takes the most
        probable token. Raises GenerationInterruptedError soon after `interrupt` was called.
        """
        ...

    def interrupt(self) -> None:
        """End the running call of `generate` and every later one; called from another thread."""
        ...

    def load_weights(self, directory: Path) -> None:
        """Sample from this export of the same architecture from now on; not during `generate`.

        After an error the weights may be a mixture, until another call succeeds.
        """
        ...

    def close(self) -> None:
        """Release what is held; the last call."""
        ...
