"""What the student itself makes of whole responses, whoever wrote them: one packed forward, no cache.

Shapes: R response positions of one sequence, K candidates, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tutelage_client.errors import TutelageError
from tutelage_client.types import Int32Array

from services.models.head import head_of
from services.models.layout import build_layout
from services.models.packed import hidden_states

_BLOCK_LOGITS = 4 * 2**20  # logits held at once
_PACKED_TOKENS = 16_384  # of one forward, but for a response that is longer


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What was asked for along one response; None what was not."""

    candidate_ids: Int32Array | None  # [R, K], most probable first
    entropy: npt.NDArray[np.float64] | None  # [R], nats


def read_back(
    model: Any,
    prompts: Sequence[Int32Array],
    responses: Sequence[Int32Array],
    *,
    candidates: int = 0,
    entropy_at: float | None = None,
) -> list[ReadBack]:
    """The student's most probable ids and its entropy along each response, each after its own prompt.

    Args:
        model: a causal LM loaded for packed forwards (services.models.load).
        candidates: K; 0: none.
        entropy_at: the temperature of the distribution whose entropy is taken; None: none is.

    Raises:
        TutelageError: INTERNAL when an entropy that was asked for is not finite.
    """
    found: list[ReadBack] = []
    for part in _parts([len(prompt) + len(ids) for prompt, ids in zip(prompts, responses, strict=True)]):
        found += _forward(model, prompts[part], responses[part], candidates, entropy_at)
    return found


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Consecutive responses of about _PACKED_TOKENS; a shared prompt is counted for each."""
    start, used = 0, 0
    for place, size in enumerate(sizes):
        if place > start and used + size > _PACKED_TOKENS:
            yield slice(start, place)
            start, used = place, 0
        used += size
    if sizes:
        yield slice(start, len(sizes))


def _forward(
    model: Any,
    prompts: Sequence[Int32Array],
    responses: Sequence[Int32Array],
    candidates: int,
    entropy_at: float | None,
) -> list[ReadBack]:
    number: dict[bytes, int] = {}
    owners = [number.setdefault(prompt.tobytes(), len(number)) for prompt in prompts]
    contexts = [np.frombuffer(data, dtype=np.int32) for data in number]
    layout = build_layout(
        contexts, list(zip(owners, responses, strict=True)), device=next(model.parameters()).device
    )
    tops: list[Tensor] = []
    entropies: list[Tensor] = []
    with torch.inference_mode():
        rows = hidden_states(model, layout)[layout.score_rows]
        head = head_of(model)
        for block in torch.split(rows, max(1, _BLOCK_LOGITS // head.vocab_size)):
            logits = head.logits(block).float()
            if candidates:
                tops.append(logits.topk(candidates, dim=-1).indices)
            if entropy_at is not None:
                entropies.append(_entropy(logits, entropy_at))
    cuts = layout.offsets[1:-1]
    nothing: list[None] = [None] * len(responses)
    ids = np.split(torch.cat(tops).int().cpu().numpy(), cuts) if candidates else nothing
    entropy = nothing if entropy_at is None else np.split(_finite(torch.cat(entropies)), cuts)
    return [ReadBack(*each) for each in zip(ids, entropy, strict=True)]


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    """Nats, f64 [N]. In float64: with a vocabulary of 150k a float32 sum does not order near equals."""
    logprobs = (logits.double() / temperature).log_softmax(dim=-1)
    entropy: Tensor = torch.special.entr(logprobs.exp_()).sum(dim=-1)
    return entropy


def _finite(entropy: Tensor) -> npt.NDArray[np.float64]:
    if not bool(torch.isfinite(entropy).all()):
        raise TutelageError("INTERNAL", "the student's logits are not finite (NaN or +inf)")
    found: npt.NDArray[np.float64] = entropy.cpu().numpy()
    return found
