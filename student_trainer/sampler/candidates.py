"""The student's most probable ids along responses that another model wrote.

Shapes: R response positions of one sequence, K candidates, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tutelage_client.types import Int32Array

from services.models.head import head_of
from services.models.layout import build_layout
from services.models.packed import hidden_states

_BLOCK_LOGITS = 4 * 2**20  # logits held at once


def student_candidates(
    model: Any, prompts: Sequence[Int32Array], responses: Sequence[tuple[int, Int32Array]], candidates: int
) -> list[Int32Array]:
    """int32 [R, K] for each response, most probable first.

    Args:
        model: a causal LM loaded for packed forwards (services.models.load).
        responses: (index into `prompts`, response ids).
    """
    layout = build_layout(prompts, responses, device=next(model.parameters()).device)
    with torch.inference_mode():
        rows = hidden_states(model, layout)[layout.score_rows]
        head = head_of(model)
        blocks = torch.split(rows, max(1, _BLOCK_LOGITS // head.vocab_size))
        top = torch.cat([head.logits(block).float().topk(candidates, dim=-1).indices for block in blocks])
    return np.split(top.int().cpu().numpy(), layout.offsets[1:-1])
