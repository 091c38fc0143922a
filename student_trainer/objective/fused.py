"""The chunked head: a loss over the vocabulary whose logits never exist all at once.

A chunk of rows is taken through the head, its loss and the gradient by its logits are computed, and the
gradients of hidden states and head are accumulated at once, in the forward pass. The backward pass
only scales them. Per chunk two [chunk, V] buffers are alive (one without a teacher head, three with several
views), beside the gradient of the head itself; four head-sized matrix products with a teacher head, three
without.

Numbers: logits are float32 (float64 for float64 inputs); a head in another dtype is converted in tiles.
Sums over the vocabulary are taken in tiles and added in float64, because one float32 sum over 152k terms
loses four digits and CPU log_softmax is biased by 7e-6 there.

Shapes: N rows, R rows of a chunk, V vocabulary, H hidden, W columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_trainer.objective.head_pass import (
    Gradients,
    HeadPass,
    NonFiniteStudentError,
    log_normaliser,
    tiles,
)
from student_trainer.objective.rows import Rows
from student_trainer.objective.tails import dense


@dataclass(frozen=True)
class DenseGradient:
    """A full divergence's derivative for a chunk, before the softmax's own term."""

    psi: Tensor  # [R, V]
    total: Tensor  # f64 [R], Σ_V ψ
    scale: Tensor  # f64 [R], factor of each row
    bad: Tensor  # bool [R], rows that the teacher spoiled


@dataclass(frozen=True)
class TeacherPass:
    """A view of support "full"."""

    coefficient: float
    head: HeadPass
    hidden: Tensor  # [T, H']

    def logits(self, index: Tensor, out: Tensor) -> None:
        """Write the view's logits of the positions `index` into `out`, [R, V]."""
        self.head.logits(self.hidden[index].to(self.head.dtype), out)


