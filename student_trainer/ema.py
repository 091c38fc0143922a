"""A moving average of the student's weights, kept in float32 beside the weights that are trained.

Averaged is what a reader of the published weights sees. Under adapters that is the merged weight W + s·B·A,
and since the average of products is not the product of averages, the average is of s·B·A as a whole: it then
does not depend on how training has split a product into its factors. This costs a float32 copy of every
adapted matrix; averaging the factors would cost next to nothing, and be the average of nothing that was ever
published.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from student_trainer.student import Student


class Ema:
    """ema ← (1 − rate) · ema + rate · student, from the student's weights as they are now.

    With several ranks each holds the same part of it as of the weights.
    """

    @torch.no_grad()
    def __init__(self, student: Student, rate: float) -> None:
        self._student = student
        self._rate = rate
        # The name of a tensor in the model underneath → its average; with adapters of what they add.
        self.averages: dict[str, Tensor] = {
            name: value.detach().float().clone() for name, value in student.moving()
        }

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step; of several ranks, all call this together."""
        for name, value in self._student.moving():
            _local(self.averages[name]).lerp_(_local(value).float(), self._rate)

    def state_tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, by name; the live tensors."""
        return {f"ema.{name}": average for name, average in self.averages.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
