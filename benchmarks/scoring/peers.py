"""What all peers have in common: names, the vLLM arguments, and the shape of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.scoring.processes import ProcessGroup
from benchmarks.scoring.workloads import Batch

OURS, STOCK, FLAT, TRANSFORMERS, FLOOR = "tutelage", "stock_http", "flat", "transformers", "floor"
TITLES = {
    OURS: "Tutelage gRPC, vLLM engine",
    STOCK: "stock vLLM OpenAI server, prompt_logprobs",
    FLAT: "in-process vLLM, flat_logprobs",
    TRANSFORMERS: "Tutelage gRPC, transformers engine",
    FLOOR: "torch forward, head, log-sum-exp, gather",
}
MAX_TOP_K = 256

# The same for every vLLM here, in the names of its engine arguments.
VLLM_ARGUMENTS: dict[str, Any] = {
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "kv_cache_memory_bytes": 1 << 30,
    "enforce_eager": True,
    "block_size": 32,
}

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Scores:
    """Arrays that a trainer can use, one per sequence."""

    sampled: Sequence[Array]  # each [R] float32
    top_ids: Sequence[Array] = ()  # each [R, K] int32; none without a top-k
    top_logprobs: Sequence[Array] = ()  # each [R, K] float32


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered batch."""

    seconds: float  # from token ids to arrays
    scores: Scores
    parse_seconds: float = 0.0  # the part of `seconds` from the answer's bytes to arrays
    request_bytes: int = 0
    answer_bytes: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0


class Peer(Protocol):
    """One contestant over one model."""

    name: str
    process: ProcessGroup  # started when the peer is made

    def connect(self) -> None:
        """Wait until it can be asked; RuntimeError with the end of its log when it cannot."""

    def ask(self, batch: Batch) -> Reply:
        """Score a batch."""

    def close(self) -> None:
        """End the connection and the process."""


def differs_most(scores: Scores, others: Scores) -> float:
    """Largest difference between the log-probabilities that both gave to the sampled tokens, in nats."""
    return max(
        float(np.abs(mine - theirs).max())
        for mine, theirs in zip(scores.sampled, others.sampled, strict=True)
    )