@dataclass(frozen=True)
class ChunkedLoss:
    """A loss ready to run: rows, student head pass, and for support "full" the teachers'."""

    rows: Rows
    student: HeadPass
    teachers: tuple[TeacherPass, ...]
    chunk_rows: int
    tile_columns: int

    def run(self, hidden: Tensor, gradients: Gradients) -> Tensor:
        """Σ_t weight_t · loss_t, f64 scalar; fills `gradients`."""
        index = self.rows.index
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        finite = torch.ones((), dtype=torch.bool, device=hidden.device)
        for part, views, normaliser in self._chunks(hidden):
            finite &= torch.isfinite(normaliser).all()
            if not self.teachers:
                chunk = self._truncated_chunk(part, views[0], normaliser)
            else:
                chunk = self._full_chunk(part, views, normaliser)
            loss += chunk
            taken = hidden[index[part]].to(self.student.dtype)
            self.student.backward(views[0], taken, gradients, index[part])
        if not bool(finite & torch.isfinite(loss)):
            raise NonFiniteStudentError(
                "the student's logits or the loss are not finite; nothing was trained"
            )
        return loss

    def survey(self, hidden: Tensor, look: Callable[[slice, Tensor, Tensor | None], Tensor]) -> Tensor:
        """What `look` finds in every row, f64 [N], from a pass over the heads without gradients.

        Args:
            look: which rows, log p at `gather_ids` f64 [R, 1 + ΣK], and the full-vocabulary divergence
                f64 [R] with support "full" → f64 [R].
        """
        index = self.rows.index
        found = torch.zeros(len(index), dtype=torch.float64, device=hidden.device)
        for part, buffers, normaliser in self._chunks(hidden):
            gathered = buffers[0].gather(1, self.rows.gather_ids[part]).double() - normaliser[:, None]
            dense_value = self._dense_chunk(part, buffers, normaliser)[0] if self.teachers else None
            found[part] = look(part, gathered, dense_value)
        return found

    def _chunks(self, hidden: Tensor) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
        """Which rows, buffers [R, V] of which the first holds the student's logits, and log Σ exp of them."""
        index, dtype = self.rows.index, self.student.dtype
        size = min(self.chunk_rows, max(len(index), 1))
        needed = min(1 + len(self.teachers), 3)
        vocabulary = len(self.student.head.weight)
        buffers = [hidden.new_empty(size, vocabulary, dtype=dtype) for _ in range(needed)]
        for start in range(0, len(index), size):
            part = slice(start, min(start + size, len(index)))
            views = [buffer[: part.stop - part.start] for buffer in buffers]
            self.student.logits(hidden[index[part]].to(dtype), views[0])
            yield part, views, self._normaliser(views[0])

    def _truncated_chunk(self, part: slice, logits: Tensor, normaliser: Tensor) -> Tensor:
        loss, sparse, _ = self._row_losses(part, logits, normaliser, None, None)
        self._write_gradient(part, logits, normaliser, sparse, None)
        return loss

    def _full_chunk(self, part: slice, buffers: list[Tensor], normaliser: Tensor) -> Tensor:
        logits, other = buffers[:2]
        value, total, bad = self._dense_chunk(part, buffers, normaliser)
        loss, sparse, scale = self._row_losses(part, logits, normaliser, value, bad)
        assert scale is not None
        self._write_gradient(part, logits, normaliser, sparse, DenseGradient(other, total, scale, bad))
        return loss

    def _dense_chunk(
        self, part: slice, buffers: list[Tensor], normaliser: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_dense` of the target; ψ goes into the second buffer."""
        if self.rows.plan.target == "losses" and len(self.teachers) > 1:
            return self._dense_sum(part, buffers, normaliser)
        self._target_logits(part, buffers[1:])
        return self._dense(buffers[0], normaliser, buffers[1])

    def _target_logits(self, part: slice, buffers: list[Tensor]) -> None:
        """Write the views' target, up to a constant of each row, into the first buffer."""
        index, target = self.rows.index[part], buffers[0]
        mixture = self.rows.plan.target == "mixture"
        for place, view in enumerate(self.teachers):
            out = buffers[min(place, 1)]
            view.logits(index, out)
            if mixture:
                shift = self._normaliser(out) - math.log(view.coefficient)
                out.sub_(shift.to(out.dtype)[:, None])
            elif view.coefficient != 1:
                out.mul_(view.coefficient)
            if place and mixture:
                torch.logaddexp(target, out, out=target)
            elif place:
                target += out

    def _dense_sum(
        self, part: slice, buffers: list[Tensor], normaliser: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ_v c_v of every view's `_dense`; ψ goes into the second buffer."""
        logits, other, scratch = buffers
        other.zero_()
        value, total = torch.zeros_like(normaliser), torch.zeros_like(normaliser)
        bad = torch.zeros_like(normaliser, dtype=torch.bool)
        for view in self.teachers:
            view.logits(self.rows.index[part], scratch)
            own_value, own_total, own_bad = self._dense(logits, normaliser, scratch)
            other.add_(scratch, alpha=view.coefficient)
            value += view.coefficient * own_value
            total += view.coefficient * own_total
            bad |= own_bad
        other.masked_fill_(bad[:, None], 0)
        return value.masked_fill(bad, 0), total.masked_fill(bad, 0), bad

    def _dense(self, logits: Tensor, normaliser: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The full divergence per row and Σ_V ψ, f64 [R]; teacher logits in `other` become ψ.

        Rows where the teacher is not finite are marked bad and their ψ is zero.
        """
        target = self._normaliser(other)
        value, total = torch.zeros_like(normaliser), torch.zeros_like(normaliser)
        s_shift, t_shift = (x.to(logits.dtype)[:, None] for x in (normaliser, target))
        for columns in tiles(logits, self.tile_columns):
            share, psi = dense(
                self.rows.divergence,
                logits[:, columns] - s_shift,
                other[:, columns] - t_shift,
                self.rows.plan.entry_clip,
            )
            value += share
            total += psi.sum(dim=1)
            other[:, columns] = psi
        bad = ~(torch.isfinite(target) & torch.isfinite(value) & torch.isfinite(total))
        other.masked_fill_(bad[:, None], 0)
        return value.masked_fill(bad, 0), total.masked_fill(bad, 0), bad

    def _row_losses(
        self, part: slice, logits: Tensor, normaliser: Tensor, value: Tensor | None, bad: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss of the chunk, its gradient by the gathered log-probabilities, factors of dense rows."""
        gathered = logits.gather(1, self.rows.gather_ids[part]).double() - normaliser[:, None]
        with torch.enable_grad():
            leaf = gathered.detach().requires_grad_()
            loss, scale = self.rows.chunk_loss(part, leaf, value, bad)
            if loss.requires_grad:
                (sparse,) = torch.autograd.grad(loss, leaf)
            else:
                sparse = torch.zeros_like(leaf)
        return loss.detach(), sparse, scale

    def _write_gradient(
        self,
        part: slice,
        logits: Tensor,
        normaliser: Tensor,
        sparse: Tensor,
        whole: DenseGradient | None,
    ) -> None:
        """Overwrite `logits` with the gradient by h Wᵀ + b.

        With d the gradient by gathered log-probabilities, scattered to their ids, the gradient by
        logits is scale·(ψ − p Σψ) + d − p Σd.
        """
        dtype = logits.dtype
        ids = self.rows.gather_ids[part]
        chain = self.student.chain(logits.gather(1, ids))
        push = sparse.sum(dim=1)
        if whole is not None:
            push = push + whole.scale * whole.total
        push, shift = push.to(dtype)[:, None], normaliser.to(dtype)[:, None]
        entropy = torch.zeros_like(normaliser)
        for columns in tiles(logits, self.tile_columns):
            tile = logits[:, columns]
            factor = self.student.chain(tile)
            surprise = tile - shift
            probability = surprise.exp()
            entropy -= surprise.mul_(probability).sum(dim=1)
            gradient = probability.mul_(push).neg_()
            if whole is not None:
                gradient.addcmul_(whole.psi[:, columns], whole.scale.to(dtype)[:, None])
            torch.mul(gradient, factor, out=tile)
        logits.scatter_add_(1, ids, (sparse * chain).to(dtype))
        self.rows.record_entropy(part, entropy)

    def _normaliser(self, logits: Tensor) -> Tensor:
        return log_normaliser(logits, self.tile_columns)


class FusedHeadLoss(torch.autograd.Function):
    """Ties ChunkedLoss into autograd: gradients are made in the forward, scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: ChunkedLoss) -> Tensor:
        """f32 (f64 for f64 hidden) scalar."""
        accumulate = job.student.dtype
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        gradients = Gradients(
            hidden=torch.zeros_like(hidden) if wants_hidden else None,
            weight=torch.zeros_like(weight, dtype=accumulate) if wants_weight else None,
            bias=torch.zeros_like(bias, dtype=accumulate) if wants_bias and bias is not None else None,
        )
        loss = job.run(hidden, gradients)
        for name, source in (("weight", weight), ("bias", bias)):
            gradient = getattr(gradients, name)
            if gradient is not None and source is not None:
                setattr(gradients, name, gradient.to(source.dtype))
        ctx.gradients = gradients
        return loss.to(accumulate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """The stored gradients, scaled in place; they exist once, so only one backward is possible."""
        gradients: Gradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("objective_loss can be differentiated once; compute the loss again")
        ctx.gradients = None
        return (*gradients.scaled(factor), None)
