"""Real vLLM engines for tests: small, and one at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.models.vllm_settings import VllmSettings
from services.teacher.engines.vllm.engine import VllmEngine

LONGEST = 256

# Forty tokens a step: almost every sequence of the tests is computed in pieces.
SMALL: dict[str, Any] = {
    "max_model_len": LONGEST,
    "max_num_batched_tokens": 40,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 8 << 20,
}


def small_engine(directory: Path, *, engine: dict[str, Any] | None = None, **settings: Any) -> VllmEngine:
    """Not started; `engine` are arguments of VllmEngine, the others vLLM settings."""
    return VllmEngine(directory, settings=VllmSettings(**{**SMALL, **settings}), **engine or {})


@asynccontextmanager
async def run_vllm(
    directory: Path, *, engine: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[VllmEngine]:
    """A started engine. vLLM's process groups are the process's: no second engine may live beside it."""
    served = small_engine(directory, engine=engine, **settings)
    await served.start()
    try:
        yield served
    finally:
        await served.close()
