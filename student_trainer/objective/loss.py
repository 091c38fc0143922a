"""objective_loss: hidden rows, a head and scores in; the plan's loss, its gradients and metrics out."""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.objective.batch import Head, LossOutput, TokenBatch, ViewTensors
from student_trainer.objective.fused import ChunkedLoss, FusedHeadLoss, HeadPass, NonFiniteStudentError
from student_trainer.objective.plan import Plan
from student_trainer.objective.rows import Rows, select_rows

__all__ = ["Head", "LossOutput", "NonFiniteStudentError", "TokenBatch", "ViewTensors", "objective_loss"]

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
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    chunk_rows: int = CHUNK_ROWS,
    per_token: bool = False,
) -> LossOutput:
    """Loss of a micro-batch, Σ_t weight_t · loss_t, with peak memory independent of T × V.

    Args:
        hidden: [T, H], the rows whose outputs predict the response tokens; any float dtype.
        head_weight, head_bias: [V, H], [V]; gradients are computed only where required.
        batch, plan: T positions, and what to do with them.
        softcap, scale: logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), before the temperature.
        teacher_hidden, teacher_head: [T, H'] and the teacher's head, for support "full" only.
        chunk_rows: rows whose logits exist at a time.
        per_token: also return the per-token tensors.

    Raises:
        ValueError: batch, plan and tensors do not fit together; says which field.
        NonFiniteStudentError: the student has diverged. A loss that is not finite is never returned.
    """
    _check_shapes(hidden, head_weight, batch, chunk_rows)
    _check_teacher(plan, hidden, head_weight, teacher_hidden, teacher_head)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = select_rows(batch, plan, len(head_weight))
    rows.traces = {} if per_token else None
    student = Head(head_weight.detach(), None if head_bias is None else head_bias.detach(), softcap, scale)
    job = ChunkedLoss(
        rows=rows,
        student=HeadPass(student, plan.temperature, dtype),
        teacher=None if teacher_head is None else HeadPass(teacher_head, plan.temperature, dtype),
        teacher_hidden=teacher_hidden,
        chunk_rows=chunk_rows,
        tile_columns=CPU_TILE_COLUMNS if hidden.device.type == "cpu" else GPU_TILE_COLUMNS,
    )
    loss: Tensor = FusedHeadLoss.apply(hidden, head_weight, head_bias, job)  # type: ignore[no-untyped-call]
    return LossOutput(loss=loss, metrics=_metrics(rows), per_token=_per_token(rows, len(hidden)))


def _check_shapes(hidden: Tensor, head_weight: Tensor, batch: TokenBatch, chunk_rows: int) -> None:
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: got {chunk_rows}, allowed: at least 1")
    if hidden.dim() != 2 or len(hidden) != len(batch.sampled_ids) or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, allowed: "
            f"({len(batch.sampled_ids)}, {head_weight.shape[1]}) for this batch and head"
        )


def _check_teacher(
    plan: Plan,
    hidden: Tensor,
    head_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
) -> None:
    given = teacher_hidden is not None and teacher_head is not None
    if given != plan.in_process or (teacher_hidden is None) != (teacher_head is None):
        raise ValueError('teacher_hidden and teacher_head: both with support "full", none otherwise')
    if teacher_hidden is not None and teacher_head is not None:
        if len(teacher_hidden) != len(hidden):
            raise ValueError(f"teacher_hidden: got {len(teacher_hidden)} rows, allowed: {len(hidden)}")
        if len(teacher_head.weight) != len(head_weight):
            raise ValueError(
                f"teacher_head: got a vocabulary of {len(teacher_head.weight)}, allowed: {len(head_weight)}"
            )


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
