"""Start-up proof that packed rows and our head give what the architecture gives one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tutelage_client.errors import TutelageError

from services.models.attention import PACKED_ATTENTION, NotPackableError
from services.models.head import head_of
from services.models.packed import build_layout, hidden_states

CONTEXT_LENGTHS = (1, 5, 9)
SEQUENCES = ((0, 1), (0, 4), (1, 7), (2, 1), (2, 2), (2, 6))  # context, response length

# Largest difference of the logits, relative to their spread. Rounding in bfloat16 alone gives up
# to a few percent; a token that sees a foreign neighbour, or one position off, gives about one.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE_TOLERANCE = 0.15  # mean instead of maximum, for 16-bit types


@dataclass(frozen=True)
class Batch:
    contexts: list[np.ndarray]
    sequences: list[tuple[int, np.ndarray]]


def not_packable(model: Any) -> str | None:
    """Why this model must take the sequential path, or None when packed attention proved exact.

    Leaves packed attention installed on success and the architecture's default otherwise.
    """
    default = model.config._attn_implementation
    reason = _declared(model)
    if reason is None:
        model.set_attn_implementation("eager")
        batch = _random_batch(model)
        plain = _plain_logits(model, batch)
        model.set_attn_implementation(PACKED_ATTENTION)
        try:
            difference = _difference(_packed_logits(model, batch), plain, model.dtype)
        except (NotPackableError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = f"its forward did not accept packed masks ({error})"
        else:
            if not difference <= _tolerance(model.dtype):
                reason = f"packed logits differ from plain ones by {difference:.3g} of their spread"
    if reason is not None:
        model.set_attn_implementation(default)
    return reason


def check_head(model: Any) -> None:
    """Raise TutelageError (FAILED_PRECONDITION) unless our head reproduces the model's own logits."""
    batch = _random_batch(model)
    difference = _difference(_packed_logits(model, batch), _plain_logits(model, batch), model.dtype)
    if not difference <= _tolerance(model.dtype):
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"model: the logits of {type(model).__name__} are not its head applied to its last hidden state "
            f"(difference {difference:.3g} of their spread, allowed {_tolerance(model.dtype)}); "
            "an architecture with an unknown output transform cannot be scored",
        )


def _declared(model: Any) -> str | None:
    if not getattr(model, "_supports_attention_backend", False):
        return "it has an attention of its own"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state"
    known = {"full_attention", "sliding_attention"}
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or known)
    return f"it has layers of type {', '.join(sorted(layers - known))}" if layers - known else None


def _random_batch(model: Any) -> Batch:
    random = np.random.default_rng(0)
    vocab = head_of(model).vocab_size
    contexts = [random.integers(0, vocab, size=size) for size in CONTEXT_LENGTHS]
    return Batch(contexts, [(index, random.integers(0, vocab, size=size)) for index, size in SEQUENCES])


@torch.no_grad()
def _packed_logits(model: Any, batch: Batch) -> Tensor:
    layout = build_layout(batch.contexts, batch.sequences, device=model.device)
    return head_of(model).logits(hidden_states(model, layout)[layout.score_rows]).float()


@torch.no_grad()
def _plain_logits(model: Any, batch: Batch) -> Tensor:
    rows = []
    for context, response in batch.sequences:
        ids = torch.from_numpy(np.concatenate([batch.contexts[context], response])).to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        rows.append(logits[len(ids) - len(response) - 1 : -1].float())
    return torch.cat(rows)


def _difference(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Relative to the spread of the expected logits, so that random weights and real ones compare alike.

    Rows that are not finite on either side say nothing about packing; without any other, infinity.
    """
    finite = torch.isfinite(logits).all(-1) & torch.isfinite(expected).all(-1)
    if not finite.any():
        return float("inf")
    error = (logits[finite] - expected[finite]).abs()
    spread = expected[finite].std().clamp(min=1e-6)
    return float((error.max() if dtype in TOLERANCE else error.mean()) / spread)


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, COARSE_TOLERANCE)
