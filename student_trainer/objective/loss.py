"""objective_loss: hidden rows, a head and scores in; the plan's loss, its gradients and metrics out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from student_trainer.objective.batch import Head, LossOutput, TokenBatch, ViewTensors
from student_trainer.objective.fused import ChunkedLoss, FusedHeadLoss, TeacherPass
from student_trainer.objective.head_pass import HeadPass, NonFiniteStudentError, sampled_logprobs
from student_trainer.objective.plan import Plan
from student_trainer.objective.rows import Rows
from student_trainer.objective.selection import select_rows
from student_trainer.objective.support import check_ids
from student_trainer.objective.weights import top_rows

__all__ = ["Head", "LossOutput", "NonFiniteStudentError", "TokenBatch", "ViewTensors", "objective_loss"]

T = TypeVar("T", Tensor, Head)
CHUNK_ROWS = 256
CPU_TILE_COLUMNS = 2_048  # a tile of 256 rows and its temporaries stay in the cache of a core
GPU_TILE_COLUMNS = 32_768


def objective_loss(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    batch: TokenBatch,
    plan: Plan,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    teacher_hidden: Tensor | Mapping[str, Tensor] | None = None,
    teacher_head: Head | Mapping[str, Head] | None = None,
    chunk_rows: int = CHUNK_ROWS,
    per_token: bool = False,
    distill_open: bool | None = None,
) -> LossOutput:
    """Loss of a micro-batch, Σ_t weight_t · loss_t, with peak memory independent of T × V.

    Args:
        hidden: [T, H], the rows whose outputs predict the response tokens; any float dtype.
        head_weight, head_bias: [V, H], [V]; gradients are computed only where required.
        batch, plan: T positions, and what to do with them.
        softcap, scale: logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), before the temperature.
        teacher_hidden, teacher_head: [T, H'] and the teacher's head, for support "full" only; with
            several views one of each per view, by name.
        chunk_rows: rows whose logits exist at a time.
        per_token: also return the per-token tensors.
        distill_open: state of the plan's gate (`weights.HysteresisGate`); only and always with one.

    Raises:
        ValueError: batch, plan and tensors do not fit together; says which field.
        NonFiniteStudentError: the student has diverged. A loss that is not finite is never returned.
    """
    _check_shapes(hidden, head_weight, batch, chunk_rows)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if (distill_open is None) != (plan.gate is None):
        raise ValueError(f"distill_open: got {distill_open}, allowed: true or false with a gate, else none")
    head = Head(head_weight.detach(), None if head_bias is None else head_bias.detach(), softcap, scale)
    student = HeadPass(head, plan.temperature, dtype)
    # Pairs are compared as the student is now, whatever it was when the step began.
    if plan.preference is not None or (plan.needs_own and batch.old_logprobs is None):
        batch = replace(batch, old_logprobs=_own_logprobs(student, hidden, batch, chunk_rows))
    rows = select_rows(batch, plan, len(head_weight), distill_open=distill_open is not False)
    rows.traces = {} if per_token else None
    job = ChunkedLoss(
        rows=rows,
        student=student,
        teachers=_teachers(plan, hidden, head_weight, teacher_hidden, teacher_head),
        chunk_rows=chunk_rows,
        tile_columns=_tile_columns(hidden),
    )
    if plan.tokens.top_fraction is not None:
        with torch.no_grad():
            scores = job.survey(hidden.detach(), rows.disagreement)
        job = replace(job, rows=rows.restricted(top_rows(scores, plan.tokens.top_fraction)))
    if plan.estimator == "pathwise" and plan.horizon != 0 and rows.distill_scale is not None:
        assert batch.sequence_lengths is not None
        with torch.no_grad():
            costs = job.survey(hidden.detach(), rows.divergences)
        job = replace(job, rows=rows.charged(costs, batch.sequence_lengths))
    rows = job.rows
    loss: Tensor = FusedHeadLoss.apply(hidden, head_weight, head_bias, job)  # type: ignore[no-untyped-call]
    if rows.pairs is not None:
        # Its gradient is that of the pairs; its value becomes theirs, too.
        loss = loss + (plan.distill_coefficient * rows.pairs.loss - loss.detach())
    return LossOutput(loss=loss, metrics=_metrics(rows), per_token=_per_token(rows, len(hidden)))


def student_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    batch: TokenBatch,
    plan: Plan,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """log p of the sampled tokens at the plan's temperature, f64 [T], NaN where the mask is closed.

    Raises:
        NonFiniteStudentError: the student has diverged.
    """
    _check_shapes(hidden, head_weight, batch, chunk_rows)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    head = Head(head_weight.detach(), None if head_bias is None else head_bias.detach(), softcap, scale)
    return _own_logprobs(HeadPass(head, plan.temperature, dtype), hidden, batch, chunk_rows)


def _own_logprobs(student: HeadPass, hidden: Tensor, batch: TokenBatch, chunk_rows: int) -> Tensor:
    check_ids("batch.sampled_ids", batch.sampled_ids, len(student.head.weight))
    index = batch.mask.nonzero().squeeze(1)
    with torch.no_grad():
        return sampled_logprobs(
            student, hidden.detach(), batch.sampled_ids, index,
            chunk_rows=chunk_rows, tile_columns=_tile_columns(hidden),
        )  # fmt: skip


def _tile_columns(hidden: Tensor) -> int:
    return CPU_TILE_COLUMNS if hidden.device.type == "cpu" else GPU_TILE_COLUMNS


def _check_shapes(hidden: Tensor, head_weight: Tensor, batch: TokenBatch, chunk_rows: int) -> None:
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: got {chunk_rows}, allowed: at least 1")
    if hidden.dim() != 2 or len(hidden) != len(batch.sampled_ids) or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, allowed: "
            f"({len(batch.sampled_ids)}, {head_weight.shape[1]}) for this batch and head"
        )


def _teachers(
    plan: Plan,
    hidden: Tensor,
    head_weight: Tensor,
    teacher_hidden: Tensor | Mapping[str, Tensor] | None,
    teacher_head: Head | Mapping[str, Head] | None,
) -> tuple[TeacherPass, ...]:
    """The head pass of every view, in the plan's order; empty unless the support is "full"."""
    views = list(plan.views) if plan.in_process else []
    rows, heads = _by_view(views, teacher_hidden), _by_view(views, teacher_head)
    if set(rows) != set(views) or set(heads) != set(views):
        raise ValueError(
            'teacher_hidden and teacher_head: both, for each view, with support "full", none otherwise; got '
            f"{sorted(rows)} and {sorted(heads)}, views in process: {views}"
        )
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    passes = []
    for name in views:
        if len(rows[name]) != len(hidden):
            raise ValueError(f"teacher_hidden: got {len(rows[name])} rows, allowed: {len(hidden)}")
        if len(heads[name].weight) != len(head_weight):
            raise ValueError(
                f"teacher_head: got a vocabulary of {len(heads[name].weight)}, allowed: {len(head_weight)}"
            )
        passes.append(
            TeacherPass(plan.views[name], HeadPass(heads[name], plan.temperature, dtype), rows[name])
        )
    return tuple(passes)


def _by_view(views: list[str], given: T | Mapping[str, T] | None) -> Mapping[str, T]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return given
    return {views[0] if len(views) == 1 else "unnamed": given}


def _metrics(rows: Rows) -> dict[str, float]:
    names = list(rows.sums)
    values = torch.stack([rows.sums[name].double() for name in names]).tolist()
    return {"positions": 0.0} | dict(zip(names, values, strict=True))


def _per_token(rows: Rows, positions: int) -> dict[str, Tensor] | None:
    if rows.traces is None:
        return None
    nowhere = torch.full((positions,), torch.nan, dtype=torch.float32, device=rows.index.device)
    spread = {"student_logprob": nowhere}  # also of a batch that has no row to train on
    for name, chunks in rows.traces.items():
        values = nowhere.clone()
        values[rows.index] = torch.cat(chunks).to(torch.float32)
        spread[name] = values
    return spread
