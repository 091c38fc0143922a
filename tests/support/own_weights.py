"""A user's module that is installed: named as "support.own_weights:half"."""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.objective.custom import TokenValues


def half(tokens: TokenValues) -> Tensor:
    """Every token counts half."""
    return torch.full_like(tokens.student_logprob, 0.5)
