"""AdamW over the trained parameters, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from student_trainer.sections import TrainingSettings

FLOOR = 0.1  # share of the peak learning rate at which a decay ends


def learning_rate(settings: TrainingSettings, step: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then constant or a decay to 10% of the peak."""
    peak = settings.learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    span = max(1, settings.steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    if settings.schedule == "linear":
        return peak * (1.0 - (1.0 - FLOOR) * progress)
    if settings.schedule == "cosine":
        return peak * (FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    return peak


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: TrainingSettings
) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases) are not decayed.

    The state is allocated here rather than by the first step, so that a checkpoint holds the same
    tensors at every step, the first included.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in parameters:
        (matrices if parameter.dim() >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
    )
    for parameter in [*matrices, *vectors]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; the tensors are the live ones."""
    return {
        f"optimizer.{name}.{key}": tensor
        for name, parameter in parameters
        for key, tensor in optimizer.state[parameter].items()
    }
