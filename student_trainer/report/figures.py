"""Which charts a run gets, and from which metrics."""

from __future__ import annotations

import math

from student_trainer.report.charts import Chart, Reference, Series
from student_trainer.report.run_data import OutcomeRow, RunData

STAGES = (("sampled", "one"), ("scored", "two"), ("trained", "three"))


def charts(run: RunData) -> tuple[Chart, ...]:
    """The figures that have something to show, in reading order."""
    candidates = (accuracy(run), kl(run), loss(run), throughput(run))
    return tuple(chart for chart in candidates if chart.drawable)


def accuracy(run: RunData) -> Chart:
    """Held-out exact match by policy version, with the teacher's greedy accuracy as a reference line."""
    versions = tuple(float(record.policy_version) for record in run.evaluations)
    prompts = max((record.prompts for record in run.evaluations), default=0)
    teacher = teacher_row(run)
    references: tuple[Reference, ...] = ()
    if teacher is not None and teacher.greedy is not None:
        references = (Reference(f"teacher, greedy {100 * teacher.greedy:.0f}%", teacher.greedy, "muted"),)
    return Chart(
        key="accuracy",
        title="Held-out accuracy",
        caption=f"Exact match on {prompts} prompts never trained on; bands are one standard error.",
        unit="percent",
        series=(
            Series(
                label="greedy",
                xs=versions,
                ys=tuple(record.greedy for record in run.evaluations),
                errors=tuple(record.greedy_error for record in run.evaluations),
                tone="one",
                markers=True,
            ),
            Series(
                label="sampled, T = 1",
                xs=versions,
                ys=tuple(record.sampled for record in run.evaluations),
                errors=tuple(record.sampled_error for record in run.evaluations),
                tone="two",
                markers=True,
            ),
        ),
        references=references,
        x_label="policy version",
    )


def kl(run: RunData) -> Chart:
    """The divergence estimate of each training batch."""
    return _from_metric(
        run,
        "kl",
        "KL to the teacher",
        "Nats per response token, on the training batch.",
        "two",
    )


def loss(run: RunData) -> Chart:
    """The training loss of each batch."""
    return _from_metric(run, "loss", "Loss", "The objective, as the optimizer saw it.", "three")


def throughput(run: RunData) -> Chart:
    """Tokens per second of each stage while it worked on the batch."""
    series = []
    for stage, tone in STAGES:
        points = [
            (float(record.step), record.values[f"{stage}_tokens_per_second"])
            for record in run.steps
            if f"{stage}_tokens_per_second" in record.values
        ]
        series.append(
            Series(
                label=stage,
                xs=tuple(x for x, _ in points),
                ys=tuple(y for _, y in points),
                tone=tone,
                smooth=_smoothing(len(points)),
            )
        )
    return Chart(
        key="throughput",
        title="Throughput per stage",
        caption="Response tokens per second through each stage.",
        unit="rate",
        series=tuple(line for line in series if line.xs),
    )


def teacher_row(run: RunData) -> OutcomeRow | None:
    """The teacher's own line of the final table, where there is one."""
    if run.outcome is None:
        return None
    return next((row for row in run.outcome.rows if row.name == "teacher"), None)


def _from_metric(run: RunData, key: str, title: str, caption: str, tone: str) -> Chart:
    points = [(float(record.step), record.values[key]) for record in run.steps if key in record.values]
    smooth = _smoothing(sum(math.isfinite(y) for _, y in points))
    return Chart(
        key=key,
        title=title,
        caption=caption + (f" Bold: {smooth}-step mean." if smooth else ""),
        unit="nats",
        series=(
            Series(
                label=title,
                xs=tuple(x for x, _ in points),
                ys=tuple(y for _, y in points),
                tone=tone,
                smooth=smooth,
            ),
        )
        if points
        else (),
    )


def _smoothing(points: int) -> int:
    """A running mean once there are enough points for one to say something."""
    return max(5, points // 20) if points >= 30 else 0
