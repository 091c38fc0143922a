"""One head at one temperature, a chunk of rows at a time: hidden rows → logits, and logit gradients → back.

Shapes: T positions, R rows of a chunk, V vocabulary, H hidden, W columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.objective.batch import Head

CONVERTED_ROWS = 16_384  # of a head that is converted to the dtype of the logits, at a time


class NonFiniteStudentError(ArithmeticError):
    """The student's own logits, or the loss, are not finite: the student has diverged."""


@dataclass(frozen=True)
class HeadPass:
    """One head at one temperature: hidden rows → logits, and logit gradients → back."""

    head: Head
    temperature: float
    dtype: torch.dtype

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Write softcap(scale · (h Wᵀ + b)) / temperature into `out`, [R, V]."""
        for columns, weight in self._weights():
            torch.mm(hidden, weight.t(), out=out[:, columns])
        if self.head.bias is not None:
            out += self.head.bias
        if self.head.softcap is None:
            factor = self.head.scale / self.temperature
            if factor != 1:
                out *= factor
            return
        out.mul_(self.head.scale / self.head.softcap).tanh_().mul_(self.head.softcap / self.temperature)

    def chain(self, logits: Tensor) -> Tensor | float:
        """Derivative of the final logits by h Wᵀ + b."""
        factor = self.head.scale / self.temperature
        if self.head.softcap is None:
            return factor
        return (logits * (self.temperature / self.head.softcap)).square_().neg_().add_(1).mul_(factor)

    def backward(self, gradient: Tensor, hidden: Tensor, into: Gradients, part: Tensor) -> None:
        """Accumulate what `gradient` [R, V], by h Wᵀ + b, means for hidden rows and head."""
        if into.hidden is not None:
            rows = torch.zeros_like(hidden)
            for columns, weight in self._weights():
                rows.addmm_(gradient[:, columns], weight)
            into.hidden[part] = rows.to(into.hidden.dtype)
        if into.weight is not None:
            into.weight.addmm_(gradient.t(), hidden)
        if into.bias is not None:
            into.bias += gradient.sum(dim=0)

    def _weights(self) -> Iterator[tuple[slice, Tensor]]:
        weight = self.head.weight
        if weight.dtype == self.dtype:
            yield slice(None), weight
            return
        for start in range(0, len(weight), CONVERTED_ROWS):
            columns = slice(start, start + CONVERTED_ROWS)
            yield columns, weight[columns].to(self.dtype)


@dataclass
class Gradients:
    """What the backward pass will hand on; None where nothing asks for it."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        for gradient in (self.hidden, self.weight, self.bias):
            if gradient is not None:
                gradient.mul_(factor)
        return self.hidden, self.weight, self.bias


def log_normaliser(logits: Tensor, tile_columns: int) -> Tensor:
    """log Σ exp over the vocabulary, f64 [R]."""
    peak = logits.amax(dim=1, keepdim=True)
    total = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for columns in tiles(logits, tile_columns):
        total += (logits[:, columns] - peak).exp_().sum(dim=1)
    return peak.squeeze(1).double() + total.log()


def sampled_logprobs(
    student: HeadPass, hidden: Tensor, ids: Tensor, index: Tensor, *, chunk_rows: int, tile_columns: int
) -> Tensor:
    """log p of `ids` at the positions `index`, f64 [T], NaN elsewhere, from a pass without gradients.

    Raises:
        NonFiniteStudentError: the student has diverged.
    """
    found = torch.full((len(hidden),), torch.nan, dtype=torch.float64, device=hidden.device)
    size = max(1, min(chunk_rows, len(index)))
    buffer = hidden.new_empty(size, len(student.head.weight), dtype=student.dtype)
    for start in range(0, len(index), size):
        part = index[start : start + size]
        logits = buffer[: len(part)]
        student.logits(hidden[part].to(student.dtype), logits)
        own = logits.gather(1, ids[part, None]).squeeze(1).double()
        found[part] = own - log_normaliser(logits, tile_columns)
    if not bool(torch.isfinite(found[index]).all()):
        raise NonFiniteStudentError("the student's logits are not finite; nothing was trained")
    return found


def tiles(logits: Tensor, tile_columns: int) -> Iterator[slice]:
    """The vocabulary in pieces."""
    for start in range(0, logits.shape[1], tile_columns):
        yield slice(start, start + tile_columns)
